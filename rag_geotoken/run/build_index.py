"""A source becomes an index here: photos, embeddings or projections, thumbnails, then the index itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.index.build import Plan, build_index
from rag_geotoken.options import Options
from rag_geotoken.photos.thumbnails import QUALITY, make_thumbnails
from rag_geotoken.run.resumable import run_stage
from rag_geotoken.run.road import road
from rag_geotoken.run.stages import digests, embed_pictures
from rag_geotoken.run.walk import write_photos
from rag_geotoken.storage.files import check_writable
from rag_geotoken.storage.parquet import fixed_list, read_table
from rag_geotoken.types import Photos


def make_index(
    folder: Path, source: str, alignment: GeoAlignment, plan: Plan | None = None, thumbnails: int | None = None
) -> dict[str, Any]:
    """Read a source, encode its photos, write the index and return its manifest; what is done stays done.

    plan: what it may cost; an exact index where that is enough. thumbnails: keep the pictures too, their longer side so
    many pixels. Stage tables lie beside it in ``stages``.
    """
    check_writable(folder)
    tables, plan = folder / "stages", plan or Plan()
    photos = write_photos(tables, source)
    small = _thumbnails(tables, thumbnails) if thumbnails else None
    exact = plan.choose(len(read_table(photos, ["id"])), alignment.config.dim) == "Flat"
    vectors = _embeddings(tables, alignment) if exact else project(tables, alignment)
    made_from = folder, photos, vectors, alignment.identity, small, alignment.embed_places
    return build_index(*made_from) if exact else build_index(*made_from, plan, alignment.heads)


def _stage(folder: Path, name: str, recipe: dict[str, Any], work: Callable[[Photos], pa.Table]) -> Path:
    """A stage that reads photos alone, a block of which its work gets; see :func:`.run_stage`."""
    photos = Photos.from_table(read_table(folder / "photos.parquet"))
    return run_stage(folder, name, recipe, ["photos"], photos.ids, lambda at: work(photos[at]), many=True)


def _embeddings(folder: Path, alignment: GeoAlignment) -> Path:
    """Photos -> embeddings, as the road has them."""
    recipe = {"encoder": alignment.identity, "version": road(Options())[0].version}
    return _stage(folder, "embeddings", recipe, lambda some: embed_pictures(alignment, some.images).to_table(some.ids))


def project(folder: Path, alignment: GeoAlignment) -> Path:
    """Project photos to the one vector that the parts of an embedding follow from, in half precision.

    Columns id, projection (dim), digest, error: a sixth of the bytes of embeddings.
    """

    def work(photos: Photos) -> pa.Table:
        pixels, errors = alignment.load(photos.images)
        vectors = alignment.project(pixels).astype(np.float16)
        vectors[[error is not None for error in errors]] = 0.0
        columns = {"id": pa.array(photos.ids, pa.string()), "projection": fixed_list(vectors)}
        return pa.table(columns | {"digest": digests(pixels), "error": pa.array(errors, pa.string())})

    return _stage(folder, "projections", {"encoder": alignment.encoder_identity}, work)


def _thumbnails(folder: Path, size: int) -> Path:
    """Photos -> thumbnails: id and the picture as WebP, its longer side at most ``size`` px; empty where unreadable."""

    def work(photos: Photos) -> pa.Table:
        made = make_thumbnails(photos.images, size)
        return pa.table({"id": pa.array(photos.ids, pa.string()), "picture": pa.array(made, pa.binary())})

    return _stage(folder, "thumbnails", {"size": size, "quality": QUALITY}, work)
