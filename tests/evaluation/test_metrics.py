"""Figures of a run: by hand, against slow loops, and with photos that have no answer."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rag_geotoken.errors import GeoError
from rag_geotoken.evaluation.metrics import (
    RADII_KM,
    abstention,
    accuracy,
    bootstrap,
    calibration,
    geoscore,
    summary,
)

NAN = math.nan


def _variants(photos: int = 200, seed: int = 0) -> np.ndarray:
    """Three variants on the same photos: one, the same a little better, and one of its own with holes."""
    rng = np.random.default_rng(seed)
    first = 10 ** rng.uniform(-1, 4.2, photos)
    other = 10 ** rng.uniform(0, 4.2, photos)
    other[rng.random(photos) < 0.1] = NAN
    return np.stack([first, first * 0.5, other])


def test_accuracy_by_hand() -> None:
    assert accuracy([0.5, 30.0, NAN, 9000.0]) == {"1": 25.0, "25": 25.0, "200": 50.0, "750": 50.0, "2500": 50.0}


def test_radius_itself_is_within() -> None:
    assert accuracy([1.0, 25.0, 200.0, 750.0, 2500.0]) == {"1": 20, "25": 40, "200": 60, "750": 80, "2500": 100}
    assert accuracy([math.nextafter(1.0, 2.0)])["1"] == 0


def test_no_answer_counts_in_every_figure() -> None:
    assert accuracy([NAN, NAN])["2500"] == 0
    nothing = np.zeros((5, 2))
    assert summary([1.0, 2.0, NAN], nothing)["median_km"] == 2.0
    assert summary([1.0, NAN, NAN], nothing)["median_km"] is None
    assert summary([1.0, NAN], nothing)["median_km"] is None
    assert geoscore([0.0, NAN]) == 2500.0


def test_geoscore_by_hand() -> None:
    assert geoscore([1492.7]) == pytest.approx(5000 / math.e)
    assert geoscore([0.0]) == 5000.0


def test_bootstrap_is_seeded() -> None:
    km = _variants()
    np.testing.assert_array_equal(bootstrap(km, 7).accuracy, bootstrap(km, 7).accuracy)
    assert not np.array_equal(bootstrap(km, 7).accuracy, bootstrap(km, 8).accuracy)


def test_bootstrap_agrees_with_a_loop() -> None:
    km = _variants()
    rng = np.random.default_rng(1)
    hits = km[..., None] <= np.array(RADII_KM)  # (V, N, R)
    means = np.stack([100 * hits[:, rng.integers(0, 200, 200)].mean(1) for _ in range(4000)])  # (draws, V, R)
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    ours = bootstrap(km, 0, draws=4000)
    np.testing.assert_allclose(ours.accuracy[..., 0], low, atol=1.01)  # two photos of 200
    np.testing.assert_allclose(ours.accuracy[..., 1], high, atol=1.01)
    gap = means[:, 1] - means[:, 2]
    np.testing.assert_allclose(ours.difference[1, 2], np.quantile(gap, (0.025, 0.975), axis=0).T, atol=1.01)


def test_differences_are_paired() -> None:
    ours = bootstrap(_variants(), 0)
    assert ours.accuracy.shape == (3, 5, 2) and ours.difference.shape == (3, 3, 5, 2)
    assert np.all(ours.difference[np.arange(3), np.arange(3)] == 0)  # a variant against itself, draw by draw
    np.testing.assert_allclose(ours.difference[0, 2], -ours.difference[2, 0][:, ::-1])
    # The second variant hits wherever the first does: unpaired draws would let the interval fall below zero.
    assert np.all(ours.difference[1, 0] >= 0)
    width = np.diff(ours.difference[1, 0])[:, 0]
    assert np.all(width[1:4] < 0.6 * np.diff(ours.accuracy[0])[1:4, 0])


def test_bootstrap_covers() -> None:
    """Of many samples from one law, about 95 in 100 intervals hold the true share."""
    rng = np.random.default_rng(3)
    inside = 0
    for seed in range(200):
        km = np.where(rng.random(400) < 0.3, 10.0, 9999.0)
        low, high = bootstrap(km, seed, draws=300).accuracy[0, 1]
        inside += low <= 30 <= high
    assert 178 <= inside <= 199


def test_summary_is_json_and_consistent() -> None:
    interval = bootstrap(_variants(), 9).accuracy[2]
    row = json.loads(json.dumps(summary(_variants()[2], interval), allow_nan=False))
    assert row["n"] == 200
    assert list(row["acc"]) == list(row["ci95"]) == ["1", "25", "200", "750", "2500"]
    assert all(row["ci95"][r][0] <= row["acc"][r] <= row["ci95"][r][1] for r in row["acc"])
    assert row["ci95"]["25"] == pytest.approx(interval[1], abs=1e-4)


def test_calibration_by_hand() -> None:
    stated = np.repeat([[0.9], [0.9], [0.1], [0.1]], 5, axis=1)
    table = calibration(stated, [10.0, 9999.0, 10.0, NAN])
    assert table["25"]["ece"] == pytest.approx(0.4)  # half right in both bins: 0.4 off each
    assert table["25"]["bins"] == [
        {"low": 0.1, "high": 0.2, "n": 2, "confidence": 0.1, "correct": 0.5},
        {"low": 0.9, "high": 1.0, "n": 2, "confidence": 0.9, "correct": 0.5},
    ]
    assert table["1"]["ece"] == pytest.approx(0.5)


def test_calibrated_confidence_has_a_small_error() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    km = np.where(rng.random(20_000) < p, 0.5, 9999.0)
    table = calibration(np.repeat(p[:, None], 5, axis=1), km)
    assert all(row["ece"] < 0.02 for row in table.values())
    assert all(row["ece"] > 0.2 for row in calibration(np.repeat(1 - p[:, None], 5, axis=1), km).values())


def test_calibration_leaves_out_what_states_nothing() -> None:
    table = calibration([[NAN] * 5, [1.0] * 5], [NAN, 0.0])
    assert table["1"] == {
        "ece": 0.0,
        "n": 1,
        "bins": [{"low": 0.9, "high": 1.0, "n": 1, "confidence": 1.0, "correct": 1.0}],
    }
    assert calibration([[NAN] * 5], [0.0])["1"] == {"ece": None, "n": 0, "bins": []}
    json.dumps(table, allow_nan=False)


def test_abstention_by_hand() -> None:
    whole, _, _, half, _ = abstention([1.0, 9.0, 2.0, NAN], [0.5, 900.0, 30.0, NAN])
    assert half == {
        "kept": 0.5,
        "n": 2,
        "max_area_km2": 2.0,
        "acc": {"1": 50.0, "25": 50.0, "200": 100.0, "750": 100.0, "2500": 100.0},
        "median_km": 15.25,
    }
    assert (whole["n"], whole["max_area_km2"], whole["median_km"]) == (4, None, 465.0)
    assert whole["acc"] == {"1": 25.0, "25": 25.0, "200": 50.0, "750": 50.0, "2500": 75.0}
    json.dumps([half, whole], allow_nan=False)


def test_abstention_keeps_the_least_spread() -> None:
    rng = np.random.default_rng(0)
    area = rng.lognormal(8, 2, 1000)
    km = area / 100  # the wider, the worse
    rows = abstention(area, km)
    assert [(row["kept"], row["n"]) for row in rows] == [(1.0, 1000), (0.9, 900), (0.75, 750), (0.5, 500), (0.25, 250)]
    assert rows[0]["acc"] == {r: round(v, 4) for r, v in accuracy(km).items()}
    for row in rows:
        kept = np.sort(km)[: row["n"]]
        assert row["median_km"] == pytest.approx(np.median(kept), abs=1e-4)
        assert row["max_area_km2"] == pytest.approx(100 * kept[-1], rel=1e-5)
    shares = [row["acc"]["25"] for row in rows]
    assert shares == sorted(shares) and shares[-1] > shares[0] + 20
    blind = abstention(rng.permutation(area), km)
    assert abs(blind[-1]["acc"]["25"] - blind[0]["acc"]["25"]) < 10


def test_abstention_counts_no_answer_as_wrong_and_keeps_one_photo() -> None:
    rest, *_, sure = abstention([1.0, 2.0], [NAN, 0.0])  # a quarter of two photos is one
    assert (sure["n"], sure["acc"]["2500"], sure["median_km"]) == (1, 0.0, None)
    assert rest["acc"]["1"] == 50.0
    ties = abstention([5.0] * 4, [0.0, 0.0, 99.0, 99.0])  # equals stay in order
    assert (ties[3]["kept"], ties[3]["acc"]["1"]) == (0.5, 100.0)


def test_wrong_input_is_named() -> None:
    with pytest.raises(GeoError, match="no photos"):
        accuracy([])
    with pytest.raises(GeoError, match="negative"):
        accuracy([-1.0])
    with pytest.raises(GeoError, match="2 axes"):
        bootstrap(np.zeros((2, 2, 2)), 0)
    with pytest.raises(GeoError, match=r"\(2, 5\)"):
        calibration([[0.5, 0.5]], [1.0, 2.0])
    with pytest.raises(GeoError, match="percent"):
        calibration([[50.0] * 5], [1.0])
    with pytest.raises(GeoError, match="no photos"):
        abstention([], [])
    with pytest.raises(GeoError, match="each of the 2 photos"):
        abstention([1.0], [1.0, 2.0])
    with pytest.raises(GeoError, match="area is negative"):
        abstention([-1.0], [1.0])
