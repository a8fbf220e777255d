"""Sources of photos, written SCHEME:REST: one file a source, each a function to the photos table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_geotoken.errors import GeoError

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMES = ("blue-marble", "folder", "mp16-pro", "im2gps3k", "yfcc4k", "hub")


def is_source(text: str) -> bool:
    """Whether a text is SCHEME:REST of a source, and not a path."""
    return text.startswith(tuple(f"{scheme}:" for scheme in SCHEMES))


def limited(source: str, limit: int | None) -> str:
    """A source with at most so many photos, whatever limit it gives itself; as it is without a limit."""
    return source if limit is None else f"{source},limit={limit}"


def read_source(source: str) -> pa.Table:
    """Read a source -> photos: id, image (reference), lat, lon, place, author.

    ``blue-marble:SPLIT``, ``folder:DIR``, ``mp16-pro:DIR``, ``im2gps3k:DIR``, ``yfcc4k:DIR`` or ``hub:NAME``; behind it
    ``,limit=N`` for the first N photos and ``,limit=N,seed=S`` for N random ones. What was left out is in the schema's
    metadata: `photos.read_left_out`. Raises GeoError for another scheme or what the source says.
    """
    scheme, _, rest = source.partition(":")
    match scheme:
        case "blue-marble":
            from rag_geotoken.sources import blue_marble

            return blue_marble.read(rest)
        case "folder":
            from rag_geotoken.sources import folder

            return folder.read(rest)
        case "mp16-pro":
            from rag_geotoken.sources import mp16_pro

            return mp16_pro.read(rest)
        case "im2gps3k" | "yfcc4k":
            from rag_geotoken.sources import benchmarks

            return benchmarks.read(scheme, rest)
        case "hub":
            from rag_geotoken.sources import hub

            return hub.read(rest)
    raise GeoError(f"no source {source!r}: write {', '.join(f'{name}:...' for name in SCHEMES)}")
