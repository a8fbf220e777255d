"""These functions decode a memory into cells. They are pure and seeded: logits and token ids only, no files, no clock.

Log-probabilities are always the model's own: neither tempered nor renormalized over what a truncation or a region
leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken.errors import GeoError
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.tokens.prefix_tree import PrefixTree
from rag_geotoken.tokens.region import Region


@dataclass(frozen=True)
class Decoded:
    """This class holds cells of each photo, best first: tokens (B, N, T) int64, log_prob (B, N) float32, untempered."""

    tokens: Tensor
    log_prob: Tensor


def greedy(model: TokenModel, memory: Tensor, region: Region | None = None) -> Decoded:
    """Take the likeliest token at every step, N = 1."""
    return beam(model, memory, 1, region=region)


@torch.inference_mode()
def beam(model: TokenModel, memory: Tensor, width: int, region: Region | None = None) -> Decoded:
    """Keep the ``width`` likeliest prefixes at every step; a width above the six faces is fine.

    Within a region of fewer than ``width`` cells, the rest of the beam repeats the best with a log-probability of
    minus infinity. Raises GeoError for a width below 1.
    """
    if width < 1:
        raise GeoError(f"a beam of width {width} holds nothing: give at least 1")
    tree = PrefixTree(model, memory)
    node = torch.zeros(len(memory), 1, dtype=torch.int64, device=memory.device)
    tokens, log_prob = node[..., None][..., :0], torch.zeros(node.shape, device=memory.device)
    for t, size in enumerate(model.vocab_sizes):
        step = log_prob[..., None] + tree.logits(t).float().log_softmax(-1)
        if region is not None:
            step = step.masked_fill(~region.allowed(tokens), -torch.inf)
        log_prob, flat = step.flatten(1).topk(min(width, step[0].numel()))
        parent, token = flat // size, flat % size
        tokens = torch.cat([pick(tokens, parent), token[..., None]], dim=-1)
        if t + 1 < len(model.vocab_sizes):
            node = tree.grow(pick(node, parent), token, t)
    return Decoded(torch.where(log_prob.isneginf()[..., None], tokens[:, :1], tokens), log_prob)


@torch.inference_mode()
def sample(
    model: TokenModel,
    memory: Tensor,
    n: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    keys: Sequence[int] | None = None,
    top_p: float = 1.0,
    epsilon: float = 0.0,
    region: Region | None = None,
) -> Decoded:
    """Draw ``n`` samples a photo, sorted by their log-probability.

    The random numbers of a photo depend on the seed and on its key (its place in the batch unless given), not on the
    batch around it. After the temperature, top_p keeps the likeliest tokens that together reach it (nucleus sampling,
    Holtzman et al. 2020), epsilon those of at least this probability (Hewitt et al. 2022); the likeliest always stays.
    Raises GeoError for n, a temperature, top_p or epsilon out of range.
    """
    if not (n >= 1 and 0 < temperature < torch.inf and 0 < top_p <= 1 and 0 <= epsilon < 1):
        given = f"n {n}, temperature {temperature}, top_p {top_p}, epsilon {epsilon}"
        raise GeoError(f"{given} do not fit: give n >= 1, a finite temperature > 0, 0 < top_p <= 1, 0 <= epsilon < 1")
    keys = range(len(memory)) if keys is None else keys
    uniform = torch.from_numpy(_uniform(keys, n, len(model.vocab_sizes), seed=seed)).to(memory.device)

    def choose(t: int, logits: Tensor) -> Tensor:
        # Less their largest, the logits stay finite at any temperature.
        chances = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        if top_p < 1 or epsilon > 0:
            ordered, order = chances.sort(dim=-1, descending=True)
            keep = (ordered.cumsum(-1) - ordered < top_p) & (ordered >= epsilon)
            keep[..., 0] = True
            chances = chances * torch.empty_like(keep).scatter_(-1, order, keep)
        cumulative = chances.cumsum(-1)
        below = cumulative <= uniform[:, :, t, None] * cumulative[..., -1:]
        token = below.sum(-1).clamp(max=logits.shape[-1] - 1)
        # Rounding may lead one step past the last token that has a chance.
        return torch.where(chances.gather(-1, token[..., None])[..., 0] > 0, token, chances.argmax(-1))

    tokens, log_prob, _ = _decode(model, memory, n, choose=choose, region=region)
    log_prob, order = log_prob.sort(dim=1, descending=True, stable=True)
    return Decoded(pick(tokens, order), log_prob)


@torch.inference_mode()
def score(model: TokenModel, memory: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability (B, N) of given cells (B, N, T), and the decoder's last state (B, N, d_model)."""
    given = tokens.unbind(-1)
    _, log_prob, states = _decode(model, memory, tokens.shape[1], choose=lambda t, _: given[t], feed_last=True)
    return log_prob, states


def _decode(
    model: TokenModel,
    memory: Tensor,
    n: int,
    *,
    choose: Callable[[int, Tensor], Tensor],
    region: Region | None = None,
    feed_last: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the tokens of ``n`` cells a photo from logits (B, n, V); return tokens, log-probability, last states.

    Cells that share a prefix share its computation; feed_last: whether the decoder sees the last tokens, too.
    """
    tree = PrefixTree(model, memory)
    node = which = torch.zeros(len(memory), n, dtype=torch.int64, device=memory.device)
    tokens, log_prob = node[..., None][..., :0], torch.zeros(node.shape, device=memory.device)
    for t, size in enumerate(model.vocab_sizes):
        logits = pick(tree.logits(t), which).float()
        allowed = logits if region is None else logits.masked_fill(~region.allowed(tokens), -torch.inf)
        token = choose(t, allowed)
        log_prob = log_prob + logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]
        tokens = torch.cat([tokens, token[..., None]], dim=-1)
        if feed_last or t + 1 < len(model.vocab_sizes):
            prefix, which = _distinct(node * size + token)
            node = pick(tree.grow(prefix // size, prefix % size, t), which)
    return tokens, log_prob, pick(tree.states, which)


def _distinct(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values of each row (B, N), filled up with its least, (B, M), and where each went (B, N)."""
    ordered, order = values.sort(dim=1)
    number = ordered.diff(dim=1, prepend=ordered[:, :1]).ne(0).cumsum(dim=1)
    distinct = ordered[:, :1].repeat(1, int(number[:, -1].max()) + 1).scatter_(1, number, ordered)
    return distinct, torch.empty_like(order).scatter_(1, order, number)


def pick(values: Tensor, order: Tensor) -> Tensor:
    """Pick from each row of values (B, M, ...) those at order (B, N), as (B, N, ...)."""
    return values[torch.arange(len(values), device=values.device)[:, None], order]


def _uniform(keys: Sequence[int], n: int, length: int, seed: int) -> NDArray[np.float32]:
    """Return uniform numbers in [0, 1) (B, n, length), each a hash of seed, key, sample and position alone.

    The hash is SplitMix64 (Steele, Lea and Flood 2014).
    """
    mixed = np.full(1, seed % 2**64, np.uint64)
    for step in (np.asarray(keys)[:, None, None], np.arange(n)[:, None], np.arange(length)):
        mixed = mixed + np.uint64(0x9E3779B97F4A7C15) * (step.astype(np.uint64) + np.uint64(1))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
