"""A large index built as `rag-geotoken index build` builds it, in a process of its own, and a plan for larger ones."""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.index import approximate
from rag_geotoken.index.build import K, Plan, build_index
from rag_geotoken.index.files import PROJECTIONS, ROWS
from rag_geotoken.index.geo_index import BLOCK, GeoIndex
from rag_geotoken.storage.parquet import fixed_list, write_tables

Vectors = NDArray[np.float32]
SEED, LATENT, QUERIES = 0, 16, 256
BAR = 3 * 10**9  # bytes above the data
PLANS = ((5_000_000, 4.0), (5_000_000, 16.0), (100_000_000, 16.0), (100_000_000, 192.0))  # rows, GiB
PILOT, CODED = 65_536, 10_240  # rows that the rates of a plan's parts, and the training of codes, are measured on


def build(rows: int, dim: int) -> dict[str, Any]:
    """Build and search an index of so many rows -> figures of it and the rates that :func:`plan` needs.

    ``peak_bytes`` is the most that the building process ever had in memory: Python, libraries, index and mapped files;
    above the data means without rows * dim half-precision numbers, the size of the projections.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_stage_tables(Path(folder), rows, dim)
        # A process of its own, so that its peak is that of the build.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            facts, peak, before = pool.submit(_build, Path(folder), dim).result()
        figures = {name: facts[name] for name in ("rows", "dim", "factory", "trained_on", "recall@20", "effort")}
        figures |= {name: facts[name] for name in ("train_seconds", "add_seconds", "build_seconds", "memory_bytes")}
        data = rows * dim * 2
        figures |= {"data_bytes": data, "peak_bytes": peak, "peak_bytes_before": before}
        figures |= {"above_data_bytes": peak - data, "bar": {"above_data_bytes": BAR}, "met": peak - data < BAR}
        return figures | _searched(Path(folder) / "index", dim)


def write_stage_tables(folder: Path, rows: int, dim: int) -> None:
    """Photos and projections as the stages write them, of random vectors that have 16 degrees of freedom.

    Independent numbers would have no neighbors to find; embeddings of photos have some tens of degrees of freedom.
    """
    import pyarrow as pa

    rng = np.random.default_rng(SEED)
    spread = rng.standard_normal((LATENT, dim)).astype(np.float32), rng.standard_normal((dim, dim)).astype(np.float32)

    def blocks() -> Iterator[tuple[list[str], NDArray[np.float16]]]:
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            bent = np.tanh(rng.standard_normal((count, LATENT)).astype(np.float32) @ spread[0] / 2)
            ids = [f"{number:09d}" for number in range(start, start + count)]
            yield ids, (bent @ spread[1] / np.sqrt(dim)).astype(np.float16)

    def photos() -> Iterator[pa.Table]:
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            ids = pa.array([f"{number:09d}" for number in range(start, start + count)])
            lat, lon = rng.uniform(-90, 90, count), rng.uniform(-180, 180, count)
            words = pa.nulls(count, pa.string())
            yield pa.table({"id": ids, "image": ids, "lat": lat, "lon": lon, "place": words, "author": words})

    write_tables(folder / "photos.parquet", photos())
    write_tables(
        folder / "projections.parquet",
        (
            pa.table(
                {
                    "id": ids,
                    "projection": fixed_list(block),
                    "digest": [rng.bytes(32).hex() for _ in ids],
                    "error": pa.nulls(len(ids), pa.string()),
                }
            )
            for ids, block in blocks()
        ),
    )


def _heads(dim: int) -> Callable[[Vectors], Vectors]:
    """G3's heads with random weights."""
    import torch

    from rag_geotoken.encoders.alignment import G3, GeoAlignment

    torch.manual_seed(SEED)
    return GeoAlignment(replace(G3, dim=dim)).eval().heads


def _build(folder: Path, dim: int) -> tuple[dict[str, Any], int, int]:
    """The manifest, and this process' peak of memory after and before."""
    import pyarrow.parquet as pq

    heads, before = _heads(dim), _peak_bytes()
    tables = folder / "photos.parquet", folder / "projections.parquet"
    plan = Plan(approximate.inverted_factory(pq.read_metadata(tables[0]).num_rows, dim))
    return build_index(folder / "index", *tables, "bench", plan=plan, heads=heads), _peak_bytes(), before


def _peak_bytes() -> int:
    """The most memory this process has ever had, mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage tells the parent's, where that was larger
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _searched(folder: Path, dim: int) -> dict[str, Any]:
    """Queries a second through the whole search, and of that the approximate one; bytes a row of the rows' table."""
    heads = _heads(dim)
    index = GeoIndex.load(folder, heads)
    assert index.projections is not None
    image = np.asarray(index.projections[-QUERIES:], np.float32)  # those held out of tuning's gallery, now its rows
    queries, most = heads(image), K * index.manifest["refine"]
    alone = np.ascontiguousarray(queries[:, 0])
    parameters = approximate.effort(index.faiss_index, index.manifest["effort"])
    whole = best_seconds(lambda: index.search(queries, K, (1.0, 1.0, 1.0)))
    rough = best_seconds(lambda: index.faiss_index.search(alone, most, params=parameters))
    return {
        "queries_per_second": round(QUERIES / whole, 1),
        "queries_per_second_of_faiss": round(QUERIES / rough, 1),
        "compared_seconds": max(whole - rough, 0.0) / QUERIES,
        "refine": index.manifest["refine"],
        "rows_table_bytes": (folder / ROWS).stat().st_size,
        "projections_bytes": (folder / PROJECTIONS).stat().st_size,
    }


def plans(built: dict[str, Any], log: Callable[[str], None]) -> list[dict[str, Any]]:
    """What larger indexes would take, from a build's figures and the rates of their own parts on 65,536 rows."""
    dim = built["dim"]
    rng = np.random.default_rng(SEED)
    data = rng.standard_normal((PILOT, dim)).astype(np.float32)
    data /= np.linalg.norm(data, axis=1, keepdims=True)
    found = []
    for rows, memory in PLANS:
        found.append(plan(built, data, rows, memory))
        log("plan " + " ".join(f"{name}={value}" for name, value in found[-1].items()))
    return found


def plan(built: dict[str, Any], data: Vectors, rows: int, memory_gib: float) -> dict[str, Any]:
    """The factory for so many rows and what it would take.

    Training: the build's seconds, in proportion to sample * lists, and the codes' own. Adding and searching:
    one by one the measured times to find the lists, to encode a row, to compare a query with a code; as many lists
    looked into and rows compared exactly as the build chose, the lists as much longer as there are more rows a list.
    """
    dim = built["dim"]
    factory = approximate.choose_factory(rows, dim, memory_gib)
    lists, codes = approximate.inverted_lists(rows), factory.split(",")[-1]
    near = _near(data, lists, factory)
    coded = _coded(data, factory.startswith("OPQ"), codes)
    sample = approximate.sample_size(factory, rows, dim)
    work = sample * lists / (built["trained_on"] * approximate.inverted_lists(built["rows"]))
    train = built["train_seconds"] * work + coded["train_codes_seconds"]
    add = rows * (near["find_list_seconds"] + coded["encode_seconds"])
    looked = built["effort"] * rows / lists * coded["code_seconds"]
    row_bytes = {"SQfp16": 2 * dim, "SQ8": dim}.get(codes) or int(codes.removeprefix("PQ"))
    index_bytes = rows * (row_bytes + 8) + lists * 4 * dim
    other = (built["rows_table_bytes"] + built["projections_bytes"]) / built["rows"]
    return {
        "rows": rows,
        "memory_gib": memory_gib,
        "factory": factory,
        "index_gb": round(index_bytes / 1e9, 1),
        "disk_gb": round((index_bytes + rows * other) / 1e9, 1),
        "sample": sample,
        "train_hours": round(train / 3600, 2),
        "add_hours": round(add / 3600, 2),
        "nprobe": built["effort"],
        "queries_per_second": round(1 / (near["find_lists_seconds"] + looked + built["compared_seconds"]), 1),
        "measured": near | coded,
    }


def _near(data: Vectors, lists: int, factory: str) -> dict[str, float]:
    """Seconds to find a row's list, and a query's lists, among so many centers."""
    import faiss

    centers = faiss.IndexHNSWFlat(data.shape[1], 32) if "_HNSW32" in factory else faiss.IndexFlatIP(data.shape[1])
    centers.add(data[-lists:])
    some = data[:8192]
    row = best_seconds(lambda: centers.search(some, 1), 2)
    query = best_seconds(lambda: centers.search(some, 64), 2)
    return {"find_list_seconds": row / len(some), "find_lists_seconds": query / len(some)}


def _coded(data: Vectors, turned: bool, codes: str) -> dict[str, float]:
    """Seconds to train codes, to encode a row and put it in, and to compare a query with one code.

    Training OPQ takes too long to be measured: four rounds of k-means over a sixth of the sample stand for its 76 and
    the 25 of the codes (FAISS: 40 in OPQ's first round, 4 in each other one), a random rotation for its rotation.
    """
    import faiss

    index: Any = faiss.index_factory(data.shape[1], f"{'RR,' if turned else ''}IVF16,{codes}", 0)
    inner: Any = faiss.downcast_index(approximate.inverted(index))
    sample, times = data[:CODED], 1.0
    if hasattr(inner, "pq"):
        inner.pq.cp.niter = 4
        times = (40 + 4 * (approximate.ROUNDS - 1) + 25) / 4 * PILOT / CODED
    begun = time.perf_counter()
    index.train(sample)
    train = (time.perf_counter() - begun) * times
    begun = time.perf_counter()
    index.add(data)
    add = (time.perf_counter() - begun) / len(data)
    queries, everything = data[:QUERIES], approximate.effort(index, 16)
    scan = best_seconds(lambda: index.search(queries, K, params=everything), 2)
    code = scan / (len(queries) * len(data))
    return {"train_codes_seconds": train, "encode_seconds": add, "code_seconds": code}


def best_seconds(work: Callable[[], object], times: int = 3) -> float:
    """The shortest of several runs: other work on the machine only ever adds."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)
