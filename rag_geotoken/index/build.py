"""This module builds an index: from the stage tables of photos to a folder that :class:`.GeoIndex` opens."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.index import approximate, files
from rag_geotoken.index.cell_search import cell_vectors
from rag_geotoken.index.exact import Numbers, Vectors, scan
from rag_geotoken.index.files import CELLS, FORMATS, MANIFEST, PROJECTIONS, ROWS, VECTORS
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
Built = tuple[Any, list[Mask], dict[str, Any]]  # a FAISS index, masks of its rows in their order, figures
K, QUERIES = 20, 500  # recall@20 on so many photos that are held out
TRUTH = 20  # the true neighbors are the best by all three parts of TRUTH * K by the image part
REFINE = (2, 3, 5, 8, 12, TRUTH)


@dataclass(frozen=True)
class Plan:
    """This class says what an index may cost: memory and the recall of true neighbors, or a fixed FAISS factory."""

    factory: str | None = None
    memory_gib: float = 16.0
    recall: float = 0.95

    def choose(self, rows: int, dim: int) -> str:
        """Return the FAISS factory for so many photos; GeoError for a target out of range or too little memory."""
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

    The files are stage tables, row for row. The vectors are embeddings; or, with a plan and the model's heads,
    projections, whose image parts are searched approximately and the best compared exactly. embed: of places, for the
    embeddings of the cells around the photos. The manifest is written last, so a folder without one is no index; an
    index made from the same inputs is left as it is. Raises GeoError when no photo can be used or the factory does not
    fit.
    """
    begun = time.monotonic()
    made_from: dict[str, Any] = {"plan": asdict(plan)} if plan else {}
    made_from |= {"photos": file_sha256(photos_file), "embeddings": file_sha256(vectors_file), "encoder": encoder}
    made_from |= {"thumbnails": file_sha256(thumbnails_file)} if thumbnails_file else {}
    made_from |= {"cells": "1"} if embed else {}
    with suppress(GeoError):
        manifest = files.check_manifest(folder)
        if manifest["made_from"] == made_from:
            return manifest
    rows, usable, left_out = _usable(photos_file, vectors_file)
    remove(folder / MANIFEST)  # from now on the folder is no index
    if plan and heads:
        index, masks, facts = _approximate(folder, vectors_file, usable, plan=plan, heads=heads)
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
        cells = cell_vectors(np.column_stack([rows["lat"], rows["lon"]]), embed)
        write_whole(folder / CELLS, lambda beside: np.save(beside, cells, allow_pickle=False))
        facts["cells"] = len(cells)
    if plan:
        facts["memory_bytes"] = (folder / VECTORS).stat().st_size
        facts["build_seconds"] = round(time.monotonic() - begun, 1)
    return files.write_manifest(folder, facts, made_from)


def _exact(table: Path, usable: Mask) -> Built:
    """Index the usable embeddings of a table."""
    import faiss

    names = ["image", "gps", "text"]
    kept = read_table(table, names).filter(usable)
    parts = [to_numpy(kept[name]) for name in names]
    index = faiss.IndexFlatIP(sum(part.shape[1] for part in parts))
    index.add(np.concatenate(parts, axis=1))
    return index, [usable], {"format": EXACT, "dim": parts[0].shape[1], "parts": names, "factory": "Flat"}


def _approximate(folder: Path, table: Path, usable: Mask, *, plan: Plan, heads: Heads) -> Built:
    """Train an index and fill it with the usable projections of a table.

    Never more in memory than the FAISS index, a training sample and a block of rows. Photos drawn by a seed are held
    out until nprobe or efSearch is chosen by searching for them, and come last in the index.
    """
    rows = np.flatnonzero(usable)
    held_out = np.zeros(len(usable), bool)
    held_out[np.random.default_rng(0).choice(rows, min(QUERIES, len(rows) // 10), replace=False)] = True
    path, first = folder / PROJECTIONS, len(rows) - int(held_out.sum())
    write_whole(path, partial(_write_projections, table, usable, held_out))
    dim = _rows(path, slice(0)).shape[1]
    factory = plan.factory or approximate.inverted_factory(len(rows), dim, plan.memory_gib)
    drawn = np.random.default_rng(1).choice(first, approximate.sample_size(factory, first, dim), replace=False)
    sample = unit(_rows(path, np.sort(drawn)))
    begun = time.monotonic()
    index = approximate.train(factory, sample, lambda line: print(f"index: {line}", file=sys.stderr, flush=True))
    facts = {"format": APPROXIMATE, "dim": dim, "parts": ["projection"], "factory": factory}
    facts |= {"trained_on": len(sample), "train_seconds": round(time.monotonic() - begun, 1)}
    del sample
    with progress_bar(len(rows), f"index: {factory}") as advance:

        def add(start: int, stop: int) -> None:
            for _, block in _blocks(path, start, stop):
                index.add(block)
                advance(len(block))

        begun = time.monotonic()
        add(0, first)
        facts["add_seconds"] = round(time.monotonic() - begun, 1)
        facts |= _measure(index, path, first, heads=heads, recall=plan.recall)
        add(first, len(rows))
    return index, [usable & ~held_out, held_out], facts


def _measure(index: Any, path: Path, first: int, *, heads: Heads, recall: float) -> dict[str, Any]:
    """Choose how many rows are compared exactly, then nprobe or efSearch, by the photos held out (from ``first`` on).

    Of their nearest rows by an exact search of the image parts, the true neighbors are the best by all three parts with
    the default weights: measured on the embedded gallery, those are the best of all rows.
    """
    facts: dict[str, Any] = {"effort_name": approximate.effort_name(index)}
    queries = _rows(path, slice(first, None))
    if not len(queries):
        return facts | {"effort": 64, "refine": 5, "queries": 0}
    image, k = unit(queries), min(K, first)
    near = scan(image, _blocks(path, 0, first), min(first, TRUTH * k))[1]
    weighted = heads(queries.astype(np.float32)) * np.asarray(SEARCH_WEIGHTS, np.float32)[:, None]
    truth = np.empty((len(queries), k), np.int64)
    for i, rows in enumerate(near):  # the candidates of a few hundred photos would be too many at once
        scores = np.einsum("pd,mpd->m", weighted[i], heads(_rows(path, rows).astype(np.float32)))
        truth[i] = rows[np.argsort(-scores, kind="stable")[:k]]
    # Half of what may be missed is left to the approximate search.
    enough = (r for r in REFINE if approximate.recall_at(near[:, : r * k], truth) >= (1 + recall) / 2)
    refine = next(enough, REFINE[-1])
    effort, reached = approximate.tune(index, image, truth, k=min(first, refine * k), recall=recall)
    if reached < recall:
        print(f"index: finds {reached:.4f} of the true neighbors, less than asked: try SQfp16", file=sys.stderr)
    return facts | {"effort": effort, "refine": refine, "recall@20": round(reached, 4), "queries": len(queries)}


def _usable(photos_file: Path, vectors_file: Path) -> tuple[pa.Table, Mask, dict[str, Any]]:
    """Return all photos with the columns of an index, a mask of the usable ones, and why the others are not."""
    photos, embedded = read_table(photos_file), read_table(vectors_file, ["id", "digest", "error"])
    if not photos["id"].equals(embedded["id"]):
        raise GeoError(f"{vectors_file.name} is not of the photos in {photos_file.name}: run encode again")
    readable = embedded["error"].is_null().to_numpy()
    usable = readable & photos["lat"].is_valid().to_numpy()
    if not usable.any():
        raise GeoError("no photo has both a readable picture and coordinates: nothing to index")
    why = {"without a readable picture": ~readable, "without coordinates": readable & ~usable}
    left_out = {
        "left_out": int((~usable).sum()),
        "left_out_why": {reason: int(mask.sum()) for reason, mask in why.items() if mask.any()},
        # What the source left out is not among the number above.
        "source_left_out": {reason: entry["photos"] for reason, entry in read_left_out(photos).reasons.items()},
    }
    return photos.append_column("digest", embedded["digest"]).select(ROW_COLUMNS), usable, left_out


def _write_projections(table: Path, usable: Mask, held_out: Mask, path: Path) -> None:
    """Write the usable rows of a projections table as an array (rows, dim) float16, those held out last."""
    import pyarrow.parquet as pq

    with (
        path.open("wb") as out,
        pq.ParquetFile(table) as file,
        progress_bar(len(usable), "index: projections") as advance,
    ):
        shape = int(usable.sum()), int(file.schema_arrow.field("projection").type.list_size)
        np.lib.format.write_array_header_1_0(out, {"descr": "<f2", "fortran_order": False, "shape": shape})
        last, done = list[NDArray[np.float16]](), 0
        for batch in file.iter_batches(BLOCK, columns=["projection"]):
            block, at = to_numpy(batch["projection"]), slice(done, done + len(batch))
            if not np.isfinite(block[usable[at]]).all():
                raise GeoError("an embedding is not finite: the encoder does not fit half precision")
            out.write(block[usable[at] & ~held_out[at]].tobytes())
            last.append(block[held_out[at]])
            done += len(batch)
            advance(len(batch))
        out.write(np.concatenate(last).tobytes())


def _blocks(path: Path, first: int, last: int) -> Iterator[tuple[Numbers, Vectors]]:
    """Numbers (B,) and image parts (B, dim) of the rows from ``first`` up to ``last``."""
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        yield np.arange(start, stop), unit(_rows(path, slice(start, stop)))


def _rows(path: Path, rows: slice | Numbers) -> NDArray[np.float16]:
    """Projections of some rows; the file is mapped anew each time, or all that was ever read would stay in memory."""
    return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[rows], np.float16)


def _write_vectors(index: Any, path: Path) -> None:
    import faiss

    try:
        faiss.write_index(index, str(path))
    except RuntimeError:  # raised by FAISS for a full disk or a folder without write permission
        raise OSError("the disk is full or the folder is read-only") from None
