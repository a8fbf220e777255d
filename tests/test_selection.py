"""Selection against plain loops, one photo and one entry at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.geo import haversine_km
from rag_geotoken.metrics import RADII_KM
from rag_geotoken.selection import (
    Tuning,
    _disk_chance,
    align,
    decide,
    density,
    log_probability,
    log_softmax,
    make_pool,
    minimum_bayes_risk,
    nearest,
)
from rag_geotoken.types import BEAM, GREEDY, NEIGHBOUR, SAMPLE, SOURCES, Candidates, Neighbors, Pool

TOKENIZER = S2Tokenizer(6, 2)
TUNING = Tuning(
    neighbor_share=0.3,
    neighbor_scale=20.0,
    alignment_scale=10.0,
    spread_km=15.0,
    confidence_km=15.0,
    density_scale=20.0,
    density_km=100.0,
)
PHOTOS, K, N = 6, 8, 12


@pytest.fixture(scope="module")
def neighbors() -> Neighbors:
    """Neighbours around one place a photo, several of them in one cell."""
    rng = np.random.default_rng(0)
    around = np.column_stack([rng.uniform(-50, 70, PHOTOS), rng.uniform(-170, 170, PHOTOS)])
    lat_lon = around[:, None] + rng.normal(0, 1.5, (PHOTOS, K, 2))
    scores = -np.sort(-rng.uniform(0.5, 0.9, (PHOTOS, K)), axis=1).astype(np.float32)
    return Neighbors(rng.integers(0, 100, (PHOTOS, K)), lat_lon, scores)


@pytest.fixture(scope="module")
def candidates(neighbors: Neighbors) -> Candidates:
    """Cells near the neighbours: some theirs, some drawn twice."""
    rng = np.random.default_rng(1)
    lat_lon = neighbors.lat_lon[:, rng.integers(0, K, N)] + rng.choice([0.0, 1.0], (PHOTOS, N, 1))
    tokens = TOKENIZER.encode(*lat_lon.reshape(-1, 2).T).reshape(PHOTOS, N, -1)
    _, cell = np.unique(tokens.reshape(-1, tokens.shape[-1]), axis=0, return_inverse=True)
    log_prob = np.random.default_rng(2).uniform(-9, -1, cell.max() + 1)[cell].reshape(PHOTOS, N)
    source = np.tile(np.array([GREEDY, *[BEAM] * 4, *[SAMPLE] * 7], np.int8), (PHOTOS, 1))
    return Candidates(tokens, log_prob.astype(np.float32), source)


@pytest.fixture(scope="module")
def pool(neighbors: Neighbors, candidates: Candidates) -> Pool:
    return make_pool(neighbors, candidates, TOKENIZER, TUNING)


def pool_of(places: list[tuple[float, float]], weights: list[float], masked: int = 0) -> Pool:
    """One photo's pool, with entries that do not count at its end."""
    lat_lon = np.array([[*places, *[(0.0, 0.0)] * masked]])
    with np.errstate(divide="ignore"):
        log_weight = np.log(np.array([[*weights, *[0.0] * masked]])).astype(np.float32)
    return Pool(lat_lon, log_weight, np.full(log_weight.shape, BEAM, np.int8), np.isfinite(log_weight))


def entries(pool: Pool, row: int) -> list[tuple[float, float, str, float]]:
    kept = np.flatnonzero(pool.mask[row])
    return [
        (*pool.lat_lon[row, c].tolist(), SOURCES[pool.source[row, c]], math.exp(pool.log_weight[row, c])) for c in kept
    ]


def test_a_pool_is_one_entry_a_cell(neighbors: Neighbors, candidates: Candidates, pool: Pool) -> None:
    shared = 0
    for b in range(PHOTOS):
        found: dict[int, list[object]] = {}
        near = [math.exp(TUNING.neighbor_scale * s) for s in neighbors.scores[b].astype(float)]
        for (lat, lon), weight in zip(neighbors.lat_lon[b].tolist(), near, strict=True):
            cell = int(TOKENIZER.cell_ids(lat, lon))
            entry = found.setdefault(cell, [lat, lon, "neighbour", 0.0])
            entry[3] += 0.3 * weight / sum(near)  # type: ignore[operator]
        once = {tuple(t): float(p) for t, p in zip(candidates.tokens[b].tolist(), candidates.log_prob[b], strict=True)}
        total = sum(math.exp(p) for p in once.values())
        for tokens, source in zip(candidates.tokens[b].tolist(), candidates.source[b], strict=True):
            if tuple(tokens) not in once:
                continue
            cell = int(TOKENIZER.tokens_to_ids(np.array(tokens)))
            lat, lon = (float(x[0]) for x in TOKENIZER.decode(np.array([tokens])))
            shared += cell in found
            entry = found.setdefault(cell, [lat, lon, SOURCES[source], 0.0])
            entry[3] += 0.7 * math.exp(once.pop(tuple(tokens))) / total  # type: ignore[operator]
        for given, expected in zip(entries(pool, b), found.values(), strict=True):
            assert given[2] == expected[2]
            assert [given[0], given[1], given[3]] == pytest.approx([expected[i] for i in (0, 1, 3)], rel=1e-5)
    assert shared > 3


def test_a_pools_weights_add_up_to_one(pool: Pool) -> None:
    np.testing.assert_allclose(np.exp(pool.log_weight).sum(axis=1), 1, atol=1e-5)
    assert not np.isfinite(pool.log_weight[~pool.mask]).any() and np.isfinite(pool.log_weight[pool.mask]).all()
    assert pool.lat_lon.shape == (PHOTOS, K + N, 2) and pool.log_weight.dtype == np.float32
    assert (~pool.mask).any()


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_either_kind_has_its_share(neighbors: Neighbors, candidates: Candidates, share: float) -> None:
    # In cells of a millimetre or so, no neighbour lies in a generated one.
    fine = S2Tokenizer(24, 2)
    lat, lon = TOKENIZER.decode(candidates.tokens.reshape(-1, 4))
    tokens = fine.encode(lat, lon).reshape(PHOTOS, N, -1)
    cells = Candidates(tokens, candidates.log_prob, candidates.source)
    made = make_pool(neighbors, cells, fine, replace(TUNING, neighbor_share=share))
    weight = np.where(made.mask, np.exp(made.log_weight), 0.0)
    np.testing.assert_allclose((weight * (made.source == NEIGHBOUR)).sum(axis=1), share, atol=1e-5)


def test_a_pool_of_one_kind_alone(neighbors: Neighbors, candidates: Candidates) -> None:
    retrieved = make_pool(neighbors, None, TOKENIZER, TUNING)
    generated = make_pool(None, candidates, TOKENIZER, TUNING)
    for made in (retrieved, generated):
        np.testing.assert_allclose(np.exp(made.log_weight).sum(axis=1), 1, atol=1e-5)
    assert (retrieved.source == NEIGHBOUR).all() and not (generated.source == NEIGHBOUR).any()
    np.testing.assert_array_equal(retrieved.lat_lon, neighbors.lat_lon)
    with pytest.raises(ValueError, match="neighbours or candidates"):
        make_pool(None, None, TOKENIZER, TUNING)


def test_minimum_bayes_risk_is_a_plain_loop(pool: Pool) -> None:
    decided = minimum_bayes_risk(pool, TUNING)
    grid, inside = _disk_chance(TUNING.spread_km)
    for b in range(PHOTOS):
        found = entries(pool, b)
        chances = []
        for lat, lon, *_ in found:
            km = [float(haversine_km(lat, lon, other[0], other[1])) for other in found]
            chances.append([
                sum(other[3] * np.interp(d, grid, inside[:, r]) for d, other in zip(km, found, strict=True))
                for r in range(len(RADII_KM))
            ])  # fmt: skip
        best = max(range(len(found)), key=lambda c: sum(chances[c]))
        assert decided.lat_lon[b].tolist() == pytest.approx(found[best][:2])
        assert SOURCES[decided.source[b]] == found[best][2]
        assert decided.confidence[b].tolist() == pytest.approx(chances[best], abs=1e-4)


def test_minimum_bayes_risk_prefers_the_middle_of_many_to_one_alone() -> None:
    made = pool_of([(0.0, 0.0), (50.0, 179.95), (50.0, -179.95), (50.0, 179.85)], [0.4, 0.2, 0.2, 0.2], masked=2)
    decided = minimum_bayes_risk(made, TUNING)
    assert decided.lat_lon.tolist() == [[50.0, 179.95]]
    assert log_probability(made, TUNING).lat_lon.tolist() == [[0.0, 0.0]]
    assert decided.confidence[0, 4] == pytest.approx(0.6, abs=1e-4)


def test_masked_entries_are_never_chosen_and_never_count() -> None:
    places, weights = [(10.0, 10.0), (30.0, 30.0)], [0.45, 0.55]
    plain, padded = pool_of(places, weights), pool_of(places, weights, masked=5)
    for method in (minimum_bayes_risk, log_probability):
        first, second = method(plain, TUNING), method(padded, TUNING)
        np.testing.assert_array_equal(first.lat_lon, second.lat_lon)
        np.testing.assert_allclose(first.confidence, second.confidence)
    # Where there is no entry the arrays hold (0, 0): here the best place of all, were it one.
    decided = minimum_bayes_risk(pool_of([(0.0, 0.12), (0.0, -0.12)], [0.51, 0.49], masked=1), TUNING)
    assert decided.lat_lon.tolist() == [[0.0, 0.12]]


def test_confidence_is_a_chance_that_grows_with_the_radius(pool: Pool, neighbors: Neighbors) -> None:
    for decided in (minimum_bayes_risk(pool, TUNING), log_probability(pool, TUNING), density(neighbors, TUNING)):
        assert decided.confidence.shape == (PHOTOS, 5)
        assert (decided.confidence >= 0).all() and (decided.confidence <= 1).all()
        assert (np.diff(decided.confidence, axis=1) >= -1e-9).all()


def test_log_probability_takes_the_heaviest_entry(pool: Pool) -> None:
    decided = log_probability(pool, TUNING)
    heaviest = [max(entries(pool, b), key=lambda entry: entry[3]) for b in range(PHOTOS)]
    np.testing.assert_allclose(decided.lat_lon, [entry[:2] for entry in heaviest])
    assert [SOURCES[s] for s in decided.source] == [entry[2] for entry in heaviest]


@pytest.mark.parametrize("spread", [6.0, 15.0, 25.0])
def test_the_chance_to_lie_within_a_radius_matches_drawing(spread: float) -> None:
    grid, inside = _disk_chance(spread)
    offsets = np.random.default_rng(0).normal(0, spread, (100_000, 2))
    for r, radius in enumerate(RADII_KM):
        beside = radius + spread * np.array([-30, -3, -1, -0.6, -0.3, 0, 0.5, 1, 2, 30])
        for distance in beside[beside >= 0]:
            drawn = np.mean(np.hypot(offsets[:, 0] + distance, offsets[:, 1]) <= radius)
            assert np.interp(distance, grid, inside[:, r]) == pytest.approx(drawn, abs=0.015)
    assert (np.diff(inside, axis=1) >= 0).all() and (inside[-1] == 0).all()
    # At its own place by Rayleigh's law.
    np.testing.assert_allclose(inside[0], 1 - np.exp(-0.5 * (np.array(RADII_KM) / spread) ** 2), atol=0.002)


def test_density_takes_the_neighbour_among_many() -> None:
    lat_lon = np.array([[[0.0, 0.0], [40.0, 10.0], [40.3, 10.0], [40.6, 10.0]]])
    near = Neighbors(np.arange(4)[None], lat_lon, np.array([[0.92, 0.9, 0.89, 0.88]], np.float32))
    assert nearest(near, TUNING).lat_lon.tolist() == [[0.0, 0.0]]
    assert density(near, TUNING).lat_lon.tolist() == [[40.3, 10.0]]
    # With a kernel of a few metres every neighbour stands alone.
    assert density(near, replace(TUNING, density_km=0.01)).lat_lon.tolist() == [[0.0, 0.0]]


def test_the_kernel_of_the_density_is_gaussian() -> None:
    # Two neighbours 100 km apart, one spread: together 1 + exp(-1 / 2) = 1.61 against one of weight 1.5 or 1.7.
    lat_lon = np.array([[[50.0, 50.0], [0.0, 0.0], [0.0, 0.8993]]])
    for weight, expected in ((1.5, 0.0), (1.7, 50.0)):
        scores = np.array([[0.5 + math.log(weight) / TUNING.neighbor_scale, 0.5, 0.5]], np.float32)
        near = Neighbors(np.arange(3)[None], lat_lon, scores)
        assert density(near, TUNING).lat_lon[0, 0] == expected


def test_density_is_a_plain_loop(neighbors: Neighbors) -> None:
    decided = density(neighbors, TUNING)
    for b in range(PHOTOS):
        weight = np.exp(TUNING.neighbor_scale * neighbors.scores[b].astype(float))
        heights = [
            sum(w * math.exp(-0.5 * float(haversine_km(*here, *there) / 100.0) ** 2)
                for w, there in zip(weight, neighbors.lat_lon[b], strict=True))
            for here in neighbors.lat_lon[b]
        ]  # fmt: skip
        np.testing.assert_array_equal(decided.lat_lon[b], neighbors.lat_lon[b, int(np.argmax(heights))])


def test_nearest_is_the_first_neighbour(neighbors: Neighbors) -> None:
    decided = nearest(neighbors, TUNING)
    np.testing.assert_array_equal(decided.lat_lon, neighbors.lat_lon[:, 0])
    assert (decided.source == NEIGHBOUR).all()
    # Neighbours in one place: sure beyond the spread.
    same = Neighbors(neighbors.rows, np.repeat(neighbors.lat_lon[:, :1], K, axis=1), neighbors.scores)
    np.testing.assert_allclose(nearest(same, TUNING).confidence[:, 2:], 1)


def test_alignment_multiplies_the_weights() -> None:
    made = pool_of([(0.0, 0.0), (10.0, 10.0), (20.0, 20.0)], [0.5, 0.3, 0.2], masked=1)
    aligned = align(made, np.array([[0.1, 0.2, -0.1, 0.9]], np.float32), 10.0)
    expected = np.array([0.5, 0.3, 0.2]) * np.exp(10.0 * np.array([0.1, 0.2, -0.1]))
    np.testing.assert_allclose(np.exp(aligned.log_weight[0, :3]), expected / expected.sum(), rtol=1e-5)
    assert aligned.log_weight[0, 3] == -np.inf and aligned.log_weight.dtype == np.float32
    np.testing.assert_array_equal(aligned.mask, made.mask)


def test_alignment_of_equals_changes_nothing(pool: Pool) -> None:
    aligned = align(pool, np.full(pool.mask.shape, 0.7, np.float32), 10.0)
    np.testing.assert_allclose(aligned.log_weight, pool.log_weight, atol=1e-5)


def test_log_softmax_keeps_minus_infinity() -> None:
    values = np.array([[1000.0, -np.inf, 1000.0], [0.0, -800.0, -np.inf]])
    result = log_softmax(values)
    np.testing.assert_allclose(result, [[-math.log(2), -np.inf, -math.log(2)], [0.0, -800.0, -np.inf]], atol=1e-9)


def test_predictions_become_rows(pool: Pool) -> None:
    decided = minimum_bayes_risk(pool, TUNING)
    rows = decided.rows([str(b) for b in range(PHOTOS)])
    assert [row.id for row in rows] == ["0", "1", "2", "3", "4", "5"]
    lat_lon: NDArray[np.float64] = np.array([[row.lat, row.lon] for row in rows], float)
    np.testing.assert_array_equal(lat_lon, decided.lat_lon)
    assert rows[0].source in SOURCES and rows[0].error is None and len(rows[0].confidence or ()) == 5


def test_verified_decision_is_sharp_and_its_confidence_mild() -> None:
    made = pool_of([(0.0, 0.0), (40.0, 40.0)], [0.5, 0.5], masked=0)
    similar = np.array([[0.0, 0.1]], np.float32)
    tuning = replace(TUNING, alignment_scale=1000.0, confidence_scale=10.0)
    decided = decide(made, similar, tuning)
    assert decided.lat_lon.tolist() == [[40.0, 40.0]]
    # exp(10 * 0.1) to 1, not the certainty of the sharp scale.
    np.testing.assert_allclose(decided.confidence[0, 3], np.e / (1 + np.e), atol=1e-3)
    assert decide(made, None, tuning).lat_lon.tolist() == minimum_bayes_risk(made, tuning).lat_lon.tolist()
