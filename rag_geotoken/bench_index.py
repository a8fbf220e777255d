"""How fast and how right approximate search is: `rag-geotoken bench index`, against Flat in the same run."""

from __future__ import annotations

import importlib.util
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken import approximate
from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.files import write_json
from rag_geotoken.index import BLOCK
from rag_geotoken.progress import progress_bar
from rag_geotoken.tables import versions

Vectors = NDArray[np.float32]
K, QUERIES, SEED = 20, 1000, 0
COPIES = 4  # of the GeoCLIP gallery: itself and three jittered by a few kilometres
BUILD_ROWS, BUILD_DIM = 1_000_000, 768
Log = Callable[[str], None]


def run_bench(out: Path | None, weights: Path, views: int, build_rows: int, log: Log) -> dict[str, Any]:
    """Everything -> what ``index.json`` holds; ``build_rows`` 0 leaves the large build out."""
    result: dict[str, Any] = {"seed": SEED, "k": K, "threads": os.cpu_count(), "versions": versions()}
    gallery = geoclip_gallery(log)
    if gallery is not None:
        result["geoclip-locations"] = compare(gallery, 0.99, 40.0, log)
    result["views"] = compare(view_embeddings(weights, views, log), 0.98, 3.0, log)
    if build_rows:
        result["build"] = build(build_rows, BUILD_DIM, log)
    if out is not None:
        write_json(out, result)
    return result


def compare(vectors: Vectors, recall: float, times: float, log: Log) -> dict[str, Any]:
    """Flat against the chosen factory on vectors (N, dim) of length one, queries held out of both -> the figures."""
    import faiss

    drawn = np.random.default_rng(SEED).permutation(len(vectors))
    tuning, queries, rows = (vectors[at] for at in np.split(drawn, [QUERIES // 2, QUERIES // 2 + QUERIES]))
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(rows)
    factory = approximate.choose_factory(max(len(rows), approximate.EXACT_ROWS + 1), vectors.shape[1], recall=recall)
    begun = time.perf_counter()
    index = approximate.train(factory, rows[: approximate.sample_size(factory, len(rows), vectors.shape[1])])
    approximate.add(index, (rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK)), lambda _: None)
    seconds = time.perf_counter() - begun
    # A little more than asked on the tuning queries, since others are measured.
    value, _ = approximate.tune(index, tuning, flat.search(tuning, K)[1], K, (1 + 2 * recall) / 3)
    parameters = approximate.effort(index, value)
    truth = flat.search(queries, K)[1]
    found = index.search(queries, K, params=parameters)[1]
    slow = min(_seconds(lambda: flat.search(queries, K)) for _ in range(3))
    fast = min(_seconds(lambda: index.search(queries, K, params=parameters)) for _ in range(5))
    figures = {
        "rows": len(rows),
        "dim": vectors.shape[1],
        "factory": factory,
        approximate.effort_name(index): value,
        "build_seconds": round(seconds, 1),
        "recall@20": round(approximate.recall_at(found, truth), 4),
        "flat_queries_per_second": round(len(queries) / slow),
        "queries_per_second": round(len(queries) / fast),
        "times_flat": round(slow / fast, 1),
        "bar": {"recall@20": recall, "times_flat": times},
    }
    figures["met"] = figures["recall@20"] >= recall and figures["times_flat"] >= times
    log(" ".join(f"{name}={value}" for name, value in figures.items()))
    return figures


def build(rows: int, dim: int, log: Log) -> dict[str, Any]:
    """Train and fill an index of so many random vectors, block by block -> seconds and peak memory above the data."""
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as folder:
        data = np.lib.format.open_memmap(Path(folder) / "data.npy", "w+", np.float16, (rows, dim))
        for start in range(0, rows, BLOCK):
            data[start : start + BLOCK] = rng.standard_normal((len(data[start : start + BLOCK]), dim), np.float32)
        data.flush()
        before = _peak_bytes()
        factory = approximate.choose_factory(rows, dim)
        begun = time.perf_counter()
        at = np.sort(rng.choice(rows, approximate.sample_size(factory, rows, dim), replace=False))
        index = approximate.train(factory, data[at].astype(np.float32))
        trained = time.perf_counter() - begun
        blocks = (data[start : start + BLOCK].astype(np.float32) for start in range(0, rows, BLOCK))
        approximate.add(index, blocks, lambda _: None)
        seconds = time.perf_counter() - begun
        peak = _peak_bytes()
    figures: dict[str, Any] = {
        "rows": rows,
        "dim": dim,
        "factory": factory,
        "train_seconds": round(trained, 1),
        "build_seconds": round(seconds, 1),
        "rows_per_second_added": round(rows / max(seconds - trained, 1e-9)),
        "data_bytes": rows * dim * 2,
        "peak_bytes": peak,
        "peak_bytes_before": before,
        "above_data_bytes": peak - rows * dim * 2,
        "bar": {"above_data_bytes": 3 * 10**9},
    }
    figures["met"] = figures["above_data_bytes"] < 3 * 10**9
    log(" ".join(f"{name}={value}" for name, value in figures.items()))
    return figures


def view_embeddings(weights: Path, views: int, log: Log) -> Vectors:
    """Image embeddings of gallery views (N, dim)."""
    from rag_geotoken.pictures import load_pictures
    from rag_geotoken.sources import read_source

    alignment = GeoAlignment.from_pretrained(weights)
    images = read_source(f"blue-marble:gallery,n={views}")["image"].to_pylist()
    log(f"encoding {len(images)} views")
    parts = [alignment.project(load_pictures(images[i : i + 512], 64)[0]) for i in range(0, len(images), 512)]
    features = np.concatenate(parts)
    unit: Vectors = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit


def geoclip_gallery(log: Log) -> Vectors | None:
    """Location embeddings (400,000, 512) of GeoCLIP's gallery and copies jittered by about 2 km; or None."""
    import torch

    found = importlib.util.find_spec("geoclip")
    if found is None or found.origin is None:
        log("the package geoclip is not installed: its gallery is left out (pip install geoclip)")
        return None
    from rag_geotoken.convert import convert_geoclip  # type: ignore[attr-defined,unused-ignore]
    from rag_geotoken.location import LocationEncoder  # type: ignore[import-not-found,unused-ignore]

    folder = Path(found.origin).parent / "model"
    places = np.loadtxt(folder / "gps_gallery" / "coordinates_100K.csv", delimiter=",", skiprows=1)
    rng = np.random.default_rng(SEED)
    lat_lon = np.concatenate([places, *(places + rng.normal(0, 0.02, places.shape) for _ in range(COPIES - 1))])
    lat_lon = np.column_stack([lat_lon[:, 0].clip(-90, 90), (lat_lon[:, 1] + 180) % 360 - 180])
    with tempfile.TemporaryDirectory() as converted:
        convert_geoclip(folder / "weights", Path(converted))
        encoder = LocationEncoder.from_pretrained(converted)
    with torch.inference_mode(), progress_bar(len(lat_lon), "bench: GeoCLIP's places") as advance:
        blocks = []
        for start in range(0, len(lat_lon), 4096):
            block = encoder(torch.from_numpy(lat_lon[start : start + 4096]))
            blocks.append(torch.nn.functional.normalize(block, dim=-1))
            advance(len(block))
    result: Vectors = torch.cat(blocks).numpy()
    return result


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _peak_bytes() -> int:
    """The most memory this process has ever had, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
