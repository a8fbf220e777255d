"""The road on disk up to the neighbours, and what every stage of a run has in common.

photos -> embeddings -> neighbours
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.files import write_json
from rag_geotoken.index import COPIES
from rag_geotoken.progress import progress_bar
from rag_geotoken.run.tables import read_embeddings
from rag_geotoken.tables import fixed_list, read_table, stage, table_sha256
from rag_geotoken.thumbnails import QUALITY, make_thumbnails

if TYPE_CHECKING:
    import pyarrow as pa

    from rag_geotoken.alignment import GeoAlignment
    from rag_geotoken.index import GeoIndex

BLOCK, LARGE_BLOCK, MANY = 256, 2048, 65_536  # photos a file while a stage runs, and of how many it has large ones


def write_photos(folder: Path, source: str) -> Path:
    """The photos table of a source: id, image, lat, lon, place, author.

    The source is read each time and known by what it holds, since a folder can change under the same name. What it left
    out stands by reason in ``left_out.json``, and in one line on standard error.
    """
    from rag_geotoken.sources import read_source
    from rag_geotoken.sources.photos import read_left_out

    table = read_source(source)
    left_out = read_left_out(table)
    if line := left_out.line():
        print(f"{source}: {line}", file=sys.stderr)
    recipe = {"source": source, "content": table_sha256(table)}

    def work(_: slice) -> pa.Table:
        write_json(folder / "left_out.json", {"photos": len(table), **vars(left_out)})
        return table

    return stage(folder, "photos", recipe, [], ["all"], work)


def encode(folder: Path, alignment: GeoAlignment, projections: bool = False) -> Path:
    """Photos -> embeddings: id, image, gps and text (dim), digest of the pixels, error.

    projections: instead of the three parts the one projection that they follow from, in half precision: a sixth of the
    bytes, as ``projections``.
    """
    import pyarrow as pa

    from rag_geotoken.pipeline import digests

    photos = read_table(folder / "photos.parquet", ["id", "image"])
    ids, images = photos["id"].to_pylist(), photos["image"]

    def work(at: slice) -> pa.Table:
        pixels, errors = alignment.load(images[at.start : at.stop].to_pylist())
        if projections:
            vectors: dict[str, NDArray[Any]] = {"projection": alignment.project(pixels).astype(np.float16)}
        else:
            parts = alignment.embed(pixels)
            vectors = {name: parts[:, i] for i, name in enumerate(("image", "gps", "text"))}
        bad = [error is not None for error in errors]
        columns = {"id": pa.array(ids[at], pa.string())}
        for name, values in vectors.items():
            values[bad] = 0.0
            columns[name] = fixed_list(values)
        columns |= {"digest": pa.array(digests(pixels)), "error": pa.array(errors, pa.string())}
        return pa.table(columns)

    name = "projections" if projections else "embeddings"
    block = LARGE_BLOCK if len(ids) > MANY else BLOCK
    encoder = alignment.encoder_identity if projections else alignment.identity
    return run_stage(folder, name, {"encoder": encoder}, ["photos"], ids, work, block)


def thumbnails(folder: Path, size: int) -> Path:
    """Photos -> thumbnails: id and the picture as WebP, its longer side at most ``size`` px; empty where unreadable."""
    import pyarrow as pa

    photos = read_table(folder / "photos.parquet", ["id", "image"])
    ids, images = photos["id"].to_pylist(), photos["image"]

    def work(at: slice) -> pa.Table:
        made = make_thumbnails(images[at.start : at.stop].to_pylist(), size)
        return pa.table({"id": pa.array(ids[at], pa.string()), "picture": pa.array(made, pa.binary())})

    block = LARGE_BLOCK if len(ids) > MANY else BLOCK
    return run_stage(folder, "thumbnails", {"size": size, "quality": QUALITY}, ["photos"], ids, work, block)


def search(
    folder: Path,
    index: GeoIndex,
    k: int,
    weights: tuple[float, ...],
    within: tuple[float, float, float] | None = None,
    other_authors: bool = False,
    exact: bool = False,
) -> Path:
    """Embeddings -> neighbours: id, rank, row, lat, lon, score; a photo never finds itself.

    within: only photos no further than (lat, lon, km) from a place; where fewer are, the nearest to it. other_authors:
    none by the photo's own author. exact: every row is compared, whatever the index.
    """
    import pyarrow as pa

    ids, photo, digest = read_embeddings(folder)
    recipe = {"k": k, "weights": list(weights), "index": index.manifest["sha256"]}
    chosen = {"within": within, "other_authors": other_authors, "exact": exact}
    recipe |= {name: value for name, value in chosen.items() if value}
    keep = index.mask(within, at_least=k + COPIES)
    names = read_table(folder / "photos.parquet", ["id", "author"])
    author_of = dict(zip(names["id"].to_pylist(), names["author"].to_pylist(), strict=True)) if other_authors else {}
    authors = [author_of.get(name) for name in ids]

    def work(at: slice) -> pa.Table:
        theirs = authors[at] if other_authors else None
        found = index.search(photo[at], k, weights, digest[at], keep, exact=exact, authors=theirs)
        return pa.table(
            {
                "id": pa.array(np.repeat(ids[at], k), pa.string()),
                "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), len(found.rows)),
                "row": found.rows.ravel(),
                "lat": found.lat_lon[..., 0].ravel(),
                "lon": found.lat_lon[..., 1].ravel(),
                "score": found.scores.ravel(),
            }
        )

    return run_stage(folder, "neighbours", recipe, ["embeddings"], ids, work)


def run_stage(
    folder: Path,
    name: str,
    recipe: dict[str, Any],
    inputs: list[str],
    ids: list[str],
    work: Callable[[slice], pa.Table],
    block: int | None = None,
) -> Path:
    """A stage of a run: ``inputs`` are tables of its folder, ``ids`` the photos in order; see :func:`.tables.stage`."""
    files = [folder / f"{file}.parquet" for file in inputs]
    with progress_bar(len(ids), f"{folder.name}: {name}") as advance:
        return stage(folder, name, recipe, files, ids, work, block=block or BLOCK, progress=advance)
