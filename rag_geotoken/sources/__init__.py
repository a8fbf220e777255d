"""Sources of photos, written SCHEME:REST: one file a source, each a function to the photos table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_geotoken.errors import GeoError

if TYPE_CHECKING:
    import pyarrow as pa


def read_source(source: str) -> pa.Table:
    """Read a source -> photos: id, image (reference), lat, lon, place, author.

    ``blue-marble:SPLIT[,n=N][,seed=S]`` or ``folder:DIR``. Raises GeoError for another scheme or what the source says.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "blue-marble":
        from rag_geotoken.sources import blue_marble

        return blue_marble.read(rest)
    if scheme == "folder":
        from rag_geotoken.sources import folder

        return folder.read(rest)
    raise GeoError(f"no source {source!r}: write blue-marble:SPLIT or folder:DIR")
