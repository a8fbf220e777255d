"""Building an index: from the stage tables of photos to a folder that :class:`.GeoIndex` opens."""

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

from rag_geotoken import approximate
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.errors import GeoError
from rag_geotoken.exact import scan
from rag_geotoken.files import file_sha256, read_json, write_whole
from rag_geotoken.gps_search import cell_vectors
from rag_geotoken.index import BLOCK, ROW_COLUMNS, Heads, Vectors, unit
from rag_geotoken.index_files import (
    CELLS,
    FORMATS,
    PROJECTIONS,
    ROWS,
    VECTORS,
    built_from,
    no_manifest,
    write_manifest,
)
from rag_geotoken.progress import progress_bar
from rag_geotoken.sources.photos import read_left_out
from rag_geotoken.tables import read_table, to_numpy, write_table
from rag_geotoken.thumbnails import write_thumbnails

if TYPE_CHECKING:
    import pyarrow as pa

Embed = Callable[[NDArray[np.float64]], NDArray[np.float32]]
EXACT, APPROXIMATE = FORMATS
K, QUERIES = 20, 500  # recall@20 on so many photos that are held out
TRUTH = 20  # the true neighbours are the best by all three parts of TRUTH * K by the image part
REFINE = (2, 3, 5, 8, 12, TRUTH)


@dataclass(frozen=True)
class Plan:
    """What an index may cost: memory, the share of true neighbours to be found, or a FAISS factory outright."""

    factory: str | None = None
    memory_gib: float = 16.0
    recall: float = 0.95

    def choose(self, rows: int, dim: int) -> str:
        """The factory for so many photos. Raises GeoError for a target out of range or no room."""
        if not (0 < self.recall <= 1 and self.memory_gib > 0):
            raise GeoError(
                f"recall {self.recall:g}, memory {self.memory_gib:g} GiB: give 0 to 1, and more than nothing"
            )
        return self.factory or approximate.choose_factory(rows, dim, self.memory_gib, self.recall)


def build_index(
    folder: Path,
    photos_file: Path,
    embeddings_file: Path,
    encoder: str,
    thumbnails_file: Path | None = None,
    embed: Embed | None = None,
) -> dict[str, Any]:
    """Write an exact index of the photos that have an embedding and a place -> its manifest.

    The files are stage tables, row for row; thumbnails are kept in the index where they were made. The manifest is
    written last, so a folder without one is no index; one made from the same tables is left as it is. embed: of places;
    then the index keeps the embeddings of the cells around its photos. Raises GeoError when no photo can be used.
    """
    import faiss

    made_from = {"photos": file_sha256(photos_file), "embeddings": file_sha256(embeddings_file), "encoder": encoder}
    made_from |= _thumbnails_sha256(thumbnails_file) | ({"cells": "1"} if embed else {})
    if manifest := built_from(folder, made_from):
        return manifest
    rows, usable, left_out = _usable(photos_file, embeddings_file)
    kept = read_table(embeddings_file, ["image", "gps", "text"]).filter(usable)
    parts = [to_numpy(kept[name]) for name in ("image", "gps", "text")]
    index = faiss.IndexFlatIP(sum(part.shape[1] for part in parts))
    index.add(np.concatenate(parts, axis=1))
    no_manifest(folder)
    write_whole(folder / VECTORS, partial(_write_vectors, index))
    write_table(folder / ROWS, rows.filter(usable))
    facts = _keep_thumbnails(folder, thumbnails_file, [usable]) | _keep_cells(folder, rows.filter(usable), embed)
    facts |= {
        "format": EXACT,
        "encoder": encoder,
        "dim": parts[0].shape[1],
        "parts": ["image", "gps", "text"],
        "metric": "inner product",
        "factory": "Flat",
        "rows": int(usable.sum()),
        **left_out,
    }
    return write_manifest(folder, facts, made_from)


def build_approximate(
    folder: Path,
    photos_file: Path,
    projections_file: Path,
    encoder: str,
    heads: Heads,
    plan: Plan,
    thumbnails_file: Path | None = None,
    embed: Embed | None = None,
) -> dict[str, Any]:
    """Write an index that searches the image parts approximately and compares the best exactly -> its manifest.

    Never more in memory than the FAISS index, a training sample and a block of rows. Photos drawn by a seed stay out
    until nprobe or efSearch is chosen by searching for them, and come last in the index. Raises GeoError as
    :func:`build_index` does, and for a factory that does not fit.
    """
    begun = time.monotonic()
    made_from: dict[str, Any] = {"plan": asdict(plan), "encoder": encoder}
    made_from |= {"photos": file_sha256(photos_file), "embeddings": file_sha256(projections_file)}
    made_from |= _thumbnails_sha256(thumbnails_file) | ({"cells": "1"} if embed else {})
    if manifest := built_from(folder, made_from):
        return manifest
    rows, usable, left_out = _usable(photos_file, projections_file)
    at = np.flatnonzero(usable)
    held = np.zeros(len(usable), bool)
    held[np.random.default_rng(0).choice(at, min(QUERIES, len(at) // 10), replace=False)] = True
    order = np.concatenate([np.flatnonzero(usable & ~held), np.flatnonzero(held)])
    no_manifest(folder)
    dim = _write_projections(folder / PROJECTIONS, projections_file, usable, held)
    write_table(folder / ROWS, rows.take(order))
    factory, first = plan.choose(len(order), dim), int((usable & ~held).sum())
    if factory == "Flat":
        raise GeoError("an approximate index needs another factory than Flat: try HNSW32,SQfp16")
    index, measured = _fill(folder / PROJECTIONS, factory, first, heads, plan.recall)
    write_whole(folder / VECTORS, partial(_write_vectors, index))
    facts = _keep_thumbnails(folder, thumbnails_file, [usable & ~held, held])
    facts |= _keep_cells(folder, rows.take(order), embed) | {
        "format": APPROXIMATE,
        "encoder": encoder,
        "dim": dim,
        "parts": ["projection"],
        "metric": "inner product",
        "factory": factory,
        "rows": len(order),
        **left_out,
        **measured,
        "memory_bytes": (folder / VECTORS).stat().st_size,
        "build_seconds": round(time.monotonic() - begun, 1),
    }
    return write_manifest(folder, facts, made_from)


def _fill(path: Path, factory: str, first: int, heads: Heads, recall: float) -> tuple[Any, dict[str, Any]]:
    """Train an index and put all projections in; those from row ``first`` on say what it finds -> it, the figures."""
    count, dim = np.load(path, mmap_mode="r", allow_pickle=False).shape
    sample = _sample(path, first, approximate.sample_size(factory, first, dim))
    begun = time.monotonic()
    index = approximate.train(factory, sample, lambda line: print(f"index: {line}", file=sys.stderr, flush=True))
    facts = {"trained_on": len(sample), "train_seconds": round(time.monotonic() - begun, 1)}
    del sample
    with progress_bar(count, f"index: {factory}") as advance:
        begun = time.monotonic()
        approximate.add(index, _blocks(path, 0, first), advance)
        facts["add_seconds"] = round(time.monotonic() - begun, 1)
        facts |= _measure(index, path, first, heads, recall)
        approximate.add(index, _blocks(path, first, count), advance)
    return index, facts


def _measure(index: Any, path: Path, first: int, heads: Heads, recall: float) -> dict[str, Any]:
    """Choose how many rows are compared exactly, then nprobe or efSearch, by the photos held out (those from first on).

    Their true neighbours are the best by all three parts, with the default weights, of many by an exact search of the
    image parts: measured on the embedded gallery, those are the best of all rows.
    """
    queries = _rows(path, slice(first, None))
    if not len(queries):
        return {"effort_name": approximate.effort_name(index), "effort": 64, "refine": 5, "queries": 0}
    image, k = unit(queries), min(K, first)
    many = scan(image, _numbered(path, first), min(first, TRUTH * k))[1]
    photo = heads(queries.astype(np.float32)) * np.asarray(Tuning().search_weights, np.float32)[:, None]
    truth = np.empty((len(queries), k), np.int64)
    for i, rows in enumerate(many):  # a few hundred photos, whose candidates would be too many at once
        scores = np.einsum("pd,mpd->m", photo[i], heads(_rows(path, rows).astype(np.float32)))
        truth[i] = rows[np.argsort(-scores, kind="stable")[:k]]
    # Half of what may be missed is left to the approximate search.
    enough = [r for r in REFINE if approximate.recall_at(many[:, : r * k], truth) >= (1 + recall) / 2]
    refine = enough[0] if enough else REFINE[-1]
    effort, reached = approximate.tune(index, image, truth, min(first, refine * k), recall)
    if reached < recall:
        print(f"index: finds {reached:.4f} of the true neighbours, less than asked: try SQfp16", file=sys.stderr)
    measured = {"effort_name": approximate.effort_name(index), "effort": effort, "refine": refine}
    return measured | {"recall@20": round(reached, 4), "queries": len(queries)}


def _usable(photos_file: Path, embeddings_file: Path) -> tuple[pa.Table, NDArray[np.bool_], dict[str, Any]]:
    """All photos with the columns of an index, which have a picture and a place, and why others do not. GeoError."""
    import pyarrow.compute as pc

    photos, embeddings = read_table(photos_file), read_table(embeddings_file, ["id", "digest", "error"])
    if not photos["id"].equals(embeddings["id"]):
        raise GeoError(f"{embeddings_file.name} is not of the photos in {photos_file.name}: run encode again")
    seen = pc.is_null(embeddings["error"]).to_numpy(zero_copy_only=False)
    usable = seen & pc.is_valid(photos["lat"]).to_numpy(zero_copy_only=False)
    if not usable.any():
        raise GeoError("no photo has both a readable picture and coordinates: nothing to index")
    why = {"without a readable picture": int((~seen).sum()), "without coordinates": int((seen & ~usable).sum())}
    left_out = {
        "left_out": int((~usable).sum()),
        "left_out_why": {reason: count for reason, count in why.items() if count},
        # What became no photo at all: not among the number above.
        "source_left_out": {reason: entry["photos"] for reason, entry in read_left_out(photos).reasons.items()},
    }
    return photos.append_column("digest", embeddings["digest"]).select(ROW_COLUMNS), usable, left_out


def _write_projections(path: Path, table: Path, usable: NDArray[np.bool_], held: NDArray[np.bool_]) -> int:
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


def _sample(path: Path, first: int, count: int) -> Vectors:
    rows = np.sort(np.random.default_rng(1).choice(first, min(count, first), replace=False))
    return unit(_rows(path, rows))


def _blocks(path: Path, first: int, last: int) -> Iterator[Vectors]:
    for start in range(first, last, BLOCK):
        yield unit(_rows(path, slice(start, min(start + BLOCK, last))))


def _rows(path: Path, rows: slice | NDArray[np.int64]) -> NDArray[np.float16]:
    """Projections of some rows; the file is mapped anew each time, or all that was ever read would stay in memory."""
    read: NDArray[np.float16] = np.array(np.load(path, mmap_mode="r", allow_pickle=False)[rows])
    return read


def _numbered(path: Path, last: int) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
    for i, block in enumerate(_blocks(path, 0, last)):
        yield np.arange(i * BLOCK, i * BLOCK + len(block)), block


def _thumbnails_sha256(table: Path | None) -> dict[str, str]:
    return {} if table is None else {"thumbnails": file_sha256(table)}


def _keep_thumbnails(folder: Path, table: Path | None, orders: list[NDArray[np.bool_]]) -> dict[str, Any]:
    """Write the thumbnails of a stage table, if any -> what the manifest says of them."""
    if table is None:
        return {}
    write_thumbnails(folder, table, orders)
    return {"thumbnails": read_json(table.with_suffix(".json"))["recipe"]["size"]}


def _keep_cells(folder: Path, rows: pa.Table, embed: Embed | None) -> dict[str, Any]:
    """Write the embeddings of the cells around the gallery, if asked -> what the manifest says of them."""
    if embed is None:
        return {}
    vectors = cell_vectors(np.column_stack([rows["lat"].to_numpy(), rows["lon"].to_numpy()]), embed)

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)

    write_whole(folder / CELLS, write)
    return {"cells": len(vectors)}


def _write_vectors(index: Any, path: Path) -> None:
    import faiss

    try:
        faiss.write_index(index, str(path))
    except RuntimeError:  # what FAISS makes of a full disk or a folder that may not be written
        raise OSError("the disk is full or the folder is read-only") from None
