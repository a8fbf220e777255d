"""These functions search every row exactly, block by block, without an index."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Numbers = NDArray[np.int64]
Ranking = tuple[Vectors, Numbers]
"""Scores and row numbers (B, k), best first."""


def top_k(scores: Vectors, rows: Numbers, k: int) -> Ranking:
    """Return the k highest scores (B, M) of each query and their rows, best first; equal scores keep their order."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def scan(queries: Vectors, blocks: Iterable[tuple[Numbers, Vectors]], k: int) -> Ranking:
    """Return the k rows of the highest inner products with each query (B, dim).

    blocks: row numbers (R,) and their vectors (R, dim), one block in memory at a time. With fewer than k rows in all,
    the remaining scores are -inf and the remaining rows -1.
    """
    import faiss

    scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    for block, vectors in blocks:
        products, at = faiss.knn(queries, vectors, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = top_k(np.concatenate([scores, products], 1), np.concatenate([rows, block[at]], 1), k)
    return scores, rows
