"""Decoding against brute force: every cell of a small model scored by teacher forcing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from every_cell import every_cell, numbers, scored
from numpy.typing import NDArray
from scipy.stats import kstest
from tiny import TOKENS, OneLine, inputs, tiny_tokens
from torch import Tensor

from rag_geotoken.tokens import decoding
from rag_geotoken.tokens.decoding import Decoded, beam, greedy, sample, score
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.tokens.prefix_tree import PrefixTree

BATCH = 4


@pytest.fixture(scope="module")
def memory(token_model: TokenModel) -> Tensor:
    with torch.no_grad():
        return token_model.memory(*inputs(BATCH))


@pytest.fixture(scope="module")
def small() -> TokenModel:
    """Level 2: 96 cells in all."""
    return tiny_tokens(replace(TOKENS, level=2))


@pytest.fixture(scope="module")
def small_memory(small: TokenModel) -> Tensor:
    photo, neighbors, tokens = inputs(BATCH)
    with torch.no_grad():
        return small.memory(photo, neighbors, tokens[..., :2])


def all_ways(model: TokenModel, memory: Tensor) -> list[Decoded]:
    return [greedy(model, memory), beam(model, memory, 9), sample(model, memory, 9, temperature=0.8, seed=1)]


@pytest.mark.parametrize("way", range(3))
def test_step_by_step_is_teacher_forcing(token_model: TokenModel, memory: Tensor, way: int) -> None:
    decoded = all_ways(token_model, memory)[way]
    assert decoded.tokens.shape == (BATCH, 1 if way == 0 else 9, 3) and decoded.tokens.dtype == torch.int64
    assert decoded.log_prob.shape == decoded.tokens.shape[:2] and decoded.log_prob.dtype == torch.float32
    torch.testing.assert_close(decoded.log_prob, scored(token_model, memory, decoded.tokens), rtol=0, atol=1e-4)
    assert (decoded.log_prob.diff(dim=1) <= 0).all()


def test_greedy_takes_the_likeliest_token_at_every_step(token_model: TokenModel, memory: Tensor) -> None:
    decoded = greedy(token_model, memory).tokens[:, 0].clone()
    with torch.no_grad():
        for t, logits in enumerate(token_model.logits(memory, decoded)):
            assert torch.equal(logits.argmax(dim=-1), decoded[:, t])
    assert len(set(map(tuple, decoded.tolist()))) > 1


@pytest.mark.parametrize("width", [6, 10, 96, 500])
def test_beam_is_exhaustive_search_where_no_face_is_dropped(
    small: TokenModel, small_memory: Tensor, width: int
) -> None:
    log_prob = scored(small, small_memory, every_cell(small, BATCH))
    best, order = log_prob.sort(dim=1, descending=True)
    decoded = beam(small, small_memory, width)
    assert decoded.tokens.shape == (BATCH, min(width, 96), 2)
    torch.testing.assert_close(decoded.log_prob, best[:, :width], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(numbers(small, decoded.tokens)[:, :6], order[:, :6])


def test_beam_is_a_plain_beam_search(token_model: TokenModel, memory: Tensor) -> None:
    width = 4
    decoded = beam(token_model, memory, width)
    for b in range(BATCH):
        kept: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for size in token_model.vocab_sizes:
            longer = torch.tensor([[*tokens, token] for _, tokens in kept for token in range(size)])[None]
            # The tokens yet to come are seen by no position before them.
            padded = torch.nn.functional.pad(longer, (0, 3 - longer.shape[-1]))
            log_prob = _prefix_scores(token_model, memory[b : b + 1], padded, longer.shape[-1])
            ranked = sorted(zip(log_prob.tolist(), map(tuple, longer[0].tolist()), strict=True), reverse=True)
            kept = ranked[:width]
        assert [tokens for _, tokens in kept] == [tuple(tokens) for tokens in decoded.tokens[b].tolist()]


@torch.no_grad()
def _prefix_scores(model: TokenModel, memory: Tensor, tokens: Tensor, length: int) -> Tensor:
    logits = model.logits(memory.repeat_interleave(tokens.shape[1], dim=0), tokens[0])
    parts = [logits[t].log_softmax(-1).gather(1, tokens[0, :, t : t + 1])[:, 0] for t in range(length)]
    return torch.stack(parts).sum(dim=0)


def test_a_wider_beam_is_sorted_holds_no_cell_twice_and_loses_nothing(token_model: TokenModel, memory: Tensor) -> None:
    narrow = beam(token_model, memory, 3)
    for width in (1, 5, 7, 40, 1536):
        wide = beam(token_model, memory, width)
        assert wide.tokens.shape == (BATCH, width, 3) and (wide.log_prob.diff(dim=1) <= 0).all()
        assert all(len(set(row.tolist())) == width for row in numbers(token_model, wide.tokens))
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


def test_another_seed_or_key_gives_other_samples_and_more_begin_with_the_same(
    token_model: TokenModel, memory: Tensor
) -> None:
    first, again, another, many = (
        sample(token_model, memory, n, seed=seed).tokens for n, seed in ((30, 5), (30, 5), (30, 6), (50, 5))
    )
    assert torch.equal(first, again) and not torch.equal(first, another)
    for few_cells, many_cells in zip(numbers(token_model, first), numbers(token_model, many), strict=True):
        assert np.isin(few_cells, many_cells).all()
    same_photo = sample(token_model, memory[:1].expand(2, -1, -1), 30, seed=5, keys=[1, 2]).tokens
    assert not torch.equal(same_photo[0], same_photo[1])


CUTS = [(1.0, 1.0, 0.0), (0.6, 1.0, 0.0), (1.5, 1.0, 0.0)]
CUTS += [(1.0, 0.8, 0.0), (1.5, 1.0, 0.08), (0.7, 0.9, 0.01), (1.3, 0.6, 0.1)]


@pytest.mark.parametrize(("temperature", "top_p", "epsilon"), CUTS)
def test_frequencies_match_the_probabilities(
    small: TokenModel, small_memory: Tensor, temperature: float, top_p: float, epsilon: float
) -> None:
    n, memory = 20_000, small_memory[:2]
    drawn = sample(small, memory, n, seed=4, temperature=temperature, top_p=top_p, epsilon=epsilon)
    expected = truncated_cells(small, memory, temperature, top_p, epsilon)
    counts = np.stack([np.bincount(row, minlength=96) for row in numbers(small, drawn.tokens)])
    spread = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(counts / n - expected) <= 4.5 * spread + 1e-4 * (top_p == 1 and epsilon == 0)).all()
    if (top_p, epsilon) == (1.0, 0.0):
        np.testing.assert_allclose(expected, scored(small, memory, every_cell(small, 2), temperature).exp(), atol=1e-5)
        assert expected.max() > 0.05
    else:
        assert 2 <= (expected[0] > 0).sum() < 96 and not counts[expected == 0].any()
    # Whatever the temperature and the cut, a sample is scored by the model's own probability.
    torch.testing.assert_close(drawn.log_prob, scored(small, memory, drawn.tokens), rtol=0, atol=1e-4)


@torch.no_grad()
def truncated_cells(
    model: TokenModel, memory: Tensor, temperature: float, top_p: float, epsilon: float
) -> NDArray[np.float64]:
    """What top-p and epsilon leave of the two tokens of every cell (B, 96), written out token by token."""

    def step(logits: Tensor) -> NDArray[np.float64]:
        chances = (logits.double() / temperature).softmax(-1).numpy()
        kept = np.zeros_like(chances)
        for row, to in zip(chances, kept, strict=True):
            reached = 0.0
            for rank, token in enumerate(np.argsort(-row)):
                if rank == 0 or (reached < top_p and row[token] >= epsilon):
                    to[token] = row[token]
                reached += row[token]
        left: NDArray[np.float64] = kept / kept.sum(axis=-1, keepdims=True)
        return left

    faces = torch.arange(6)[:, None].expand(-1, 2)
    parts = []
    for one in memory:
        first, second = model.logits(one.expand(6, -1, -1), faces)
        parts.append((step(first)[0][:, None] * step(second)).ravel())
    return np.stack(parts)


def test_the_likeliest_token_always_stays(token_model: TokenModel, memory: Tensor) -> None:
    best = greedy(token_model, memory).tokens.expand(-1, 5, -1)
    for cut in ({"top_p": 1e-9}, {"epsilon": 0.999}, {"temperature": 0.01}, {"temperature": 1e-45}):
        assert torch.equal(sample(token_model, memory, 5, **cut).tokens, best), cut
    for hot in ({"temperature": 1e30}, {"temperature": 1e30, "top_p": 0.5}):
        assert len(set(numbers(token_model, sample(token_model, memory, 200, **hot).tokens)[0])) > 100, hot


def test_nothing_is_cut_off_unless_asked(token_model: TokenModel, memory: Tensor) -> None:
    plain = sample(token_model, memory, 200, seed=8)
    for settings in ({"top_p": 1.0}, {"epsilon": 0.0}, {"top_p": 1 - 1e-7, "epsilon": 1e-9}):
        assert torch.equal(sample(token_model, memory, 200, seed=8, **settings).tokens, plain.tokens)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": t} for t in (0.0, -1.0, float("nan"), float("inf"))]
    + [{"top_p": p} for p in (0.0, -0.1, 1.1, float("nan"))]
    + [{"epsilon": e} for e in (-0.1, 1.0, float("nan"))]
    + [{"n": n} for n in (0, -1)],
)
def test_wrong_settings_are_refused(
    token_model: TokenModel, memory: Tensor, settings: dict[str, Any], one_line: OneLine
) -> None:
    [(name, value)] = settings.items()
    with one_line(f"{name} {value}"):
        sample(token_model, memory, **({"n": 3} | settings))
    with one_line("width 0"):
        beam(token_model, memory, 0)


def test_random_numbers_are_uniform_and_independent() -> None:
    drawn = decoding._uniform(range(60), 80, 11, seed=7)
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert kstest(drawn.ravel(), "uniform").pvalue > 0.01
    assert kstest(drawn.reshape(60, -1).mean(axis=1) * np.sqrt(880 * 12) - np.sqrt(880 * 3), "norm").pvalue > 0.01
    neighbors = [(drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn[..., 1:], drawn[..., :-1])]
    neighbors += [(drawn, decoding._uniform(range(60), 80, 11, seed)) for seed in (0, 6, 8, 2**64 - 1)]
    neighbors += [(drawn, np.roll(drawn, 1, axis=(0, 1))), (drawn[:, :60], drawn[:, :60].swapaxes(0, 1))]
    for a, b in neighbors:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4.5 / np.sqrt(a.size)
        assert (a == b).mean() < 0.02


def test_a_random_number_depends_on_its_own_place_alone() -> None:
    drawn = decoding._uniform([5, 9, 2**63 - 1], 40, 6, seed=3)
    np.testing.assert_array_equal(decoding._uniform([9], 7, 4, seed=3), drawn[1:2, :7, :4])
    np.testing.assert_array_equal(decoding._uniform([2**63 - 1, 5], 40, 6, seed=3), drawn[[2, 0]])
    assert decoding._uniform([1], 2, 3, seed=2**70).shape == decoding._uniform([-1], 2, 3, seed=-1).shape == (1, 2, 3)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_batch_size_changes_nothing(token_model: TokenModel, size: int) -> None:
    with torch.no_grad():
        memory = token_model.memory(*inputs(8, seed=3))
    cut = {"temperature": 1.2, "top_p": 0.9, "epsilon": 0.01}
    whole = [*all_ways(token_model, memory), sample(token_model, memory, 20, seed=7, **cut)]
    for start in range(0, 8, size):
        part, keys = memory[start : start + size], range(start, min(start + size, 8))
        decoded = [*all_ways(token_model, part)[:2], sample(token_model, part, 9, temperature=0.8, seed=1, keys=keys)]
        decoded.append(sample(token_model, part, 20, seed=7, keys=keys, **cut))
        for part_decoded, whole_decoded in zip(decoded, whole, strict=True):
            assert torch.equal(part_decoded.tokens, whole_decoded.tokens[start : start + size])
            torch.testing.assert_close(
                part_decoded.log_prob, whole_decoded.log_prob[start : start + size], rtol=0, atol=1e-5
            )


def random_cells(model: TokenModel, batch: int, n: int, seed: int = 0) -> Tensor:
    """Tokens (B, n, T)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = model.vocab_sizes
    return torch.stack([torch.randint(size, (batch, n), generator=generator) for size in sizes], dim=-1)


def test_score_is_teacher_forcing(token_model: TokenModel, memory: Tensor) -> None:
    tokens = torch.cat([random_cells(token_model, BATCH, 30), greedy(token_model, memory).tokens], dim=1)
    tokens = torch.cat([tokens, tokens[:, :4]], dim=1)
    log_prob, states = score(token_model, memory, tokens)
    torch.testing.assert_close(log_prob, scored(token_model, memory, tokens), rtol=0, atol=1e-4)
    with torch.no_grad():
        expected = token_model.states(memory.repeat_interleave(35, dim=0), tokens.flatten(0, 1))[:, -1]
    torch.testing.assert_close(states, expected.view(BATCH, 35, -1), rtol=0, atol=1e-5)
    assert torch.equal(states[:, :4], states[:, -4:])


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> list[PrefixTree]:
    """The trees that decoding makes during a test."""
    made: list[PrefixTree] = []

    def make(model: TokenModel, memory: Tensor) -> PrefixTree:
        made.append(PrefixTree(model, memory))
        return made[-1]

    monkeypatch.setattr(decoding, "PrefixTree", make)
    return made


def test_shared_prefixes_are_computed_once(token_model: TokenModel, memory: Tensor, trees: list[PrefixTree]) -> None:
    cold = sample(token_model, memory, 50, temperature=0.3).tokens
    warm = sample(token_model, memory, 50, temperature=2.0).tokens
    score(token_model, memory, warm)
    for tree, tokens, lengths in zip(trees, (cold, warm, warm), ((1, 2), (1, 2), (1, 2, 3)), strict=True):
        distinct = [max(len({tuple(row[:t]) for row in rows}) for rows in tokens.tolist()) for t in lengths]
        assert tree.paths.shape[1] == 1 + sum(distinct)
        assert all(key.shape[1] == value.shape[1] == tree.paths.shape[1] for key, value in tree.past)
    assert trees[0].paths.shape[1] < trees[1].paths.shape[1] <= 1 + 6 + 50


@torch.no_grad()
@pytest.mark.parametrize("mixed", [True, False])
def test_every_prefix_of_a_tree_is_teacher_forcing(token_model: TokenModel, memory: Tensor, mixed: bool) -> None:
    """Prefixes hung anywhere, of any depth in one growth or of one depth at a time."""
    rng, tree = np.random.default_rng(5), PrefixTree(token_model, memory)
    visited: list[list[tuple[int, ...]]] = [[()] for _ in range(BATCH)]
    for round_ in range(9):
        depth_of = [[len(prefix) for prefix in prefixes] for prefixes in visited]
        wanted = [0, 1, 2] if mixed else [round_ % 3]
        parent = np.array([rng.choice(np.flatnonzero(np.isin(depths, wanted)), 5) for depths in depth_of])
        depth = np.take_along_axis(np.array(depth_of), parent, axis=1)
        token = rng.integers(0, np.array(token_model.vocab_sizes)[depth])
        at = torch.from_numpy(depth) if mixed else wanted[0]
        nodes = tree.grow(torch.from_numpy(parent), torch.from_numpy(token), at)
        assert nodes.tolist() == [list(range(len(visited[0]), len(visited[0]) + 5))] * BATCH
        for b, row in enumerate(zip(parent.tolist(), token.tolist(), strict=True)):
            for i, (above, next_) in enumerate(zip(*row, strict=True)):
                visited[b].append((*visited[b][above], next_))
                expected = token_model.states(memory[b : b + 1], torch.tensor([visited[b][-1]]))[0, -1]
                torch.testing.assert_close(tree.states[b, i], expected, rtol=0, atol=1e-5)
    assert {len(prefix) for prefix in visited[0]} == {0, 1, 2, 3}


def test_decoding_leaves_the_callers_random_numbers_alone(token_model: TokenModel, memory: Tensor) -> None:
    state, drawn = torch.get_rng_state(), str(np.random.get_state())
    all_ways(token_model, memory)
    assert torch.equal(state, torch.get_rng_state()) and str(np.random.get_state()) == drawn
