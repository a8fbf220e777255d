"""The decision over a verified pool against plain loops, and snapping it to a cluster of neighbors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import PHOTOS, TOKENIZER, TUNING, OneLine, pool_of

from rag_geotoken.decision import strategies
from rag_geotoken.decision.confidence import _disk_chance, calibrated, confidence
from rag_geotoken.decision.strategies import Chosen, Given, bayes_risk, decide
from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.geo.sphere import Floats, haversine_km
from rag_geotoken.options import verified_by
from rag_geotoken.types import BEAM, NEIGHBOR, RADII_KM, Neighbors, Pool

PAIRS = {
    "none": ((0.5, 0.8),) * 5,
    "alignment": ((-1.0, 0.7), (0.0, 0.5), (0.2, 1.2), (1.0, 1.0), (2.0, 0.1)),
    "alignment+reward": ((0.0, 1.0),) * 5,
}
MODES = [(), ("alignment",), ("reward",), ("alignment", "reward"), ("reward", "alignment")]


def verdicts(pool: Pool, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Scores of verifiers, the highest of all where there is no entry."""
    found = {}
    for name in names:
        drawn = np.random.default_rng(len(name)).normal(0, 0.3, pool.mask.shape)
        found[name] = np.where(pool.mask, drawn, 50.0).astype(np.float32)
    return found


def chances_at(here: Floats, places: Floats, weights: Floats, spread: float) -> Floats:
    """The chance to lie within each radius: by the entries' weights, one after the other."""
    grid, inside = _disk_chance(spread)
    total = np.zeros(len(RADII_KM))
    for place, weight in zip(places, weights, strict=True):
        km = float(haversine_km(*here, *place))
        total += weight * np.array([np.interp(km, grid, inside[:, r]) for r in range(len(RADII_KM))])
    return total


@pytest.mark.parametrize("names", MODES, ids="+".join)
def test_a_decision_is_a_plain_loop(names: Sequence[str], pool: Pool) -> None:
    tuning = replace(TUNING, spread_km=60.0, calibration=PAIRS)
    scores = verdicts(pool, names)
    decided = decide(pool, Given(scores, tuning))
    scales = {"alignment": tuning.alignment_scale, "reward": tuning.reward_scale}
    for b in range(PHOTOS):
        kept = np.flatnonzero(pool.mask[b])
        places = pool.lat_lon[b, kept]
        logs = [float(pool.log_weight[b, c]) + sum(scales[n] * float(scores[n][b, c]) for n in names) for c in kept]
        weights = np.array([math.exp(x - max(logs)) for x in logs])
        weights /= weights.sum()
        values = [chances_at(here, places, weights, 60.0).mean() for here in places]
        best = int(np.argmax(values))
        np.testing.assert_allclose(decided.lat_lon[b], places[best])
        assert decided.source[b] == pool.source[b, kept[best]]
        milder = weights**tuning.confidence_scale
        sure = chances_at(places[best], places, milder / milder.sum(), tuning.confidence_km)[None]
        pairs = PAIRS.get("+".join(sorted(names)) or "none")
        expected = sure if pairs is None else calibrated(sure, pairs)
        np.testing.assert_allclose(decided.confidence[b], expected[0], atol=1e-4)


def test_verdicts_change_the_decision(pool: Pool) -> None:
    found = [decide(pool, Given(verdicts(pool, names), TUNING)).lat_lon for names in MODES[:4]]
    for i in range(4):
        for j in range(i):
            assert (found[i] != found[j]).any()


def test_the_names_of_the_verifiers_in_one() -> None:
    assert verified_by([]) == "none" and verified_by(("alignment",)) == "alignment"
    assert verified_by(["reward", "alignment"]) == verified_by({"alignment": 1, "reward": 2}) == "alignment+reward"


def test_without_verifiers_it_is_bayes_risk(pool: Pool) -> None:
    plain = bayes_risk(pool, Given({}, TUNING))
    found = decide(pool, Given({}, replace(TUNING, confidence_scale=1.0)))
    np.testing.assert_array_equal(found.lat_lon, plain.lat_lon)
    np.testing.assert_array_equal(found.source, plain.source)
    np.testing.assert_allclose(found.confidence, confidence(pool, plain.lat_lon, TUNING.confidence_km), atol=1e-6)


def test_a_decision_is_sharp_and_its_confidence_mild() -> None:
    made = pool_of([(0.0, 0.0), (40.0, 40.0)], [0.5, 0.5], masked=3)
    similar = np.array([[0.0, 0.1, 0.5, 0.5, 0.5]], np.float32)
    tuning = replace(TUNING, alignment_scale=1000.0, confidence_scale=0.01)
    decided = decide(made, Given({"alignment": similar}, tuning))
    assert decided.lat_lon.tolist() == [[40.0, 40.0]]
    # exp(1000 * 0.1 * 0.01) to 1, not the certainty of the sharp scale.
    np.testing.assert_allclose(decided.confidence[0, 3], np.e / (1 + np.e), atol=1e-3)


# snapping


CELLS = S2Tokenizer(8, 2)  # about 30 km wide


def answers(*places: tuple[float, float]) -> Pool:
    """Photos each with one entry, which is the answer before it is moved."""
    one = len(places), 1
    return Pool(np.array(places)[:, None], np.zeros(one, np.float32), np.full(one, BEAM, np.int8), np.ones(one, bool))


def snap(given: Pool, neighbors: Neighbors, tokenizer: S2Tokenizer = CELLS) -> Chosen:
    return strategies.snap(given, Given({}, TUNING, neighbors, tokenizer))


def near(*photos: list[tuple[float, float]]) -> Neighbors:
    lat_lon = np.array(photos)
    scores = np.tile(np.linspace(0.9, 0.5, lat_lon.shape[1], dtype=np.float32), (len(photos), 1))
    return Neighbors(np.zeros(lat_lon.shape[:2], np.int64), lat_lon, scores)


def center() -> tuple[float, float]:
    lat, lon = CELLS.decode(CELLS.encode([47.0], [8.0]))
    return float(lat[0]), float(lon[0])


def test_snap_goes_to_the_densest_cluster_of_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    lat, lon = center()
    # A better ranked neighbor alone, three within 400 m, and a denser cluster in the cell beside.
    alone, beside = (lat + 0.05, lon), (lat + 0.6, lon)
    cluster = [(lat - 0.05, lon), (lat - 0.052, lon), (lat - 0.054, lon + 0.001)]
    found = snap(answers((lat, lon)), near([alone, *cluster, *[beside] * 4]))
    assert found.lat_lon.tolist() == [list(cluster[0])]
    assert (CELLS.cell_ids(*found.lat_lon.T) == CELLS.cell_ids([lat], [lon])).all()
    # With 50 m no neighbor has another: the better ranked of equals.
    monkeypatch.setattr(strategies, "SNAP_KM", 0.05)
    assert snap(answers((lat, lon)), near([alone, *cluster])).lat_lon.tolist() == [list(alone)]


def test_snap_leaves_an_answer_without_a_neighbor_in_its_cell() -> None:
    lat, lon = center()
    given = answers((lat, lon), (10.0, 10.0))
    around = near([(lat + 0.6, lon)] * 3, [(10.0, 10.0001), (10.0, 10.0002), (-10.0, 10.0)])
    found = snap(given, around)
    assert found.lat_lon.tolist() == [[lat, lon], [10.0, 10.0001]]
    assert found.source.tolist() == [BEAM, BEAM]
    # It is as sure as at the place that it was moved to: here as sure as before.
    moved, stayed = decide(given, Given({}, TUNING, around, CELLS), "snap"), decide(given, Given({}, TUNING))
    np.testing.assert_array_equal(moved.lat_lon, found.lat_lon)
    np.testing.assert_allclose(moved.confidence, stayed.confidence, atol=1e-3)


def test_snap_needs_neighbors(one_line: OneLine) -> None:
    with one_line("select snap needs neighbors"):
        decide(answers((10.0, 10.0)), Given({}, TUNING), "snap")


@pytest.mark.parametrize("within", [1.0, 60.0, 200.0])
def test_snap_is_a_plain_loop(pool: Pool, neighbors: Neighbors, within: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "SNAP_KM", within)
    given = bayes_risk(pool, Given({}, TUNING))
    found = snap(pool, neighbors, TOKENIZER)
    np.testing.assert_array_equal(found.source, given.source)
    moved = 0
    for b in range(PHOTOS):
        cell = int(TOKENIZER.cell_ids(*given.lat_lon[b]))
        places = [p for p in neighbors.lat_lon[b] if int(TOKENIZER.cell_ids(*p)) == cell]
        crowds = [sum(float(haversine_km(*p, *q)) <= within for q in places) for p in places]
        expected = places[int(np.argmax(crowds))] if places else given.lat_lon[b]
        np.testing.assert_array_equal(found.lat_lon[b], expected)
        moved += bool((found.lat_lon[b] != given.lat_lon[b]).any())
    assert (pool.source == NEIGHBOR).any() and moved < PHOTOS


def test_snap_moves_an_answer_that_is_a_cells_center() -> None:
    # Every neighbor around its cell's center: each answer moves, none leaves its cell.
    rng = np.random.default_rng(0)
    tokens = CELLS.encode(rng.uniform(-60, 60, 20), rng.uniform(-180, 180, 20))
    lat, lon = CELLS.decode(tokens)
    given = answers(*zip(lat.tolist(), lon.tolist(), strict=True))
    around = given.lat_lon + rng.normal(0, 0.04, (20, 6, 2))
    found = snap(given, near(*(list(map(tuple, row)) for row in around.tolist())))
    np.testing.assert_array_equal(CELLS.encode(*found.lat_lon.T), tokens)
    assert (found.lat_lon != given.lat_lon[:, 0]).any(axis=1).sum() > 15
