"""Frontier search against brute force: prefix probabilities summed over every cell of a small model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from every_cell import every_cell, scored
from numpy.typing import NDArray
from tiny import TOKENS, tiny_tokens
from torch import Tensor

from rag_geotoken.geo.cells import S2Tokenizer, cell_level, parent_ids
from rag_geotoken.tokens.frontier import frontier
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.types import Posterior

BATCH = 3
# Vocabularies (6, 16, 16), (6, 16, 4), (6, 4, 4), (6, 64): openings to the end are those of all prefixes but the root.
SHAPES = {(4, 2): 102, (3, 2): 102, (2, 1): 30, (3, 3): 6}


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def model(request: pytest.FixtureRequest) -> TokenModel:
    level, group = request.param
    return tiny_tokens(replace(TOKENS, level=level, group=group))


@pytest.fixture(scope="module")
def memory() -> Tensor:
    return torch.randn(BATCH, 7, TOKENS.d_model, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def leaves(model: TokenModel, memory: Tensor) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Every cell (N,) of the model's level and its probability (B, N)."""
    tokens = every_cell(model, BATCH)
    chances = scored(model, memory, tokens).double().exp().numpy()
    return tokenizer_of(model).tokens_to_ids(tokens[0].numpy()), chances


def tokenizer_of(model: TokenModel) -> S2Tokenizer:
    return S2Tokenizer(model.config.level, model.config.group)


def to_the_end(model: TokenModel) -> int:
    return SHAPES[model.config.level, model.config.group]


def below(cell: int, ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of the ids lie in a cell: its leaves are those within its lowest set bit of it."""
    reach = (cell & -cell) - 1
    return (ids >= np.uint64(cell - reach)) & (ids <= np.uint64(cell + reach))


def rows(posterior: Posterior) -> list[dict[int, float]]:
    """Cell -> mass of each photo, what fills up left out."""
    pairs = zip(posterior.cells.tolist(), posterior.mass.tolist(), strict=True)
    return [{c: m for c, m in zip(cells, mass, strict=True) if m > 0} for cells, mass in pairs]


Leaves = tuple[NDArray[np.uint64], NDArray[np.float64]]


@pytest.mark.parametrize("at_once", [1, 8, 1000])
def test_at_any_moment_the_mass_of_the_whole_earth_is_exact(
    model: TokenModel, memory: Tensor, leaves: Leaves, at_once: int
) -> None:
    ids, chances = leaves
    for openings in (0, 1, 5, 6, 7, 13, 29, 101):
        posterior = frontier(model, memory, openings, at_once)
        assert posterior.cells.dtype == np.uint64 and posterior.mass.dtype == np.float32
        assert posterior.cells.shape == posterior.mass.shape and len(posterior.mass) == BATCH
        np.testing.assert_allclose(posterior.mass.sum(axis=1, dtype=np.float64), 1, atol=1e-5)
        assert (np.diff(posterior.mass) <= 0).all()
        assert np.isin(cell_level(posterior.cells), tokenizer_of(model).levels).all()
        for row, chance in zip(rows(posterior), chances, strict=True):
            # As many leaves in all as the Earth has, and none shared: they cover it.
            assert sum(cell & -cell for cell in row) == 6 * 4**30
            inside = np.array([below(cell, ids) for cell in row])
            assert (inside.sum(axis=0) == 1).all()
            np.testing.assert_allclose(list(row.values()), inside @ chance, rtol=1e-3, atol=1e-7)


def test_a_photo_that_has_less_left_to_open_than_another() -> None:
    model = tiny_tokens(replace(TOKENS, level=2, group=1))
    with torch.no_grad():
        model.output_layers[0].get_parameter("weight").mul_(3.0)  # the unlikeliest face of some is opened last
    memory = torch.randn(8, 7, TOKENS.d_model, generator=torch.Generator().manual_seed(3))
    tokens = every_cell(model, 8)
    ids, chances = tokenizer_of(model).tokens_to_ids(tokens[0].numpy()), scored(model, memory, tokens).exp().numpy()
    counts = set()
    for openings in range(20, 31):
        posterior = frontier(model, memory, openings, 5)
        for row, chance in zip(rows(posterior), chances, strict=True):
            assert sum(cell & -cell for cell in row) == 6 * 4**30
            expected = [chance[below(cell, ids)].sum() for cell in row]
            np.testing.assert_allclose(list(row.values()), expected, rtol=1e-3, atol=1e-8)
            counts.add((openings, len(row)))
    assert len(counts) > 11


def test_everything_open_is_the_distribution_over_the_cells(model: TokenModel, memory: Tensor, leaves: Leaves) -> None:
    ids, chances = leaves
    for openings, at_once in ((to_the_end(model), 8), (to_the_end(model), 1), (5_000, 64)):
        posterior = frontier(model, memory, openings, at_once)
        assert posterior.cells.shape == chances.shape
        for cells, mass, chance in zip(posterior.cells, posterior.mass, chances, strict=True):
            assert set(cells.tolist()) == set(ids.tolist())
            np.testing.assert_allclose(mass, chance[np.searchsorted(ids, cells)], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("openings", [1, 4, 10, 27, -1])  # -1: all but one
def test_one_at_once_is_best_first(model: TokenModel, memory: Tensor, leaves: Leaves, openings: int) -> None:
    ids, chances = leaves
    levels, openings = tokenizer_of(model).levels, openings if openings > 0 else to_the_end(model) - 1
    for row, chance in zip(rows(frontier(model, memory, openings, at_once=1)), chances, strict=True):
        closed = {face << 61 | 1 << 60: 0.0 for face in range(6)}
        closed = {cell: chance[below(cell, ids)].sum() for cell in closed}
        for _ in range(openings):
            unfinished = [cell for cell in closed if cell_level(cell) < levels[-1]]
            if not unfinished:
                break
            best = max(unfinished, key=closed.__getitem__)
            next_ = levels[levels.index(int(cell_level(best))) + 1]
            children = np.unique(parent_ids(ids[below(best, ids)], next_)).tolist()
            del closed[best]
            closed |= {cell: chance[below(cell, ids)].sum() for cell in children}
        assert row.keys() == closed.keys()


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_more_openings_only_refine(model: TokenModel, memory: Tensor, at_once: int) -> None:
    """Every cell lies in one of the coarser posterior, whose mass is the sum of its parts."""
    steps = [frontier(model, memory, openings, at_once) for openings in range(0, 49, 6)]
    for coarse, fine in pairwise(steps):
        for before, after in zip(rows(coarse), rows(fine), strict=True):
            ids, mass = np.array(list(after), np.uint64), np.array(list(after.values()))
            inside = np.array([below(cell, ids) for cell in before])
            assert (inside.sum(axis=0) == 1).all()
            np.testing.assert_allclose(inside @ mass, list(before.values()), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("openings", "at_once"), [(0, 8), (1, 8), (6, 8), (10, 8), (10, 3), (20, 64), (20, 1)])
def test_as_many_are_opened_as_asked(openings: int, at_once: int) -> None:
    model = tiny_tokens()
    memory = torch.randn(BATCH, 7, TOKENS.d_model, generator=torch.Generator().manual_seed(4))
    assert [len(row) for row in rows(frontier(model, memory, openings, at_once))] == [6 + 15 * openings] * BATCH


def test_a_photo_does_not_depend_on_its_batch(model: TokenModel, memory: Tensor) -> None:
    for openings in (5, 20, to_the_end(model) - 2):
        together = rows(frontier(model, memory, openings, 4))
        for i in range(BATCH):
            [alone] = rows(frontier(model, memory[i : i + 1], openings, 4))
            assert alone.keys() == together[i].keys()
            np.testing.assert_allclose([together[i][cell] for cell in alone], list(alone.values()), rtol=1e-4)
        assert together[0] != together[1]


def test_a_model_of_faces_alone(memory: Tensor) -> None:
    model = tiny_tokens(replace(TOKENS, level=0))
    chances = scored(model, memory, every_cell(model, BATCH)).exp().sort(dim=1, descending=True)
    for openings in (0, 64):
        posterior = frontier(model, memory, openings)
        np.testing.assert_array_equal(posterior.cells >> np.uint64(61), chances.indices.numpy())
        np.testing.assert_allclose(posterior.mass, chances.values.numpy(), rtol=1e-4)
