"""Decoding against brute force: every cell of a small model scored by teacher forcing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TOKENS, inputs, tiny_tokens
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken.decoding import Decoded, beam, greedy, sample
from rag_geotoken.token_model import TokenModel

BATCH = 4


@pytest.fixture(scope="module")
def memory(token_model: TokenModel) -> Tensor:
    with torch.no_grad():
        return token_model.memory_of(*inputs(BATCH))


@pytest.fixture(scope="module")
def small() -> TokenModel:
    """Level 2: 96 cells in all."""
    return tiny_tokens(replace(TOKENS, level=2))


@pytest.fixture(scope="module")
def small_memory(small: TokenModel) -> Tensor:
    photo, near, tokens = inputs(BATCH)
    with torch.no_grad():
        return small.memory_of(photo, near, tokens[..., :2])


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


def all_ways(model: TokenModel, memory: Tensor) -> list[Decoded]:
    return [greedy(model, memory), beam(model, memory, 9), sample(model, memory, 9, 0.8, seed=1)]


@pytest.mark.parametrize("way", range(3))
def test_step_by_step_is_teacher_forcing(token_model: TokenModel, memory: Tensor, way: int) -> None:
    found = all_ways(token_model, memory)[way]
    assert found.tokens.shape == (BATCH, 1 if way == 0 else 9, 3) and found.tokens.dtype == torch.int64
    assert found.log_prob.shape == found.tokens.shape[:2] and found.log_prob.dtype == torch.float32
    torch.testing.assert_close(found.log_prob, scored(token_model, memory, found.tokens), rtol=0, atol=1e-4)
    assert (found.log_prob.diff(dim=1) <= 0).all()


def test_greedy_takes_the_likeliest_token_at_every_step(token_model: TokenModel, memory: Tensor) -> None:
    found = greedy(token_model, memory).tokens[:, 0].clone()
    with torch.no_grad():
        for t, logits in enumerate(token_model.logits(memory, found)):
            assert torch.equal(logits.argmax(dim=-1), found[:, t])
    assert len(set(map(tuple, found.tolist()))) > 1


@pytest.mark.parametrize("width", [6, 10, 96, 500])
def test_beam_is_exhaustive_search_where_no_face_is_dropped(
    small: TokenModel, small_memory: Tensor, width: int
) -> None:
    log_prob = scored(small, small_memory, every_cell(small, BATCH))
    best, order = log_prob.sort(dim=1, descending=True)
    found = beam(small, small_memory, width)
    assert found.tokens.shape == (BATCH, min(width, 96), 2)
    torch.testing.assert_close(found.log_prob, best[:, :width], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(numbers(small, found.tokens)[:, :6], order[:, :6])


def test_beam_is_a_plain_beam_search(token_model: TokenModel, memory: Tensor) -> None:
    width = 4
    found = beam(token_model, memory, width)
    for b in range(BATCH):
        kept: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for size in token_model.vocab_sizes:
            longer = torch.tensor([[*tokens, token] for _, tokens in kept for token in range(size)])[None]
            # The tokens yet to come are seen by no position before them.
            padded = torch.nn.functional.pad(longer, (0, 3 - longer.shape[-1]))
            log_prob = _prefix_scores(token_model, memory[b : b + 1], padded, longer.shape[-1])
            ranked = sorted(zip(log_prob.tolist(), map(tuple, longer[0].tolist()), strict=True), reverse=True)
            kept = ranked[:width]
        assert [tokens for _, tokens in kept] == [tuple(tokens) for tokens in found.tokens[b].tolist()]


@torch.no_grad()
def _prefix_scores(model: TokenModel, memory: Tensor, tokens: Tensor, length: int) -> Tensor:
    logits = model.logits(memory.repeat_interleave(tokens.shape[1], dim=0), tokens[0])
    parts = [logits[t].log_softmax(-1).gather(1, tokens[0, :, t : t + 1])[:, 0] for t in range(length)]
    return torch.stack(parts).sum(dim=0)


@pytest.mark.parametrize("width", [1, 5, 7, 40])
def test_a_beam_is_sorted_and_holds_no_cell_twice(token_model: TokenModel, memory: Tensor, width: int) -> None:
    found = beam(token_model, memory, width)
    assert found.tokens.shape == (BATCH, width, 3)
    assert (found.log_prob.diff(dim=1) <= 0).all()
    for row in numbers(token_model, found.tokens):
        assert len(set(row.tolist())) == width


def test_a_wider_beam_loses_nothing(token_model: TokenModel, memory: Tensor) -> None:
    narrow, wide = beam(token_model, memory, 3), beam(token_model, memory, 1536)
    assert (wide.log_prob[:, :3] >= narrow.log_prob - 1e-5).all()
    assert wide.log_prob.exp().sum(dim=1).tolist() == pytest.approx([1.0] * BATCH, abs=1e-4)


def test_samples_follow_from_seed_and_key_alone(token_model: TokenModel, memory: Tensor) -> None:
    keys = [11, 12, 13, 14]
    together = sample(token_model, memory, 30, seed=5, keys=keys)
    for i, key in enumerate(keys):
        alone = sample(token_model, memory[i : i + 1], 30, seed=5, keys=[key])
        assert torch.equal(alone.tokens[0], together.tokens[i])
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[i], rtol=0, atol=1e-5)
    turned = sample(token_model, memory.flip(0), 30, seed=5, keys=keys[::-1])
    assert torch.equal(turned.tokens.flip(0), together.tokens)


def test_another_seed_or_key_gives_other_samples(token_model: TokenModel, memory: Tensor) -> None:
    first, again, other = (sample(token_model, memory, 30, seed=seed).tokens for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    same_photo = memory[:1].expand(2, -1, -1)
    drawn = sample(token_model, same_photo, 30, seed=5, keys=[1, 2]).tokens
    assert not torch.equal(drawn[0], drawn[1])


def test_more_samples_begin_with_the_same(token_model: TokenModel, memory: Tensor) -> None:
    few, many = (sample(token_model, memory, n, seed=2).tokens for n in (10, 40))
    for a, b in zip(numbers(token_model, few), numbers(token_model, many), strict=True):
        missing = np.setdiff1d(a, b)
        assert missing.size == 0


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
def test_frequencies_match_the_probabilities(small: TokenModel, small_memory: Tensor, temperature: float) -> None:
    n = 20_000
    found = sample(small, small_memory[:2], n, temperature, seed=3)
    expected = scored(small, small_memory[:2], every_cell(small, 2), temperature).exp().numpy()
    counts = np.stack([np.bincount(row, minlength=96) for row in numbers(small, found.tokens)])
    spread = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(counts / n - expected) <= 4.5 * spread + 1e-4).all()
    assert expected.max() > 0.05
    # Whatever the temperature, a sample is scored by the model's own probability.
    torch.testing.assert_close(found.log_prob, scored(small, small_memory[:2], found.tokens), rtol=0, atol=1e-4)


def test_a_cold_sample_is_greedy(token_model: TokenModel, memory: Tensor) -> None:
    cold = sample(token_model, memory, 5, temperature=0.01, seed=0)
    assert torch.equal(cold.tokens, greedy(token_model, memory).tokens.expand(-1, 5, -1))


def test_decoding_leaves_the_callers_random_numbers_alone(token_model: TokenModel, memory: Tensor) -> None:
    state, drawn = torch.get_rng_state(), str(np.random.get_state())
    all_ways(token_model, memory)
    assert torch.equal(state, torch.get_rng_state()) and str(np.random.get_state()) == drawn
