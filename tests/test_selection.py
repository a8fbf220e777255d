"""Selection against plain loops, one photo and one entry at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from conftest import PHOTOS, TUNING, K, pool_of
from numpy.typing import NDArray

from rag_geotoken.decision.confidence import _disk_chance, confidence
from rag_geotoken.decision.pool import neighbor_pool
from rag_geotoken.decision.strategies import (
    decide,
    density,
    highest,
    log_probability,
    mean_shift,
    medoid,
    minimum_bayes_risk,
    nearest,
)
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.geo import destination, haversine_km
from rag_geotoken.types import NEIGHBOUR, RADII_KM, SOURCES, Neighbors, Pool, Predictions

Strategy = Callable[[Pool, Tuning], Predictions]
Place = tuple[float, float]
STRATEGIES: dict[str, Strategy] = {
    "log_probability": log_probability,
    "medoid": medoid,
    "density": density,
    "mean_shift": mean_shift,
    "mbr": minimum_bayes_risk,
    **{f"mbr-{r}": lambda pool, tuning, r=r: minimum_bayes_risk(pool, tuning, r) for r in RADII_KM},  # type: ignore[misc]
    "highest": lambda pool, tuning: highest(pool, scores_of(pool), tuning),
    "decide": lambda pool, tuning: decide(pool, {"alignment": scores_of(pool)}, tuning),
}


def scores_of(pool: Pool) -> NDArray[np.float32]:
    """Scores that follow from the place, but where there is no entry: there they are the highest."""
    return np.where(pool.mask, np.sin(100 * pool.lat_lon[..., 0]), 9.0).astype(np.float32)


def places_of(pool: Pool, row: int) -> tuple[list[Place], list[float]]:
    """Places and weights of a photo's entries."""
    kept = np.flatnonzero(pool.mask[row])
    weights = [math.exp(weight) for weight in pool.log_weight[row, kept].tolist()]
    return [(float(lat), float(lon)) for lat, lon in pool.lat_lon[row, kept]], weights


def km(here: Place, there: Place) -> float:
    return float(haversine_km(*here, *there))


def density_at(place: Place, places: list[Place], weights: list[float], spread: float) -> float:
    return sum(w * math.exp(-0.5 * (km(place, p) / spread) ** 2) for p, w in zip(places, weights, strict=True))


def utilities(place: Place, places: list[Place], weights: list[float], spread: float) -> list[float]:
    """The chance to lie within each radius."""
    grid, inside = _disk_chance(spread)
    away = [km(place, p) for p in places]
    return [
        sum(w * float(np.interp(d, grid, inside[:, r])) for d, w in zip(away, weights, strict=True)) for r in range(5)
    ]


def check_chosen(decided: Predictions, pool: Pool, value: Callable[[Place, list[Place], list[float]], float]) -> None:
    """Every photo's answer is the entry of the highest value, with its source and the confidence there."""
    for b in range(len(pool.mask)):
        places, weights = places_of(pool, b)
        values = [value(place, places, weights) for place in places]
        best = int(np.argmax(values))
        assert decided.lat_lon[b].tolist() == pytest.approx(places[best])
        assert decided.source[b] == pool.source[b][pool.mask[b]][best]
        sure = utilities(places[best], places, weights, TUNING.confidence_km)
        assert decided.confidence[b].tolist() == pytest.approx(sure, abs=1e-4)


def test_log_probability_takes_the_heaviest_entry(pool: Pool) -> None:
    check_chosen(log_probability(pool, TUNING), pool, lambda here, places, weights: weights[places.index(here)])


def test_highest_takes_the_highest_score(pool: Pool) -> None:
    decided = highest(pool, scores_of(pool), TUNING)
    check_chosen(decided, pool, lambda here, *_: math.sin(100 * here[0]))


def test_medoid_is_a_plain_loop(pool: Pool) -> None:
    def value(here: Place, places: list[Place], weights: list[float]) -> float:
        return -sum(w * km(here, p) for p, w in zip(places, weights, strict=True))

    check_chosen(medoid(pool, TUNING), pool, value)


@pytest.mark.parametrize("spread", [30.0, 100.0, 300.0])
def test_density_is_a_plain_loop(pool: Pool, spread: float) -> None:
    decided = density(pool, replace(TUNING, density_km=spread))
    check_chosen(decided, pool, lambda here, places, weights: density_at(here, places, weights, spread))


@pytest.mark.parametrize("radius", [None, *RADII_KM])
def test_minimum_bayes_risk_is_a_plain_loop(pool: Pool, radius: int | None) -> None:
    # A spread for which no two entries are as good as each other.
    tuning = replace(TUNING, spread_km=60.0)

    def value(here: Place, places: list[Place], weights: list[float]) -> float:
        found = utilities(here, places, weights, 60.0)
        return sum(found) / 5 if radius is None else found[RADII_KM.index(radius)]

    if radius == 2500:  # all entries lie nearer together: the first of equals
        assert (minimum_bayes_risk(pool, tuning, radius).confidence[:, -1] > 0.999).all()
    else:
        check_chosen(minimum_bayes_risk(pool, tuning, radius), pool, value)


def test_minimum_bayes_risk_prefers_the_middle_of_many_to_one_alone() -> None:
    made = pool_of([(0.0, 0.0), (50.0, 179.95), (50.0, -179.95), (50.0, 179.85)], [0.4, 0.2, 0.2, 0.2], masked=2)
    decided = minimum_bayes_risk(made, TUNING)
    assert decided.lat_lon.tolist() == [[50.0, 179.95]]
    assert log_probability(made, TUNING).lat_lon.tolist() == [[0.0, 0.0]]
    assert decided.confidence[0, 4] == pytest.approx(0.6, abs=1e-4)


def test_the_radius_decides_what_is_best() -> None:
    # One heavy place alone; two lighter ones 20 km apart; four still lighter ones 150 km apart.
    far = [(60.0, float(x)) for x in (0.0, 2.7, 5.4, 8.1)]
    made = pool_of([(0.0, 0.0), (0.0, 90.0), (0.0, 90.18), *far], [0.24, 0.19, 0.17, 0.1, 0.1, 0.1, 0.1])
    found = {r: minimum_bayes_risk(made, replace(TUNING, spread_km=1.0), r).lat_lon[0].tolist() for r in (1, 25, 750)}
    assert found[1] == [0.0, 0.0] and found[25] in ([0.0, 90.0], [0.0, 90.18]) and found[750][0] == 60.0


@pytest.mark.parametrize("name", STRATEGIES)
def test_masked_entries_are_never_chosen_and_never_count(name: str, pool: Pool) -> None:
    # Where the arrays hold no entry, they hold good places here: each in the middle of two entries.
    heaviest = pool.lat_lon[np.arange(PHOTOS), np.where(pool.mask, pool.log_weight, -np.inf).argmax(axis=1)]
    lat_lon = np.where(pool.mask[..., None], pool.lat_lon, (heaviest[:, None] + pool.lat_lon[:, :1]) / 2)
    first = np.concatenate([lat_lon[:, -1:], lat_lon], axis=1)
    weight = np.pad(pool.log_weight, ((0, 0), (1, 0)), constant_values=-np.inf)
    source, mask = np.pad(pool.source, ((0, 0), (1, 0))), np.pad(pool.mask, ((0, 0), (1, 0)))
    padded = STRATEGIES[name](Pool(first, weight, source, mask), TUNING)
    for b in range(PHOTOS):
        kept = pool.mask[b]
        alone = Pool(*(array[b : b + 1, kept] for array in vars(pool).values()))
        expected = STRATEGIES[name](alone, TUNING)
        np.testing.assert_allclose(padded.lat_lon[b], expected.lat_lon[0], atol=1e-9)
        np.testing.assert_allclose(padded.confidence[b], expected.confidence[0], atol=1e-6)
        assert padded.source[b] == expected.source[0]


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "mean_shift"])
def test_where_there_is_no_entry_there_is_no_answer(name: str) -> None:
    # What fills the arrays up counts as lying at (0, 0): the best place of all here, were it one.
    around = [(0.0, 0.12), (0.0, -0.12), (0.12, 0.0), (-0.12, 0.0)]
    decided = STRATEGIES[name](pool_of(around, [0.26, 0.25, 0.25, 0.24], masked=2), TUNING)
    assert tuple(decided.lat_lon[0].tolist()) in around


@pytest.mark.parametrize("name", STRATEGIES)
def test_confidence_is_a_chance_that_grows_with_the_radius(name: str, pool: Pool) -> None:
    sure = STRATEGIES[name](pool, TUNING).confidence
    assert sure.shape == (PHOTOS, 5) and (sure >= 0).all() and (sure <= 1).all()
    assert (np.diff(sure, axis=1) >= -1e-9).all()


# mean shift


def test_mean_shift_is_a_plain_loop(pool: Pool) -> None:
    decided = mean_shift(pool, TUNING, steps=4)
    for b in range(PHOTOS):
        places, weights = places_of(pool, b)
        here = max(places, key=lambda place: density_at(place, places, weights, 100.0))
        for _ in range(4):
            mean = np.zeros(3)
            for (lat, lon), w in zip(places, weights, strict=True):
                phi, turn = math.radians(lat), math.radians(lon)
                unit = np.array([math.cos(phi) * math.cos(turn), math.cos(phi) * math.sin(turn), math.sin(phi)])
                mean += w * math.exp(-0.5 * (km(here, (lat, lon)) / 100.0) ** 2) * unit
            here = (math.degrees(math.asin(mean[2] / np.linalg.norm(mean))), math.degrees(math.atan2(mean[1], mean[0])))
        assert decided.lat_lon[b].tolist() == pytest.approx(here, abs=1e-9)
        np.testing.assert_allclose(decided.confidence[b], confidence(pool, decided.lat_lon, 15.0)[b])


@pytest.mark.parametrize("spread", [50.0, 100.0, 200.0])
def test_mean_shift_goes_uphill(pool: Pool, spread: float) -> None:
    tuning = replace(TUNING, density_km=spread)
    paths = [mean_shift(pool, tuning, steps).lat_lon for steps in range(12)]
    np.testing.assert_array_equal(paths[0], density(pool, tuning).lat_lon)
    for b in range(PHOTOS):
        places, weights = places_of(pool, b)
        heights = [density_at((float(at[b, 0]), float(at[b, 1])), places, weights, spread) for at in paths]
        assert (np.diff(heights) >= -1e-9).all()
    assert (haversine_km(*paths[0].T, *paths[-1].T) > 1).any()


@pytest.mark.parametrize("lon", [20.0, 179.9])
def test_mean_shift_reaches_the_mode_of_a_dense_grid(lon: float) -> None:
    rng = np.random.default_rng(3)
    bearing, away = rng.uniform(0, 360, 12), rng.uniform(0, 260, 12)
    lats, lons = destination(48.0, lon, bearing, away)
    places = [*zip(lats.tolist(), lons.tolist(), strict=True), (10.0, 10.0)]
    made = pool_of(places, rng.dirichlet(np.ones(13)).tolist(), masked=3)
    found = mean_shift(made, TUNING)
    grid_lat, grid_lon = np.meshgrid(np.linspace(45.6, 50.4, 241), np.linspace(lon - 3.6, lon + 3.6, 241))
    height = sum(
        math.exp(w) * np.exp(-0.5 * (haversine_km(grid_lat, grid_lon, *place) / 100.0) ** 2)
        for place, w in zip(places, made.log_weight[0].tolist(), strict=False)
    )
    top = int(np.argmax(height))
    lat, lon = found.lat_lon[0].tolist()
    assert haversine_km(lat, lon, grid_lat.flat[top], grid_lon.flat[top]) < 2.0
    # The mode lies between the entries, not on one.
    assert min(km((lat, lon), place) for place in places) > 5.0
    assert -180 <= lon <= 180


# neighbours alone


def test_nearest_is_the_first_neighbour(neighbors: Neighbors) -> None:
    decided = nearest(neighbors, TUNING)
    np.testing.assert_array_equal(decided.lat_lon, neighbors.lat_lon[:, 0])
    assert (decided.source == NEIGHBOUR).all()
    # Neighbours in one place: sure beyond the spread.
    same = Neighbors(neighbors.rows, np.repeat(neighbors.lat_lon[:, :1], K, axis=1), neighbors.scores)
    np.testing.assert_allclose(nearest(same, TUNING).confidence[:, 2:], 1)


def test_the_kernel_of_the_density_is_gaussian() -> None:
    # Two neighbours 100 km apart, one spread: together 1 + exp(-1 / 2) = 1.61 against one of weight 1.5 or 1.7.
    lat_lon = np.array([[[50.0, 50.0], [0.0, 0.0], [0.0, 0.8993]]])
    for weight, expected in ((1.5, 0.0), (1.7, 50.0)):
        scores = np.array([[0.5 + math.log(weight) / TUNING.density_scale, 0.5, 0.5]], np.float32)
        near = neighbor_pool(Neighbors(np.arange(3)[None], lat_lon, scores), TUNING.density_scale)
        assert density(near, TUNING).lat_lon[0, 0] == expected


def test_predictions_become_rows(pool: Pool) -> None:
    decided = minimum_bayes_risk(pool, TUNING)
    rows = decided.rows([str(b) for b in range(PHOTOS)])
    assert [row.id for row in rows] == ["0", "1", "2", "3", "4", "5"]
    lat_lon: NDArray[np.float64] = np.array([[row.lat, row.lon] for row in rows], float)
    np.testing.assert_array_equal(lat_lon, decided.lat_lon)
    assert rows[0].source in SOURCES and rows[0].error is None and len(rows[0].confidence or ()) == 5
