"""Sources of photos are written SCHEME:REST; each is a file with ``read(rest)``, which returns a photos table.

A source whose pictures are no files has ``draw(references, size)`` besides, which makes pixels of its references, and
``PIXELS``, the side of the squares that hold all they show. One that keeps some of its photos for evaluation has
``check_use(rest, use)``.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from rag_geotoken.errors import GeoError

if TYPE_CHECKING:
    import pyarrow as pa

# What may stand before the colon; the file of a scheme bears its name.
SCHEMES = ("blue-marble", "folder", "hub", "im2gps3k", "mp16-pro", "yfcc4k")


def source_module(text: str) -> ModuleType | None:
    """Return the module behind ``SCHEME:REST``, of a source or of a picture's reference, or None."""
    scheme, colon, _ = text.partition(":")
    return import_module(f"rag_geotoken.photos.{scheme.replace('-', '_')}") if colon and scheme in SCHEMES else None


def limited(source: str, limit: int | None) -> str:
    """Return a source with at most so many photos, whatever limit it gives itself; as it is without a limit."""
    return source if limit is None else f"{source},limit={limit}"


def read_source(source: str) -> pa.Table:
    """Read the photos of a source: id, image (reference), lat, lon, place, author.

    Behind a source stands ``,limit=N`` for the first N photos and ``,limit=N,seed=S`` for N random ones. What was left
    out is in the schema's metadata: `photos.read_left_out`. Raises GeoError for another scheme or what the source says.
    """
    return _module(source).read(source.partition(":")[2])


def check_use(source: str, use: str) -> None:
    """Raise GeoError where a source keeps those photos for something else than this use, such as ``train tokens``."""
    module = _module(source)
    if hasattr(module, "check_use"):
        module.check_use(source.partition(":")[2], use)


def view_source(source: str) -> tuple[ModuleType, str]:
    """Return the module of a source that draws views afresh, and their split, or raise GeoError.

    It has ``draw_views(split, n, seed)``, which are places first, ``cut(views)``, their pixels, and ``is_unseen(lat,
    lon)``, where no training may look.
    """
    module, rest = _module(source), source.partition(":")[2]
    if not hasattr(module, "draw_views"):
        raise GeoError(f"{source} draws no views afresh, which this training needs")
    return module, module.parse(rest)[0]


def _module(source: str) -> ModuleType:
    module = source_module(source)
    if module is None:
        raise GeoError(f"no source {source!r}: write {', '.join(f'{name}:...' for name in SCHEMES)}")
    return module
