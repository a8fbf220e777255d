"""A region restricts decoding to some cells: it can only end in one of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.geo.sphere import haversine_km


class Region:
    """This class holds some cells of a tokenizer's level, and says of a prefix which next tokens lead to one of them.

    Cells are counted along the Hilbert curves of the six faces; the valid ones are kept as ranges of these numbers,
    first (R,) and end (R,), apart and in order.
    """

    def __init__(self, tokenizer: S2Tokenizer, ranges: NDArray[np.int64]) -> None:
        """Take ranges (N, 2) of the valid cells' numbers, at least one, in any order; they may touch or overlap."""
        first, end = ranges[ranges[:, 0].argsort()].T
        reached = np.maximum.accumulate(end)
        gaps = np.flatnonzero(first[1:] > reached[:-1])
        self.sizes = tokenizer.vocab_sizes
        self.first = torch.from_numpy(first[np.append(0, gaps + 1)])
        self.end = torch.from_numpy(reached[np.append(gaps, -1)])

    @classmethod
    def within(cls, tokenizer: S2Tokenizer, lat: float, lon: float, km: float) -> Region:
        """Return the cells whose center lies within ``km`` of a place, and the cell of the place itself."""
        own = np.ravel_multi_index(tuple(tokenizer.encode(lat, lon)), tokenizer.vocab_sizes)
        return cls(tokenizer, np.concatenate([[[own, own + 1]], *_disk(tokenizer, lat, lon, km=km)]))

    def allowed(self, tokens: Tensor) -> Tensor:
        """Return a mask (..., V_t) of the next tokens that lead from prefixes (..., t) to a valid cell."""
        t = tokens.shape[-1]
        weights = [math.prod(self.sizes[i + 1 :]) for i in range(len(self.sizes))]
        prefix = (tokens * torch.tensor(weights[:t], dtype=torch.int64, device=tokens.device)).sum(-1)
        start = prefix[..., None] + torch.arange(self.sizes[t], device=tokens.device) * weights[t]
        self.first, self.end = self.first.to(tokens.device), self.end.to(tokens.device)
        behind = torch.searchsorted(self.end, start, right=True)
        return behind < torch.searchsorted(self.first, start + weights[t])


def _disk(tokenizer: S2Tokenizer, lat: float, lon: float, km: float) -> list[NDArray[np.int64]]:
    """Return ranges (N, 2) of the cells with their center within ``km``, found from coarse prefixes to fine.

    A prefix wholly inside is one range, one wholly outside is dropped: only the border is followed down.
    """
    rows, ranges = np.zeros((1, 0), np.int64), []
    for t, (size, level) in enumerate(zip(tokenizer.vocab_sizes, tokenizer.levels, strict=True)):
        rows = np.concatenate([np.repeat(rows, size, axis=0), np.tile(np.arange(size), len(rows))[:, None]], axis=1)
        below = math.prod(tokenizer.vocab_sizes[t + 1 :])
        # No cell reaches further from its center than this: 7,850 km a face edge, halved at every level, with room.
        reach = 0.0 if t + 1 == tokenizer.length else 9_000.0 / 2**level
        away = haversine_km(*tokenizer.decode(rows), lat, lon)
        whole = away <= km - reach
        first = np.ravel_multi_index(tuple(rows[whole].T), tokenizer.vocab_sizes[: t + 1]) * below
        ranges.append(np.stack([first, first + below], axis=-1))
        rows = rows[~whole & (away <= km + reach)]
    return ranges
