"""These functions find the module of a photo source, which is written ``SCHEME:REST``, and read its photos.

Each scheme has a module with ``read(rest)``, which returns the photos table. A module may also have

* ``draw(references, size)``, which renders picture references that are not files, and ``PIXELS``, the side of the
  squares that hold all their detail;
* ``check_use(rest, use)``, where some of its photos are kept for evaluation.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pyarrow as pa

from rag_geotoken.errors import GeoError

# The module of a scheme has its name.
SCHEMES = ("blue-marble", "folder", "hub", "im2gps3k", "mp16-pro", "yfcc4k")


def source_module(text: str) -> ModuleType | None:
    """Return the module of a source or picture reference ``SCHEME:REST``; None for any other text."""
    scheme, colon, _ = text.partition(":")
    return import_module(f"rag_geotoken.photos.{scheme.replace('-', '_')}") if colon and scheme in SCHEMES else None


def limited(source: str, limit: int | None) -> str:
    """Return the source with this limit on its photos in place of its own; unchanged for None."""
    return source if limit is None else f"{source},limit={limit}"


def read_source(source: str) -> pa.Table:
    """Read the photos table of a source: id, image (reference), lat, lon, place, author.

    ``,limit=N`` at the end of a source takes the first N photos, ``,limit=N,seed=S`` N random ones. The schema's
    metadata hold what was left out, see `table.read_left_out`. Raises GeoError for an unknown scheme and for errors of
    the source.
    """
    module, rest = _split(source)
    return module.read(rest)


def check_use(source: str, use: str) -> None:
    """Raise GeoError where a source keeps its photos from this use, such as ``train tokens``."""
    module, rest = _split(source)
    if hasattr(module, "check_use"):
        module.check_use(rest, use)


def view_source(source: str) -> tuple[ModuleType, str]:
    """Return the module and the split of a source that can draw new views. Raises GeoError for any other source.

    The module has ``draw_views(split, n, seed)``, whose first two columns are lat and lon; ``cut(views)``, their
    pixels; and ``is_unseen(lat, lon)``, the places that no training may use.
    """
    module, rest = _split(source)
    if not hasattr(module, "draw_views"):
        raise GeoError(f"{source} draws no views afresh, which this training needs")
    return module, module.parse(rest)[0]


def _split(source: str) -> tuple[ModuleType, str]:
    module = source_module(source)
    if module is None:
        raise GeoError(f"no source {source!r}: write {', '.join(f'{name}:...' for name in SCHEMES)}")
    return module, source.partition(":")[2]
