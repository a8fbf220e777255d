"""These functions choose, train, tune and open a FAISS index for approximate search."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.index.exact import Numbers, Vectors

GIB = 2**30
EXACT_ROWS = 65_536  # up to this many, an exact search is quick enough and nothing needs training
GRAPH_LISTS = 8192  # from this many lists on, a graph finds the nearest of them sooner than comparing with all
SAMPLE_BYTES = 2 * GIB  # of training vectors, whatever the dimension
ROUNDS = 10  # of k-means: what later ones gain is lost in the choice of nprobe


def choose_factory(rows: int, dim: int, memory_gib: float = 16.0, recall: float = 0.95) -> str:
    """Return a FAISS factory string for so many vectors within a memory limit, after the rules of autofaiss.

    Exact ``Flat`` on all three parts (12 * dim bytes per row) while rows are few, or for ``recall`` 1, if it fits; else
    :func:`inverted_factory`, whose nprobe ``recall`` decides. Raises GeoError when nothing fits.
    """
    if (rows <= EXACT_ROWS or recall >= 1) and 12 * dim * rows <= memory_gib * GIB:
        return "Flat"
    return inverted_factory(rows, dim, memory_gib)


def inverted_factory(rows: int, dim: int, memory_gib: float = 16.0) -> str:
    """Return the factory of inverted lists with the most precise codes that fit: fp16, 8 bits, or product codes.

    The lists hold the image part alone; the best rows they return are compared exactly. A graph (HNSW) is never chosen:
    on the galleries of ``bench index`` it is no faster at the same recall and takes longer to build, and a graph of
    near-duplicates falls apart into islands that no efSearch reaches. Raises GeoError when nothing fits.
    """
    lists = inverted_lists(rows)
    coarse = f"IVF{lists}_HNSW32" if lists >= GRAPH_LISTS else f"IVF{lists}"
    budget = (memory_gib * GIB - 4 * dim * lists) / rows - 8  # bytes per row, less its number and the lists' centers
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
    """Return the number of lists: the power of two nearest to 4 * sqrt(rows), the least of FAISS' guidelines."""
    return 1 << max(4, round(math.log2(4.0 * math.sqrt(rows))))


def sample_size(factory: str, rows: int, dim: int) -> int:
    """Return how many vectors to train on: 40 a list (FAISS asks for 39), at least 65,536, within ``SAMPLE_BYTES``."""
    if factory.startswith("HNSW"):
        return min(rows, 1000)  # half precision learns nothing, but wants to be trained
    lists = int(factory.split("IVF")[1].split(",")[0].split("_")[0]) if "IVF" in factory else 0
    return int(min(rows, max(40 * lists, 65_536), SAMPLE_BYTES // (4 * dim)))


def train(factory: str, sample: Vectors, say: Callable[[str], object]) -> Any:
    """Return an empty inner-product index of a FAISS factory, trained on a sample (N, dim).

    say: called with one line on what is trained and about how long that takes. Raises GeoError for a string that is no
    factory, or a sample with fewer rows than lists.
    """
    import faiss

    try:
        index: Any = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise GeoError(f"{factory!r} is no FAISS factory for {sample.shape[1]} numbers: try HNSW32,SQfp16") from None
    lists, duration = inverted(index), ""
    if lists is not None:
        if len(sample) < lists.nlist:
            raise GeoError(f"{factory} needs at least {lists.nlist} rows to train on, there are {len(sample)}")
        lists.cp.niter = ROUNDS
        lists.cp.max_points_per_centroid = 1 << 20  # the sample has its size already
        if hasattr(faiss, "StandardGpuResources"):
            lists.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(lists.d))
        # The time of k-means follows from that of a small part of one round.
        few, begun = sample[: max(256, len(sample) // 200)], time.perf_counter()
        faiss.knn(few, sample[: lists.nlist], 1, metric=faiss.METRIC_INNER_PRODUCT)
        seconds = (time.perf_counter() - begun) * ROUNDS * len(sample) / len(few)
        duration = f", about {seconds:.0f} s for the lists"
    if factory.startswith("OPQ"):
        rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
        rotation.niter = 10  # its 50 rounds take hours at 768 numbers
    say(f"{factory} learns from {len(sample)} vectors{duration}")
    index.train(sample)
    return index


def inverted(index: Any) -> Any:
    """Return the part of a FAISS index that holds inverted lists, or None."""
    import faiss

    return faiss.try_extract_index_ivf(index)


def effort_name(index: Any) -> str:
    """Return the name of the parameter that trades time for recall: nprobe, efSearch, or nothing."""
    if inverted(index) is not None:
        return "nprobe"
    return "efSearch" if hasattr(index, "hnsw") else ""


def effort(index: Any, value: int, keep: NDArray[np.bool_] | None = None) -> Any:
    """Return FAISS search parameters: nprobe or efSearch, and a mask (rows,) of the rows that may be returned."""
    faiss: Any = importlib.import_module("faiss")  # its type stubs do not know the arguments of these constructors
    selector = None if keep is None else faiss.IDSelectorBitmap(np.packbits(keep, bitorder="little"))
    if inverted(index) is not None:
        parameters = faiss.SearchParametersIVF(nprobe=value, sel=selector)
    elif hasattr(index, "hnsw"):
        parameters = faiss.SearchParametersHNSW(efSearch=value, sel=selector)
    else:
        parameters = faiss.SearchParameters(sel=selector) if selector else None  # a flat index on a GPU takes none
    return faiss.SearchParametersPreTransform(index_params=parameters) if hasattr(index, "chain") else parameters


def recall_at(rows: Numbers, truth: Numbers) -> float:
    """Return the share of each query's true rows (Q, K) that are among the rows (Q, M) of a search."""
    return float((truth[:, :, None] == rows[:, None, :]).any(axis=2).mean())


def tune(index: Any, queries: Vectors, truth: Numbers, k: int, recall: float) -> tuple[int, float]:
    """Return the least nprobe or efSearch whose k results reach the recall of the true rows (Q, T), and that recall.

    Where none reaches it, return the largest and its recall.
    """
    lists = inverted(index)
    value, largest = (24, 1024) if lists is None else (1, lists.nlist)
    while True:
        rows = index.search(queries, k, params=effort(index, value))[1]
        reached = recall_at(rows, truth)
        if reached >= recall or value >= largest or not effort_name(index):
            return value, reached
        value = min(max(value + 1, int(value * 1.4)), largest)


def open_index(path: Path, size: int, factory: str) -> Any:
    """Read a FAISS file of ``size`` bytes, mapped into memory where its kind allows.

    No vector or loop that the file asks for may be larger than the file itself. Raises GeoError for a broken file.
    """
    import faiss

    faiss.set_deserialization_vector_byte_limit(size + 1)
    faiss.set_deserialization_loop_limit(size + 1)
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP if "IVF" in factory else faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise GeoError(f"{path.name} in {path.parent} cannot be read: {str(error).splitlines()[0]}") from None
