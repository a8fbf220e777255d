"""Approximate search with FAISS: these functions choose, train and fill an index, and measure how far it must look."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.index.exact import Vectors

GIB = 2**30
EXACT_ROWS = 65_536  # up to here an exact search is quick enough and nothing needs training
GRAPH_LISTS = 8192  # from so many lists on, a graph finds the nearest of them sooner than comparing with all
SAMPLE_BYTES = 2 * GIB  # of training vectors, whatever the dimension
ROUNDS = 10  # of k-means: what later ones gain is lost in the choice of nprobe


def choose_factory(rows: int, dim: int, memory_gib: float = 16.0, recall: float = 0.95) -> str:
    """Choose a FAISS factory for so many vectors that stays within so much memory, after autofaiss' rules.

    Exact ``Flat`` on all three parts (12 * dim bytes a row) while rows are few, or where nothing may be missed
    (``recall`` 1), if it fits; else :func:`inverted_factory`, whose nprobe is what ``recall`` decides. Raises GeoError
    when nothing fits.
    """
    if (rows <= EXACT_ROWS or recall >= 1) and 12 * dim * rows <= memory_gib * GIB:
        return "Flat"
    return inverted_factory(rows, dim, memory_gib)


def inverted_factory(rows: int, dim: int, memory_gib: float = 16.0) -> str:
    """Choose inverted lists of half precision, of 8 bits or of product codes, the first that fits, or raise GeoError.

    They look at the image part alone, and the best of what they find are compared exactly. A graph (HNSW) is never
    chosen: it is no faster at the same recall on the galleries of ``bench index``, it takes longer to build, and one of
    near-duplicates falls apart into islands that no effort reaches, while more lists always find more.
    """
    lists = inverted_lists(rows)
    coarse = f"IVF{lists}_HNSW32" if lists >= GRAPH_LISTS else f"IVF{lists}"
    budget = (memory_gib * GIB - 4 * dim * lists) / rows - 8  # bytes a row, less its number and the lists' centers
    for bytes_, codes in ((2 * dim, "SQfp16"), (dim, "SQ8")):
        if bytes_ <= budget:
            return f"{coarse},{codes}"
    fits = [size for size in range(8, dim // 2 + 1, 8) if dim % size == 0 and size <= budget]
    if not fits:
        raise GeoError(
            f"{rows} rows of {dim} numbers do not fit into {memory_gib:g} GiB in any form: allow more memory"
        )
    return f"OPQ{fits[-1]},{coarse},PQ{fits[-1]}"


def inverted_lists(rows: int) -> int:
    """Return how many lists to make: the power of two nearest to 4 * sqrt(rows), the fewest that FAISS advises."""
    return 1 << max(4, round(math.log2(4.0 * math.sqrt(rows))))


def sample_size(factory: str, rows: int, dim: int) -> int:
    """Return how many vectors to train on: 40 a list (FAISS asks for 39), at least 65,536, within ``SAMPLE_BYTES``."""
    if factory.startswith("HNSW"):
        return min(rows, 1000)  # half precision learns nothing, but wants to be trained
    lists = int(factory.split("IVF")[1].split(",")[0].split("_")[0]) if "IVF" in factory else 0
    return int(min(rows, max(40 * lists, 65_536), SAMPLE_BYTES // (4 * dim)))


def seconds_to_train(sample: Vectors, lists: int) -> float:
    """Estimate how long k-means will take over a sample (N, dim), from the time of a small part of it."""
    import faiss

    few = sample[: max(256, len(sample) // 200)]
    begun = time.perf_counter()
    faiss.knn(few, sample[:lists], 1, metric=faiss.METRIC_INNER_PRODUCT)
    return (time.perf_counter() - begun) * ROUNDS * len(sample) / len(few)


def train(factory: str, sample: Vectors, say: Callable[[str], object]) -> Any:
    """Return an empty index of that factory, inner product, trained on the sample (N, dim), or raise GeoError.

    ``say`` hears in one line what is done and about how long it takes.
    """
    import faiss

    try:
        index: Any = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise GeoError(f"{factory!r} is no FAISS factory for {sample.shape[1]} numbers: try HNSW32,SQfp16") from None
    lists, about = inverted(index), ""
    if lists is not None:
        if len(sample) < lists.nlist:
            raise GeoError(f"{factory} needs at least {lists.nlist} rows to train on, there are {len(sample)}")
        lists.cp.niter = ROUNDS
        lists.cp.max_points_per_centroid = 1 << 20  # the sample has its size already
        if hasattr(faiss, "StandardGpuResources"):
            lists.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(lists.d))
        about = f", about {seconds_to_train(sample, lists.nlist):.0f} s for the lists"
    if factory.startswith("OPQ"):
        turn: Any = faiss.downcast_VectorTransform(index.chain.at(0))
        turn.niter = 10  # its 50 rounds take hours at 768 numbers
    say(f"{factory} learns from {len(sample)} vectors{about}")
    index.train(sample)
    return index


def inverted(index: Any) -> Any:
    """Return the part of an index that holds inverted lists, or None."""
    import faiss

    return faiss.try_extract_index_ivf(index)


def effort_name(index: Any) -> str:
    """Name the number that says how far a search looks: nprobe, efSearch, or none."""
    if inverted(index) is not None:
        return "nprobe"
    return "efSearch" if hasattr(index, "hnsw") else ""


def effort(index: Any, value: int, selector: Any = None) -> Any:
    """Return search parameters: so many lists or graph nodes, only rows that a faiss.IDSelector lets through."""
    faiss: Any = importlib.import_module("faiss")  # its parameters' Python side takes names that its types do not know
    if inverted(index) is not None:
        inner = faiss.SearchParametersIVF(nprobe=value, sel=selector)
    elif hasattr(index, "hnsw"):
        inner = faiss.SearchParametersHNSW(efSearch=value, sel=selector)
    else:
        inner = faiss.SearchParameters(sel=selector) if selector else None  # a flat index on a GPU takes none
    return faiss.SearchParametersPreTransform(index_params=inner) if hasattr(index, "chain") else inner


def efforts(index: Any) -> Iterator[int]:
    """Return the values of nprobe or efSearch to try, growing by half and less each time."""
    lists = inverted(index)
    most = lists.nlist if lists is not None else 1024
    value = 1 if lists is not None else 24
    while value < most:
        yield value
        value = max(value + 1, int(value * 1.4))
    yield most


def recall_at(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Return the share of each query's true rows (Q, K) that are among the retrieved ones (Q, M)."""
    return float((truth[:, :, None] == found[:, None, :]).any(axis=2).mean())


def tune(index: Any, queries: Vectors, truth: NDArray[np.int64], k: int, recall: float) -> tuple[int, float]:
    """Find the least nprobe or efSearch that retrieves the share ``recall`` of the true rows (Q, T), and its recall.

    Where none does, the largest.
    """
    reached = 0, 0.0
    for value in efforts(index):
        found = index.search(queries, k, params=effort(index, value))[1]
        reached = value, recall_at(found, truth)
        if reached[1] >= recall or not effort_name(index):
            break
    return reached


def open_index(path: Path, size: int, factory: str) -> Any:
    """Read a FAISS file of so many bytes, mapped into memory where its kind allows, or raise GeoError.

    No vector or loop that the file asks for may be larger than the file itself.
    """
    import faiss

    faiss.set_deserialization_vector_byte_limit(size + 1)
    faiss.set_deserialization_loop_limit(size + 1)
    flags = faiss.IO_FLAG_MMAP if "IVF" in factory else faiss.IO_FLAG_MMAP_IFC
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise GeoError(f"{path.name} in {path.parent} cannot be read: {str(error).splitlines()[0]}") from None


def on_gpu(index: Any) -> Any:
    """Return the same index on all GPUs, where faiss-gpu is installed and has its kind, else itself."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or hasattr(index, "hnsw"):
        return index
    return faiss.index_cpu_to_all_gpus(index)
