"""The posterior by hand, against Monte-Carlo points, and by what must hold of any."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rag_geotoken.geo.cells import cell_ids, cell_level, descendants, parent_ids
from rag_geotoken.tokens.posterior import EARTH_KM2, area_km2, effective_area_km2, heat_map
from rag_geotoken.types import Posterior

Floats = NDArray[np.float64]
FACES = np.arange(6, dtype=np.uint64) << np.uint64(61) | np.uint64(1 << 60)


def one(cells: list[int] | NDArray[np.uint64], mass: list[float] | Floats) -> Posterior:
    """A posterior of one photo."""
    return Posterior(np.array([cells], np.uint64), np.array([mass], np.float32))


def cover(seed: int) -> Posterior:
    """Cells of mixed levels that cover the Earth, the heaviest opened again and again, with random mass."""
    rng = np.random.default_rng(seed)
    cells = FACES.tolist()
    weights = rng.gamma(0.5, size=6).tolist()
    for _ in range(12):
        heaviest = int(np.argmax(np.where(cell_level(np.array(cells, np.uint64)) < 9, weights, -1)))
        cell, weight = np.uint64(cells.pop(heaviest)), weights.pop(heaviest)
        level = int(cell_level(cell))
        cells += descendants(np.array([cell]), level, level + 1)[0].tolist()
        weights += (weight * rng.dirichlet([0.5] * 4)).tolist()
    order = np.argsort(weights)[::-1]
    mass = np.array(weights)[order] / np.sum(weights)
    return one(np.array(cells, np.uint64)[order], mass)


def padded(posterior: Posterior, cell: int) -> Posterior:
    cells = np.concatenate([posterior.cells, np.full((len(posterior.cells), 5), cell, np.uint64)], axis=1)
    return Posterior(cells, np.pad(posterior.mass, ((0, 0), (0, 5))))


def points(n: int, seed: int) -> tuple[Floats, Floats]:
    """Evenly spread over the Earth."""
    rng = np.random.default_rng(seed)
    return np.degrees(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)


def test_areas_of_a_level_add_up_to_the_earth() -> None:
    assert pytest.approx(510_064_472, abs=1) == EARTH_KM2
    for level in (0, 1, 10, 20, 30):
        area = area_km2(cell_ids([48.8, -33.0], [2.3, 151.0], level))
        np.testing.assert_allclose(area, EARTH_KM2 / (6 * 4**level), rtol=1e-12)
    assert area_km2(FACES).sum() == pytest.approx(EARTH_KM2)


def test_the_mean_area_is_that_of_points_that_fall_into_cells() -> None:
    counts = np.unique(cell_ids(*points(400_000, 1), 2), return_counts=True)[1]
    share = counts / 400_000 * EARTH_KM2 / area_km2(cell_ids(0, 0, 2))
    assert len(counts) == 96 and share.mean() == pytest.approx(1)
    assert share.max() / share.min() < 2.2  # and no more than that is lost by taking the mean


def test_effective_area_by_hand() -> None:
    a, b = cell_ids([48.8, -33.0], [2.3, 151.0], 10).tolist()
    area = float(area_km2(a))
    assert effective_area_km2(one([a], [1.0]))[0] == pytest.approx(area)
    assert effective_area_km2(one([a, b], [0.5, 0.5]))[0] == pytest.approx(2 * area)
    assert effective_area_km2(one([a, int(FACES[0])], [1.0, 0.0]))[0] == pytest.approx(area)
    # Half in a cell, half in one of four times the area: the geometric mean of twice either.
    wide = int(parent_ids(b, 9))
    assert effective_area_km2(one([a, wide], [0.5, 0.5]))[0] == pytest.approx(np.sqrt(2 * area * 8 * area))
    even = Posterior(FACES[None], np.full((1, 6), 1 / 6, np.float32))
    assert effective_area_km2(even)[0] == pytest.approx(EARTH_KM2, rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_effective_area_is_between_the_smallest_cell_and_the_earth(seed: int) -> None:
    posterior = cover(seed)
    result = effective_area_km2(posterior)[0]
    assert area_km2(posterior.cells).min() <= result < EARTH_KM2
    proportional = one(posterior.cells[0], area_km2(posterior.cells[0]) / EARTH_KM2)
    assert effective_area_km2(proportional)[0] == pytest.approx(EARTH_KM2, rel=1e-5)


@pytest.mark.parametrize("cell", [int(FACES[2]), int(cell_ids(0, 0, 30))])
def test_what_fills_up_is_harmless(cell: int) -> None:
    posterior = cover(5)
    longer = padded(posterior, cell)
    np.testing.assert_allclose(effective_area_km2(longer), effective_area_km2(posterior), rtol=1e-12)
    np.testing.assert_allclose(heat_map(longer, 0), heat_map(posterior, 0), rtol=1e-12)


def test_photos_are_separate() -> None:
    pair = [cover(6), cover(7)]
    both = Posterior(*(np.concatenate([getattr(p, name) for p in pair]) for name in ("cells", "mass")))
    for i, posterior in enumerate(pair):
        np.testing.assert_allclose(effective_area_km2(both)[i], effective_area_km2(posterior)[0])
        np.testing.assert_array_equal(heat_map(both, i), heat_map(posterior, 0))


@pytest.mark.parametrize("level", [0, 1, 4, 10, 29])
def test_descendants_are_those_whose_parent_it_is(level: int) -> None:
    cells = np.unique(cell_ids(*points(30, level), level))
    for deeper in range(level, min(level + 4, 31)):
        result = descendants(cells, level, deeper)
        assert result.shape == (len(cells), 4 ** (deeper - level)) and len(np.unique(result)) == result.size
        assert (cell_level(result) == deeper).all()
        np.testing.assert_array_equal(parent_ids(result, level), np.broadcast_to(cells[:, None], result.shape))


@pytest.mark.parametrize("seed", range(4))
def test_a_heat_map_holds_all_mass_where_it_belongs(seed: int) -> None:
    posterior = cover(seed)
    heat = heat_map(posterior, 0, height=90)
    assert heat.shape == (90, 180) and heat.min() >= 0
    assert heat.sum() == pytest.approx(posterior.mass.sum(dtype=np.float64), abs=1e-9)
    lat, lon = points(400_000, seed)
    ids, expected = cell_ids(lat, lon), np.zeros((9, 18))
    for cell, mass in zip(posterior.cells[0], posterior.mass[0], strict=True):
        inside = np.flatnonzero(parent_ids(ids, int(cell_level(cell))) == cell)
        at = (((90 - lat[inside]) // 20).astype(int), ((lon[inside] + 180) // 20).astype(int))
        np.add.at(expected, at, mass / max(len(inside), 1))
    blocks = heat.reshape(9, 10, 18, 10).sum(axis=(1, 3))
    # A cell's parts of equal number are not quite of equal area.
    np.testing.assert_allclose(blocks, expected, atol=0.03)
    assert np.abs(blocks - expected).sum() < 0.2


@pytest.mark.parametrize(
    ("lat", "lon", "row", "column"),
    [(89.7, -179.7, 0, 0), (-89.7, 179.7, 179, 359), (48.86, 2.29, 41, 182), (-33.9, 151.2, 123, 331)],
)
def test_a_fine_cell_is_one_pixel(lat: float, lon: float, row: int, column: int) -> None:
    heat = heat_map(one([int(cell_ids(lat, lon, 16))], [1.0]), 0)
    assert heat.shape == (180, 360) and heat[row, column] == pytest.approx(1.0)
    assert np.count_nonzero(heat) == 1


def test_a_coarse_cell_is_spread_over_its_area() -> None:
    heat = heat_map(one(FACES[:1], [1.0]), 0)
    lat, lon = np.meshgrid(89.5 - np.arange(180), np.arange(360) - 179.5, indexing="ij")
    inside = parent_ids(cell_ids(lat, lon), 0) == FACES[0]
    assert heat[inside].sum() > 0.97 and (heat[inside] > 0).mean() > 0.97
    # Level 3 over its 4 parts of level 4 only; finer than the detail is not spread.
    assert np.count_nonzero(heat_map(one([int(cell_ids(40, 20, 3))], [1.0]), 0, detail=4)) == 4
    assert np.count_nonzero(heat_map(one([int(cell_ids(40, 20, 3))], [1.0]), 0, detail=2)) == 1
