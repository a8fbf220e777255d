"""These functions build an index from a source: photos, embeddings or projections, thumbnails, then the index."""

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
    """Read a source, encode its photos, write the index and return its manifest.

    Stage tables are kept in ``stages``, so a stopped build resumes. plan: what the index may cost; an exact one where
    that is enough. thumbnails: keep the pictures too, their longer side so many pixels.
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
    """Make the table of a stage that reads nothing but photos, a block of which ``work`` gets."""
    photos = Photos.from_table(read_table(folder / "photos.parquet"))
    ids = photos.ids
    return run_stage(folder, name, recipe, inputs=["photos"], ids=ids, work=lambda at: work(photos[at]), many=True)


def _embeddings(folder: Path, alignment: GeoAlignment) -> Path:
    recipe = {"encoder": alignment.identity, "version": road(Options())[0].version}
    return _stage(folder, "embeddings", recipe, lambda part: embed_pictures(alignment, part.images).to_table(part.ids))


def project(folder: Path, alignment: GeoAlignment) -> Path:
    """Write the table of projections: the one vector from which an embedding's three parts are computed, as float16.

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
    """Write the table of thumbnails: id and the picture as WebP, its longer side at most ``size`` pixels."""

    def work(photos: Photos) -> pa.Table:
        pictures = pa.array(make_thumbnails(photos.images, size), pa.binary())  # empty where unreadable
        return pa.table({"id": pa.array(photos.ids, pa.string()), "picture": pictures})

    return _stage(folder, "thumbnails", {"size": size, "quality": QUALITY}, work)
