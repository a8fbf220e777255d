"""A region against brute force over all cells of a small level, and decoding that stays inside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from every_cell import every_cell, numbers, scored
from numpy.typing import NDArray
from tiny import TOKENS, OneLine, tiny_tokens
from torch import Tensor

from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.tokens.decoding import Decoded, beam, greedy, sample
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.tokens.region import Region

BATCH = 3
PLACES = [(90.0, 0.0), (-90.0, 77.0), (0.0, 180.0), (12.3, -180.0), (-66.5, 179.99), (0.0, 0.0), (35.26, 45.0)]


@pytest.fixture(scope="module")
def model() -> TokenModel:
    """Level 3: vocabularies of 6, 16 and 4, 384 cells."""
    return tiny_tokens(replace(TOKENS, level=3))


@pytest.fixture(scope="module")
def memory() -> Tensor:
    return torch.randn(BATCH, 7, TOKENS.d_model, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def tokenizer() -> S2Tokenizer:
    return S2Tokenizer(3)


def cells_of(model: TokenModel) -> NDArray[np.int64]:
    """Every cell's tokens (N, T), in order."""
    cells: NDArray[np.int64] = every_cell(model, 1)[0].numpy()
    return cells


def counted(region: Region) -> NDArray[np.int64]:
    """The numbers of a region's cells; its ranges lie apart and in order."""
    first, end = region.first.numpy(), region.end.numpy()
    assert (first < end).all() and (end[:-1] < first[1:]).all()
    return np.concatenate([np.arange(a, b) for a, b in zip(first, end, strict=True)])


def region_of(tokenizer: S2Tokenizer, kept: NDArray[np.int64]) -> Region:
    """The cells of these numbers (N,)."""
    return Region(tokenizer, np.stack([kept, kept + 1], axis=-1))


def all_ways(model: TokenModel, memory: Tensor, region: Region | None) -> list[Decoded]:
    return [
        greedy(model, memory, region),
        beam(model, memory, 7, region),
        sample(model, memory, 12, temperature=1.5, region=region),
        sample(model, memory, 12, temperature=1e30, top_p=0.5, epsilon=0.1, region=region),
        sample(model, memory, 12, temperature=1e-45, region=region),
    ]


@pytest.mark.parametrize("tokenizer", [S2Tokenizer(4), S2Tokenizer(3, 1), S2Tokenizer(4, 3), S2Tokenizer(0)])
def test_within_is_brute_force(tokenizer: S2Tokenizer) -> None:
    rng = np.random.default_rng(1)
    places = PLACES + list(zip(rng.uniform(-90, 90, 20).tolist(), rng.uniform(-180, 180, 20).tolist(), strict=True))
    axes = np.meshgrid(*(np.arange(size) for size in tokenizer.vocab_sizes), indexing="ij")
    cells = np.stack([axis.ravel() for axis in axes], axis=-1)
    lat, lon = tokenizer.decode(cells)
    for a, b in places:
        away, own = haversine_km(lat, lon, a, b), (cells == tokenizer.encode(a, b)).all(axis=1)
        for km in (0.0, 100.0, 700.0, 2_500.0, 9_000.0, 19_000.0, 20_100.0):
            result = counted(Region.within(tokenizer, a, b, km))
            np.testing.assert_array_equal(result, np.flatnonzero((away <= km) | own), err_msg=f"{a} {b} {km}")


def test_within_is_not_wide_at_a_fine_level() -> None:
    fine = S2Tokenizer(20)
    region = Region.within(fine, 48.8583, 2.2945, 0.1)
    area = 4 * np.pi * 6371**2 / (6 * 4**20)
    assert len(counted(region)) == pytest.approx(np.pi * 0.1**2 / area, rel=0.4)
    assert len(counted(Region.within(S2Tokenizer(30), 48.8583, 2.2945, 0.0))) == 1
    # A country at ten meters: only its border is followed down to single cells.
    wide = Region.within(fine, 48.8583, 2.2945, 50.0)
    assert int((wide.end - wide.first).sum()) == pytest.approx(np.pi * 50.0**2 / area, rel=0.45)
    assert len(wide.first) < 200_000


def test_allowed_is_brute_force(tokenizer: S2Tokenizer, model: TokenModel) -> None:
    cells = cells_of(model)
    kept = np.flatnonzero(np.random.default_rng(4).random(len(cells)) < 0.05)
    region = region_of(tokenizer, kept)
    prefixes = {tuple(row[:t]) for row in cells[kept].tolist() for t in (1, 2, 3)}
    for t, size in enumerate(model.vocab_sizes):
        for row in np.unique(cells[:, :t], axis=0):
            expected = [(*row.tolist(), token) in prefixes for token in range(size)]
            assert region.allowed(torch.from_numpy(row)).tolist() == expected
    assert region.allowed(torch.zeros(2, 5, 0, dtype=torch.int64)).shape == (2, 5, 6)
    assert region.allowed(torch.zeros(2, 5, 2, dtype=torch.int64)).shape == (2, 5, 4)


@pytest.mark.parametrize("size", [1, 2, 5, 20, 200])
@pytest.mark.parametrize("seed", range(3))
def test_decoding_never_leaves(model: TokenModel, memory: Tensor, tokenizer: S2Tokenizer, size: int, seed: int) -> None:
    kept = np.random.default_rng([size, seed]).choice(384, size, replace=False)
    for result in all_ways(model, memory, region_of(tokenizer, kept)):
        assert np.isin(numbers(model, result.tokens), kept).all()
        # The model's own probability: not renormalized over the region.
        real, expected = result.log_prob.isfinite(), scored(model, memory, result.tokens)
        assert real.sum(dim=1).tolist() == [min(size, 7) if result.log_prob.shape[1] == 7 else real.shape[1]] * BATCH
        torch.testing.assert_close(result.log_prob[real], expected[real], rtol=0, atol=1e-4)
        assert (result.log_prob[~real] == -torch.inf).all()


@pytest.mark.parametrize("size", [1, 3, 30])
def test_a_beam_as_wide_as_the_lattice_is_the_lattice(
    model: TokenModel, memory: Tensor, tokenizer: S2Tokenizer, size: int
) -> None:
    kept = np.random.default_rng(size).choice(384, size, replace=False)
    result = beam(model, memory, 30, region_of(tokenizer, kept))
    log_prob = scored(model, memory, every_cell(model, BATCH)[:, kept]).sort(dim=1, descending=True)
    np.testing.assert_array_equal(numbers(model, result.tokens)[:, :size], kept[log_prob.indices])
    torch.testing.assert_close(result.log_prob[:, :size], log_prob.values, rtol=0, atol=1e-4)
    assert torch.equal(result.tokens[:, size:], result.tokens[:, :1].expand(-1, 30 - size, -1))


def test_samples_share_out_what_the_lattice_leaves_step_by_step(
    model: TokenModel, memory: Tensor, tokenizer: S2Tokenizer
) -> None:
    n, kept = 20_000, np.random.default_rng(9).choice(384, 12, replace=False)
    rows = cells_of(model)[kept]
    result = sample(model, memory[:1], n, seed=1, region=region_of(tokenizer, kept))
    with torch.no_grad():
        logits = model.logits(memory[:1].expand(len(rows), -1, -1), torch.from_numpy(rows))
    expected = np.ones(len(rows))
    for t, step in enumerate(logits):
        chances = step.softmax(-1).numpy()
        for i, row in enumerate(rows):
            open_ = {int(cell[t]) for cell in rows if (cell[:t] == row[:t]).all()}
            expected[i] *= chances[i, row[t]] / sum(chances[i, token] for token in open_)
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    counts = (numbers(model, result.tokens)[0][:, None] == kept).sum(axis=0)
    assert (np.abs(counts / n - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / n) + 1e-4).all()


def test_a_region_of_all_cells_changes_nothing(model: TokenModel, memory: Tensor, tokenizer: S2Tokenizer) -> None:
    everything = Region.within(tokenizer, 0, 0, 20_100)
    ways = zip(all_ways(model, memory, everything), all_ways(model, memory, None), strict=True)
    for inside, free in ways:
        assert torch.equal(inside.tokens, free.tokens) and torch.equal(inside.log_prob, free.log_prob)


def test_order_and_repeats_do_not_matter(tokenizer: S2Tokenizer) -> None:
    kept = np.array([300, 7, 300, 42])
    for same in (kept, kept[::-1]):
        assert counted(region_of(tokenizer, same)).tolist() == [7, 42, 300]


def test_a_place_off_the_earth_is_refused(tokenizer: S2Tokenizer, one_line: OneLine) -> None:
    with one_line("latitude 91.0"):
        Region.within(tokenizer, 91.0, 0.0, 10.0)
