"""All cells of a tiny token model, and their probabilities by teacher forcing."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken.tokens.model import TokenModel


@torch.no_grad()
def scored(model: TokenModel, memory: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (B, N) of tokens (B, N, T) by teacher forcing."""
    n = tokens.shape[1]
    flat = tokens.flatten(0, 1).clone()
    total = torch.zeros(len(flat))
    for t, logits in enumerate(model.logits(memory.repeat_interleave(n, dim=0), flat)):
        total += (logits / temperature).log_softmax(-1).gather(1, flat[:, t : t + 1])[:, 0]
    return total.view(-1, n)


def every_cell(model: TokenModel, batch: int) -> Tensor:
    """All sequences (B, 6 * 16 * ..., T), in order."""
    axes = torch.meshgrid(*(torch.arange(size) for size in model.vocab_sizes), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1).expand(batch, -1, -1)


def numbers(model: TokenModel, tokens: Tensor) -> NDArray[np.int64]:
    """The place of each sequence (..., T) in the order of :func:`every_cell`."""
    place: NDArray[np.int64] = np.ravel_multi_index(tuple(np.moveaxis(tokens.numpy(), -1, 0)), model.vocab_sizes)
    return place
