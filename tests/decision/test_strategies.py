"""Selection against plain loops, one photo and one entry at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import PHOTOS, TUNING, K, OneLine, pool_of

from rag_geotoken.decision.confidence import _disk_chance, confidence
from rag_geotoken.decision.pool import reweigh, scored_pool
from rag_geotoken.decision.strategies import Given, Scores, bayes_risk, decide, density, mean_shift
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.geo.sphere import destination, haversine_km
from rag_geotoken.options import STRATEGIES as NAMES
from rag_geotoken.types import NEIGHBOR, RADII_KM, SOURCES, Answers, Neighbors, Photos, Pool, Predictions

Strategy = Callable[[Pool, Tuning], Predictions]
Place = tuple[float, float]


def choose(name: str, pool: Pool, tuning: Tuning, scores: Scores | None = None) -> Predictions:
    """A strategy's decision, its confidence by the weights as they are."""
    return decide(pool, Given(scores or {}, replace(tuning, confidence_scale=1.0)), name)


def choose_scored(name: str, pool: Pool, tuning: Tuning) -> Predictions:
    return choose(name, pool, tuning, {"alignment": scores_of(pool)})


def choose_within(radius: int, pool: Pool, tuning: Tuning) -> Predictions:
    chosen = bayes_risk(pool, Given({}, tuning), radius)
    return Predictions(chosen.lat_lon, confidence(pool, chosen.lat_lon, tuning.confidence_km), chosen.source)


STRATEGIES: dict[str, Strategy] = {name: partial(choose, name) for name in NAMES if name not in ("highest", "snap")}
STRATEGIES |= {f"within {r}": partial(choose_within, r) for r in RADII_KM}
STRATEGIES |= {f"{name}, scored": partial(choose_scored, name) for name in ("highest", "bayes-risk")}


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
    check_chosen(
        choose("log-probability", pool, TUNING), pool, lambda here, places, weights: weights[places.index(here)]
    )


def test_highest_takes_the_highest_score(pool: Pool) -> None:
    decided = choose_scored("highest", pool, TUNING)
    believed = reweigh(pool, scores_of(pool), TUNING.alignment_scale)
    check_chosen(decided, believed, lambda here, *_: math.sin(100 * here[0]))


def test_highest_of_two_verifiers_adds_them_by_their_scales(pool: Pool) -> None:
    # The reward head says the opposite, and counts for more where its scale is larger.
    tuning = replace(TUNING, alignment_scale=1.0, reward_scale=2.0)
    decided = choose("highest", pool, tuning, {"alignment": scores_of(pool), "reward": -scores_of(pool)})
    believed = reweigh(pool, -scores_of(pool), 1.0)
    check_chosen(decided, believed, lambda here, *_: -math.sin(100 * here[0]))


def test_highest_needs_a_verifier(pool: Pool, one_line: OneLine) -> None:
    with one_line("select highest .*: name one in verify"):
        choose("highest", pool, TUNING)


def test_medoid_is_a_plain_loop(pool: Pool) -> None:
    def value(here: Place, places: list[Place], weights: list[float]) -> float:
        return -sum(w * km(here, p) for p, w in zip(places, weights, strict=True))

    check_chosen(choose("medoid", pool, TUNING), pool, value)


@pytest.mark.parametrize("spread", [30.0, 100.0, 300.0])
def test_density_is_a_plain_loop(pool: Pool, spread: float) -> None:
    decided = choose("density", pool, replace(TUNING, density_km=spread))
    check_chosen(decided, pool, lambda here, places, weights: density_at(here, places, weights, spread))


@pytest.mark.parametrize("radius", [None, *RADII_KM])
def test_bayes_risk_is_a_plain_loop(pool: Pool, radius: int | None) -> None:
    # A spread for which no two entries are as good as each other.
    tuning = replace(TUNING, spread_km=60.0)
    decided = choose("bayes-risk", pool, tuning) if radius is None else choose_within(radius, pool, tuning)

    def value(here: Place, places: list[Place], weights: list[float]) -> float:
        found = utilities(here, places, weights, 60.0)
        return sum(found) / 5 if radius is None else found[RADII_KM.index(radius)]

    if radius == 2500:  # all entries lie nearer together: the first of equals
        assert (decided.confidence[:, -1] > 0.999).all()
    else:
        check_chosen(decided, pool, value)
    if f"bayes-risk-{radius}" in NAMES:
        np.testing.assert_array_equal(choose(f"bayes-risk-{radius}", pool, tuning).lat_lon, decided.lat_lon)


def test_bayes_risk_prefers_the_middle_of_many_to_one_alone() -> None:
    made = pool_of([(0.0, 0.0), (50.0, 179.95), (50.0, -179.95), (50.0, 179.85)], [0.4, 0.2, 0.2, 0.2], masked=2)
    decided = choose("bayes-risk", made, TUNING)
    assert decided.lat_lon.tolist() == [[50.0, 179.95]]
    assert choose("log-probability", made, TUNING).lat_lon.tolist() == [[0.0, 0.0]]
    assert decided.confidence[0, 4] == pytest.approx(0.6, abs=1e-4)


def test_the_radius_decides_what_is_best() -> None:
    # One heavy place alone; two lighter ones 20 km apart; four still lighter ones 150 km apart.
    far = [(60.0, float(x)) for x in (0.0, 2.7, 5.4, 8.1)]
    made = pool_of([(0.0, 0.0), (0.0, 90.0), (0.0, 90.18), *far], [0.24, 0.19, 0.17, 0.1, 0.1, 0.1, 0.1])
    found = {r: choose_within(r, made, replace(TUNING, spread_km=1.0)).lat_lon[0].tolist() for r in (1, 25, 750)}
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


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "mean-shift"])
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
    found = mean_shift(pool, Given({}, TUNING), steps=4)
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
        assert found.lat_lon[b].tolist() == pytest.approx(here, abs=1e-9)
    decided = choose("mean-shift", pool, TUNING)
    np.testing.assert_array_equal(decided.lat_lon, mean_shift(pool, Given({}, TUNING)).lat_lon)
    np.testing.assert_allclose(decided.confidence, confidence(pool, decided.lat_lon, 15.0), atol=1e-6)


@pytest.mark.parametrize("spread", [50.0, 100.0, 200.0])
def test_mean_shift_goes_uphill(pool: Pool, spread: float) -> None:
    given = Given({}, replace(TUNING, density_km=spread))
    paths = [mean_shift(pool, given, steps).lat_lon for steps in range(12)]
    np.testing.assert_array_equal(paths[0], density(pool, given).lat_lon)
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
    found = mean_shift(made, Given({}, TUNING))
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


# neighbors alone


def test_nearest_is_the_first_neighbor(neighbors: Neighbors) -> None:
    def nearest(those: Neighbors) -> Predictions:
        return choose("log-probability", scored_pool(those, TUNING.density_scale, NEIGHBOR), TUNING)

    decided = nearest(neighbors)
    np.testing.assert_array_equal(decided.lat_lon, neighbors.lat_lon[:, 0])
    assert (decided.source == NEIGHBOR).all()
    # Neighbors in one place: sure beyond the spread.
    same = Neighbors(neighbors.rows, np.repeat(neighbors.lat_lon[:, :1], K, axis=1), neighbors.scores)
    np.testing.assert_allclose(nearest(same).confidence[:, 2:], 1)


def test_the_kernel_of_the_density_is_gaussian() -> None:
    # Two neighbors 100 km apart, one spread: together 1 + exp(-1 / 2) = 1.61 against one of weight 1.5 or 1.7.
    lat_lon = np.array([[[50.0, 50.0], [0.0, 0.0], [0.0, 0.8993]]])
    for weight, expected in ((1.5, 0.0), (1.7, 50.0)):
        scores = np.array([[0.5 + math.log(weight) / TUNING.density_scale, 0.5, 0.5]], np.float32)
        near = scored_pool(Neighbors(np.arange(3)[None], lat_lon, scores), TUNING.density_scale, NEIGHBOR)
        assert density(near, Given({}, TUNING)).lat_lon[0, 0] == expected


def test_predictions_become_rows(pool: Pool) -> None:
    decided = choose("bayes-risk", pool, TUNING)
    names = [str(b) for b in range(PHOTOS + 1)]
    photos = Photos.of(names, names)
    answers = Answers.of(photos[:PHOTOS], [None] * PHOTOS)
    for name, values in vars(decided).items():
        getattr(answers, name)[:] = values
    rows = Answers.complete(photos, [None] * PHOTOS + ["broken"], answers).rows()
    assert [row.id for row in rows] == ["0", "1", "2", "3", "4", "5", "6"]
    lat_lon: NDArray[np.float64] = np.array([[row.lat, row.lon] for row in rows[:PHOTOS]], float)
    np.testing.assert_array_equal(lat_lon, decided.lat_lon)
    assert [row.source for row in rows[:PHOTOS]] == [SOURCES[source] for source in decided.source]
    assert [row.confidence for row in rows[:PHOTOS]] == [tuple(sure) for sure in decided.confidence.tolist()]
    assert {row.error for row in rows[:PHOTOS]} == {None}
    last = rows[-1]
    assert last.error == "broken" and [last.lat, last.lon, last.source, last.confidence] == [None] * 4
