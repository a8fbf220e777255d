"""Decoding: from a memory to cells. Pure and seeded: logits and token ids only, no files, no clock.

Keys and values of the memory are computed once a photo and shared by its beams or samples; those of the tokens so far
are kept from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken.token_model import TokenModel


@dataclass(frozen=True)
class Decoded:
    """Cells of each photo, best first: tokens (B, N, T) int64, log_prob (B, N) float32, untempered."""

    tokens: Tensor
    log_prob: Tensor


@torch.inference_mode()
def greedy(model: TokenModel, memory: Tensor) -> Decoded:
    """The likeliest token at every step, N = 1."""
    return beam(model, memory, 1)


@torch.inference_mode()
def beam(model: TokenModel, memory: Tensor, width: int) -> Decoded:
    """Beam search: the ``width`` likeliest prefixes are kept at every step; a width above the six faces is fine."""
    batch = len(memory)
    decoder = _Decoder(model, memory)
    tokens = torch.empty(batch, 1, 0, dtype=torch.int64)
    log_prob = torch.zeros(batch, 1)
    for _ in model.vocab_sizes:
        step = log_prob[:, :, None] + decoder.step(tokens).log_softmax(-1)
        log_prob, flat = step.flatten(1).topk(min(width, step[0].numel()))
        parent, token = flat // step.shape[-1], flat % step.shape[-1]
        decoder.reorder(parent)
        tokens = torch.cat([_pick(tokens, parent), token[..., None]], dim=-1)
    return Decoded(tokens, log_prob)


@torch.inference_mode()
def sample(
    model: TokenModel, memory: Tensor, n: int, temperature: float = 1.0, seed: int = 0, keys: list[int] | None = None
) -> Decoded:
    """``n`` samples a photo at a temperature, sorted by their untempered log-probability.

    The random numbers of a photo depend on the seed and on its key (its place in the batch unless given), not on the
    batch around it.
    """
    batch = len(memory)
    decoder = _Decoder(model, memory)
    chance = torch.from_numpy(_uniform(range(batch) if keys is None else keys, (n, len(model.vocab_sizes)), seed))
    tokens = torch.empty(batch, 1, 0, dtype=torch.int64)
    log_prob = torch.zeros(batch, n)
    for t in range(len(model.vocab_sizes)):
        logits = decoder.step(tokens)
        if t == 0:  # all samples of a photo start alike: one step serves them
            first = torch.zeros(batch, n, dtype=torch.int64)
            decoder.reorder(first)
            logits, tokens = _pick(logits, first), _pick(tokens, first)
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        token = (cumulative <= chance[:, :, t, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
        log_prob += logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]
        tokens = torch.cat([tokens, token[..., None]], dim=-1)
    log_prob, order = log_prob.sort(dim=1, descending=True, stable=True)
    return Decoded(_pick(tokens, order), log_prob)


class _Decoder:
    """One step at a time for N sequences a photo, the past kept."""

    def __init__(self, model: TokenModel, memory: Tensor) -> None:
        self.model = model
        self.memory = [block.memory_keys(memory) for block in model.blocks]
        self.past: list[tuple[Tensor, Tensor]] = []

    def step(self, tokens: Tensor) -> Tensor:
        """Tokens so far (B, N, t) -> logits of the next (B, N, V_t)."""
        t = tokens.shape[-1]
        states = self.model.embed(tokens)[..., -1, :]
        present = []
        for i, block in enumerate(self.model.blocks):
            query, key, value = block.self_keys(states[..., None, :])
            if self.past:
                key = torch.cat([self.past[i][0], key], dim=-2)
                value = torch.cat([self.past[i][1], value], dim=-2)
            present.append((key, value))
            states = block.attend(states[..., None, :], query, key, value)[..., 0, :]
            states = block.look_and_think(states, self.memory[i])
        self.past = present
        logits: Tensor = self.model.heads[t](self.model.norm(states))
        return logits

    def reorder(self, parent: Tensor) -> None:
        """Keep the past of the sequences (B, N) that go on."""
        self.past = [(_pick(key, parent), _pick(value, parent)) for key, value in self.past]


def _pick(values: Tensor, order: Tensor) -> Tensor:
    """Values (B, M, ...) at order (B, N) -> (B, N, ...)."""
    return values[torch.arange(len(values))[:, None], order]


def _uniform(keys: range | list[int], shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """(len(keys), *shape) uniform numbers, each key's own stream."""
    return np.stack([np.random.default_rng([seed, key]).random(shape, np.float32) for key in keys])
