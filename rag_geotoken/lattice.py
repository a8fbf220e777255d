"""A lattice of valid cells: decoding inside it can only end in one of them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.errors import GeoError
from rag_geotoken.geo import haversine_km


class Lattice:
    """Some of the cells of a tokenizer's level, asked prefix by prefix which next tokens lead to one of them."""

    def __init__(self, tokenizer: S2Tokenizer, tokens: ArrayLike) -> None:
        """Tokens (N, T) of the valid cells, in any order. Raises GeoError when there is none or one is no cell."""
        rows = np.asarray(tokens)
        if not len(rows):
            raise GeoError("a lattice without a cell leaves nothing to decode: give at least one")
        rows = tokenizer.ids_to_tokens(tokenizer.tokens_to_ids(rows))  # refuses what is no cell of this level
        self.sizes = tokenizer.vocab_sizes
        self.cells = torch.from_numpy(np.unique(np.ravel_multi_index(tuple(rows.T), self.sizes)))

    @classmethod
    def within(cls, tokenizer: S2Tokenizer, lat: float, lon: float, km: float) -> Lattice:
        """The cells whose centre lies within ``km`` of a place, and the cell of the place itself."""
        # A disk touches a cell only if it touches the cell's parent: go down level by level, never over all cells.
        ids = _descend(tokenizer, lat, lon, km)
        return cls(tokenizer, np.concatenate([tokenizer.encode([lat], [lon]), ids]))

    def allowed(self, tokens: Tensor) -> Tensor:
        """Prefixes (..., t) -> which next tokens (..., V_t) lead to a valid cell."""
        t = tokens.shape[-1]
        prefix = torch.zeros(tokens.shape[:-1], dtype=torch.int64, device=tokens.device)
        for column, size in enumerate(self.sizes[:t]):
            prefix = prefix * size + tokens[..., column]
        below = int(np.prod(self.sizes[t + 1 :], dtype=np.int64))
        first = (prefix[..., None] * self.sizes[t] + torch.arange(self.sizes[t], device=tokens.device)) * below
        self.cells = self.cells.to(tokens.device)
        return torch.searchsorted(self.cells, first) < torch.searchsorted(self.cells, first + below)


def _descend(tokenizer: S2Tokenizer, lat: float, lon: float, km: float) -> NDArray[np.int64]:
    """Tokens (N, T) of the cells with their centre within ``km``."""
    rows = np.zeros((1, 0), np.int64)
    for t, (size, level) in enumerate(zip(tokenizer.vocab_sizes, tokenizer.levels, strict=True)):
        rows = np.concatenate([np.repeat(rows, size, axis=0), np.tile(np.arange(size), len(rows))[:, None]], axis=1)
        # No cell reaches further from its centre than this: 7,850 km a face edge, halved at every level, with room.
        reach = 0.0 if t + 1 == tokenizer.length else 9_000.0 / 2**level
        rows = rows[haversine_km(*tokenizer.decode(rows), lat, lon) <= km + reach]
    return rows
