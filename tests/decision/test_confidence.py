"""Confidence: the chance by a pool's weights against drawing and plain loops, and its calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit
from tiny import PHOTOS, TUNING, pool_of

from rag_geotoken.decision.confidence import _disk_chance, calibrated, confidence, fit_calibration
from rag_geotoken.geo.sphere import Floats, haversine_km
from rag_geotoken.types import RADII_KM, Pool

Hits = NDArray[np.bool_]
NOTHING = ((0.0, 1.0),) * 5
INTERCEPTS, SLOPES = np.array([0.8, -1.0, 0.3, 0.0, -0.5]), np.array([0.8, 0.5, 0.25, 0.35, 1.0])


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


def test_confidence_is_a_plain_loop(pool: Pool) -> None:
    places = pool.lat_lon[:, 1] + 0.3
    found = confidence(pool, places, TUNING.confidence_km)
    grid, inside = _disk_chance(TUNING.confidence_km)
    for b in range(PHOTOS):
        expected = np.zeros(len(RADII_KM))
        for c in np.flatnonzero(pool.mask[b]):
            km = float(haversine_km(*places[b], *pool.lat_lon[b, c]))
            at = [np.interp(km, grid, inside[:, r]) for r in range(len(RADII_KM))]
            expected += math.exp(pool.log_weight[b, c]) * np.array(at)
        np.testing.assert_allclose(found[b], expected, atol=1e-6)
    assert (found >= 0).all() and (found <= 1).all() and (np.diff(found, axis=1) >= -1e-9).all()


def test_masked_entries_never_count() -> None:
    place = np.array([[0.0, 0.0]])  # where the arrays hold no entry, at that
    plain = pool_of([(0.2, 0.0), (5.0, 5.0)], [0.45, 0.55])
    padded = pool_of([(0.2, 0.0), (5.0, 5.0)], [0.45, 0.55], masked=5)
    np.testing.assert_allclose(confidence(plain, place, 15.0), confidence(padded, place, 15.0))


# calibration


def distorted(photos: int, seed: int) -> tuple[Floats, Hits, Floats]:
    """Chances as stated (B, R) by one too sure of herself, what came true (B, R), and the true chances (B, R)."""
    rng = np.random.default_rng(seed)
    true = np.sort(expit(rng.normal(0.5, 1.5, (photos, len(RADII_KM)))), axis=1)
    right = rng.uniform(size=(photos, 1)) < true
    return expit((logit(true) - INTERCEPTS) / SLOPES), right, true


def ece(stated: Floats, right: Hits, bins: int = 15) -> float:
    """Expected calibration error of one radius: by hand, bin by bin."""
    total = 0.0
    for b in range(bins):
        inside = [i for i, p in enumerate(stated.tolist()) if min(int(p * bins), bins - 1) == b]
        if inside:
            total += abs(sum(stated[inside]) - sum(right[inside])) / len(stated)
    return float(total)


def test_a_logistic_distortion_is_found_and_undone() -> None:
    stated, right, _ = distorted(6000, 0)
    pairs = fit_calibration(stated, right)
    np.testing.assert_allclose([a for a, _ in pairs], INTERCEPTS, atol=0.15)
    np.testing.assert_allclose([b for _, b in pairs], SLOPES, rtol=0.15)
    fresh, came, true = distorted(6000, 1)
    mended = calibrated(fresh, pairs)
    for r in range(len(RADII_KM)):
        assert ece(mended[:, r], came[:, r]) < 0.02
        assert ece(fresh[:, r], came[:, r]) > 0.04
    assert np.abs(mended - true).mean() < 0.02 < np.abs(fresh - true).mean()


def test_calibrated_is_platts_formula_kept_growing() -> None:
    stated = np.array([[0.1, 0.2, 0.5, 0.9, 0.95], [0.3, 0.3, 0.3, 0.3, 0.3]])
    pairs = ((0.5, 1.0), (-2.0, 0.5), (0.0, 2.0), (1.0, 0.0), (0.0, 1.0))
    for row, found in zip(stated.tolist(), calibrated(stated, pairs).tolist(), strict=True):
        most = 0.0
        for p, (a, b), given in zip(row, pairs, found, strict=True):
            most = max(most, 1 / (1 + math.exp(-a - b * math.log(p / (1 - p)))))
            assert given == pytest.approx(most)


def test_calibrated_grows_with_the_radius_whatever_the_pairs() -> None:
    rng = np.random.default_rng(0)
    stated = np.sort(rng.uniform(size=(500, 5)), axis=1)
    for _ in range(20):
        pairs = list(zip(rng.normal(0, 3, 5).tolist(), rng.uniform(0, 4, 5).tolist(), strict=True))
        mended = calibrated(stated, pairs)
        assert (np.diff(mended, axis=1) >= 0).all() and (mended >= 0).all() and (mended <= 1).all()


def test_nothing_to_calibrate_changes_nothing() -> None:
    stated = np.sort(np.random.default_rng(0).uniform(size=(100, 5)), axis=1)
    np.testing.assert_allclose(calibrated(stated, NOTHING), stated, atol=1.1e-4)
    certain = calibrated(np.array([[0.0, 0.0, 0.5, 1.0, 1.0]]), NOTHING)
    np.testing.assert_allclose(certain, [[1e-4, 1e-4, 0.5, 1 - 1e-4, 1 - 1e-4]])


@pytest.mark.parametrize("always", [True, False])
def test_all_right_and_all_wrong_stay_finite(always: bool) -> None:
    rng = np.random.default_rng(0)
    stated = np.sort(rng.uniform(size=(200, 5)), axis=1)
    stated[:, 3] = 0.7  # and where all say the same
    pairs = fit_calibration(stated, np.full((200, 5), always))
    assert np.isfinite(pairs).all() and np.abs(pairs).max() < 20
    mended = calibrated(stated, pairs)
    # Platt's softened targets.
    np.testing.assert_allclose(mended, 201 / 202 if always else 1 / 202, atol=2e-3)


@pytest.mark.parametrize("value", [0.0, 0.02, 0.5, 1.0])
def test_one_chance_for_all_becomes_the_share_that_came_true(value: float) -> None:
    right = np.random.default_rng(0).uniform(size=(1000, 5)) < [0.1, 0.3, 0.5, 0.7, 0.9]
    stated = np.full((1000, 5), value)
    expected = (right.sum(axis=0) + 0.5) / 1001
    np.testing.assert_allclose(calibrated(stated, fit_calibration(stated, right))[0], expected, atol=0.01)


def test_a_slope_that_would_fall_is_flat_at_the_share_that_came_true() -> None:
    # The surer, the wronger: such a confidence says nothing, so all get the same.
    rng = np.random.default_rng(0)
    stated = expit(rng.normal(3.0, 1.0, (3000, 5)))
    right = rng.uniform(size=stated.shape) < 0.4 * (1 - stated) + 0.2
    pairs = fit_calibration(stated, right)
    np.testing.assert_allclose([b for _, b in pairs], 0.0, atol=1e-6)
    np.testing.assert_allclose(expit(np.array([a for a, _ in pairs])), right.mean(axis=0), atol=0.01)
