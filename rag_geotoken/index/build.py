"""An index is built here, from the stage tables of photos to a folder that :class:`.GeoIndex` opens."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.index import approximate
from rag_geotoken.index.cell_search import cell_vectors
from rag_geotoken.index.exact import Vectors, scan
from rag_geotoken.index.files import (
    CELLS,
    FORMATS,
    MANIFEST,
    PROJECTIONS,
    ROWS,
    VECTORS,
    built_from,
    write_manifest,
)
from rag_geotoken.index.geo_index import BLOCK, ROW_COLUMNS, Heads, Mask, unit
from rag_geotoken.photos.table import read_left_out
from rag_geotoken.photos.thumbnails import write_thumbnails
from rag_geotoken.storage.files import file_sha256, read_json, remove, write_whole
from rag_geotoken.storage.parquet import read_table, to_numpy, write_table
from rag_geotoken.storage.progress import progress_bar
from rag_geotoken.types import SEARCH_WEIGHTS

if TYPE_CHECKING:
    import pyarrow as pa

Embed = Callable[[NDArray[np.float64]], Vectors]
EXACT, APPROXIMATE = FORMATS
K, QUERIES = 20, 500  # recall@20 on so many photos that are held out
TRUTH = 20  # the true neighbors are the best by all three parts of TRUTH * K by the image part
REFINE = (2, 3, 5, 8, 12, TRUTH)


@dataclass(frozen=True)
class Plan:
    """A plan says what an index may cost: memory, the share of true neighbors to be found, or a factory outright."""

    factory: str | None = None
    memory_gib: float = 16.0
    recall: float = 0.95

    def choose(self, rows: int, dim: int) -> str:
        """Choose the factory for so many photos, or raise GeoError for a target out of range or no room."""
        if not (0 < self.recall <= 1 and self.memory_gib > 0):
            raise GeoError(
                f"recall {self.recall:g}, memory {self.memory_gib:g} GiB: give 0 to 1, and more than nothing"
            )
        return self.factory or approximate.choose_factory(rows, dim, self.memory_gib, self.recall)


def build_index(
    folder: Path,
    photos_file: Path,
    vectors_file: Path,
    encoder: str,
    thumbnails_file: Path | None = None,
    embed: Embed | None = None,
    plan: Plan | None = None,
    heads: Heads | None = None,
) -> dict[str, Any]:
    """Write an index of the photos that have a vector and a place, and return its manifest.

    The files are stage tables, row for row; thumbnails are kept in the index where they were made. The vectors are
    embeddings; or, with a plan and the model's heads, projections, whose image parts are searched approximately and the
    best compared exactly. embed: of places; then the index keeps the embeddings of the cells around its photos. The
    manifest is written last, so a folder without one is no index; one made from the same things is left as it is.
    Raises GeoError when no photo can be used or the factory does not fit.
    """
    begun = time.monotonic()
    made_from: dict[str, Any] = {"plan": asdict(plan)} if plan else {}
    made_from |= {"photos": file_sha256(photos_file), "embeddings": file_sha256(vectors_file), "encoder": encoder}
    made_from |= {"thumbnails": file_sha256(thumbnails_file)} if thumbnails_file else {}
    made_from |= {"cells": "1"} if embed else {}
    if manifest := built_from(folder, made_from):
        return manifest
    rows, usable, left_out = _usable(photos_file, vectors_file)
    remove(folder / MANIFEST)  # from here on the folder is no index
    if plan and heads:
        index, masks, facts = _approximate(folder, vectors_file, usable, plan, heads)
    else:
        index, masks, facts = _exact(vectors_file, usable)
    write_whole(folder / VECTORS, partial(_write_vectors, index))
    rows = rows.take(np.concatenate([np.flatnonzero(mask) for mask in masks]))
    write_table(folder / ROWS, rows)
    facts |= {"encoder": encoder, "metric": "inner product", "rows": len(rows)} | left_out
    if thumbnails_file:
        write_thumbnails(folder, thumbnails_file, masks)
        facts["thumbnails"] = read_json(thumbnails_file.with_suffix(".json"))["recipe"]["size"]
    if embed:
        cells = cell_vectors(np.column_stack([rows["lat"].to_numpy(), rows["lon"].to_numpy()]), embed)
        write_whole(folder / CELLS, lambda beside: np.save(beside, cells, allow_pickle=False))
        facts["cells"] = len(cells)
    if plan:
        facts["memory_bytes"] = (folder / VECTORS).stat().st_size
        facts["build_seconds"] = round(time.monotonic() - begun, 1)
    return write_manifest(folder, facts, made_from)


def _exact(table: Path, usable: Mask) -> tuple[Any, list[Mask], dict[str, Any]]:
    """The usable embeddings of a table in one index -> it, masks of its rows, figures."""
    import faiss

    names = ["image", "gps", "text"]
    kept = read_table(table, names).filter(usable)
    parts = [to_numpy(kept[name]) for name in names]
    index = faiss.IndexFlatIP(sum(part.shape[1] for part in parts))
    index.add(np.concatenate(parts, axis=1))
    return index, [usable], {"format": EXACT, "dim": parts[0].shape[1], "parts": names, "factory": "Flat"}


def _approximate(
    folder: Path, table: Path, usable: Mask, plan: Plan, heads: Heads
) -> tuple[Any, list[Mask], dict[str, Any]]:
    """Train an index, fill it with the usable projections of a table -> it, masks of its rows one by one, figures.

    Never more in memory than the FAISS index, a training sample and a block of rows. Photos drawn by a seed stay out
    until nprobe or efSearch is chosen by searching for them, and come last in the index.
    """
    at = np.flatnonzero(usable)
    held = np.zeros(len(usable), bool)
    held[np.random.default_rng(0).choice(at, min(QUERIES, len(at) // 10), replace=False)] = True
    path, first = folder / PROJECTIONS, len(at) - int(held.sum())
    dim = _write_projections(path, table, usable, held)
    factory = plan.factory or approximate.inverted_factory(len(at), dim, plan.memory_gib)
    drawn = np.random.default_rng(1).choice(first, approximate.sample_size(factory, first, dim), replace=False)
    sample = unit(_rows(path, np.sort(drawn)))
    begun = time.monotonic()
    index = approximate.train(factory, sample, lambda line: print(f"index: {line}", file=sys.stderr, flush=True))
    facts = {"format": APPROXIMATE, "dim": dim, "parts": ["projection"], "factory": factory}
    facts |= {"trained_on": len(sample), "train_seconds": round(time.monotonic() - begun, 1)}
    del sample
    with progress_bar(len(at), f"index: {factory}") as advance:

        def add(start: int, stop: int) -> None:
            for _, block in _blocks(path, start, stop):
                index.add(block)
                advance(len(block))

        begun = time.monotonic()
        add(0, first)
        facts["add_seconds"] = round(time.monotonic() - begun, 1)
        facts |= _measure(index, path, first, heads, plan.recall)
        add(first, len(at))
    return index, [usable & ~held, held], facts


def _measure(index: Any, path: Path, first: int, heads: Heads, recall: float) -> dict[str, Any]:
    """Choose how many rows are compared exactly, then nprobe or efSearch, by the photos held out (those from first on).

    Their true neighbors are the best by all three parts, with the default weights, of many by an exact search of the
    image parts: measured on the embedded gallery, those are the best of all rows.
    """
    queries = _rows(path, slice(first, None))
    if not len(queries):
        return {"effort_name": approximate.effort_name(index), "effort": 64, "refine": 5, "queries": 0}
    image, k = unit(queries), min(K, first)
    many = scan(image, _blocks(path, 0, first), min(first, TRUTH * k))[1]
    photo = heads(queries.astype(np.float32)) * np.asarray(SEARCH_WEIGHTS, np.float32)[:, None]
    truth = np.empty((len(queries), k), np.int64)
    for i, rows in enumerate(many):  # a few hundred photos, whose candidates would be too many at once
        scores = np.einsum("pd,mpd->m", photo[i], heads(_rows(path, rows).astype(np.float32)))
        truth[i] = rows[np.argsort(-scores, kind="stable")[:k]]
    # Half of what may be missed is left to the approximate search.
    enough = (r for r in REFINE if approximate.recall_at(many[:, : r * k], truth) >= (1 + recall) / 2)
    refine = next(enough, REFINE[-1])
    effort, reached = approximate.tune(index, image, truth, min(first, refine * k), recall)
    if reached < recall:
        print(f"index: finds {reached:.4f} of the true neighbors, less than asked: try SQfp16", file=sys.stderr)
    measured = {"effort_name": approximate.effort_name(index), "effort": effort, "refine": refine}
    return measured | {"recall@20": round(reached, 4), "queries": len(queries)}


def _usable(photos_file: Path, vectors_file: Path) -> tuple[pa.Table, Mask, dict[str, Any]]:
    """All photos with the columns of an index, which have a picture and a place, and why others do not. GeoError."""
    photos, embedded = read_table(photos_file), read_table(vectors_file, ["id", "digest", "error"])
    if not photos["id"].equals(embedded["id"]):
        raise GeoError(f"{vectors_file.name} is not of the photos in {photos_file.name}: run encode again")
    seen = embedded["error"].is_null().to_numpy()
    usable = seen & photos["lat"].is_valid().to_numpy()
    if not usable.any():
        raise GeoError("no photo has both a readable picture and coordinates: nothing to index")
    why = {"without a readable picture": int((~seen).sum()), "without coordinates": int((seen & ~usable).sum())}
    left_out = {
        "left_out": int((~usable).sum()),
        "left_out_why": {reason: count for reason, count in why.items() if count},
        # What became no photo at all: not among the number above.
        "source_left_out": {reason: entry["photos"] for reason, entry in read_left_out(photos).reasons.items()},
    }
    return photos.append_column("digest", embedded["digest"]).select(ROW_COLUMNS), usable, left_out


def _write_projections(path: Path, table: Path, usable: Mask, held: Mask) -> int:
    """The usable rows of a projections table as one array (rows, dim) float16, those held out last -> dim."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(table) as file:
        dim = int(file.schema_arrow.field("projection").type.list_size)

        def write(beside: Path) -> None:
            last: list[NDArray[np.float16]] = []
            with beside.open("wb") as out, progress_bar(len(usable), "index: projections") as advance:
                shape = (int(usable.sum()), dim)
                np.lib.format.write_array_header_1_0(out, {"descr": "<f2", "fortran_order": False, "shape": shape})
                done = 0
                for batch in file.iter_batches(BLOCK, columns=["projection"]):
                    block, at = to_numpy(batch["projection"]), slice(done, done + len(batch))
                    if not np.isfinite(block[usable[at]]).all():
                        raise GeoError("an embedding is not finite: the encoder does not fit half precision")
                    out.write(block[usable[at] & ~held[at]].tobytes())
                    last.append(block[held[at]])
                    done += len(batch)
                    advance(len(batch))
                out.write(np.concatenate(last).tobytes())

        write_whole(path, write)
    return dim


def _blocks(path: Path, first: int, last: int) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
    """Numbers (B,) and image parts (B, dim) of the rows from ``first`` up to ``last``."""
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        yield np.arange(start, stop), unit(_rows(path, slice(start, stop)))


def _rows(path: Path, rows: slice | NDArray[np.int64]) -> NDArray[np.float16]:
    """Projections of some rows; the file is mapped anew each time, or all that was ever read would stay in memory."""
    return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[rows], np.float16)


def _write_vectors(index: Any, path: Path) -> None:
    import faiss

    try:
        faiss.write_index(index, str(path))
    except RuntimeError:  # what FAISS makes of a full disk or a folder that may not be written
        raise OSError("the disk is full or the folder is read-only") from None
