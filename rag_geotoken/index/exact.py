"""Exact search needs no index: every row is compared, block by block, and the best k are kept."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


def scan(
    queries: Vectors, blocks: Iterable[tuple[NDArray[np.int64], Vectors]], k: int
) -> tuple[Vectors, NDArray[np.int64]]:
    """Return scores and rows (B, k) of the highest inner products with each query (B, dim), best first.

    blocks: row numbers (R,) and their vectors (R, dim), of which one at a time is in memory. Where there are fewer than
    k rows in all, the rest is -inf and -1.
    """
    import faiss

    scores = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    for rows, vectors in blocks:
        some, at = faiss.knn(queries, vectors, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, found = np.concatenate([scores, some], 1), np.concatenate([found, rows[at]], 1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, found = np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
    return scores, found
