"""How sure a decision is: the chance to lie within 1, 25, 200, 750 and 2500 km, by a pool's weights and calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.geo import haversine_km
from rag_geotoken.metrics import RADII_KM
from rag_geotoken.types import Pool

Floats = NDArray[np.float64]


def confidence(pool: Pool, lat_lon: Floats, spread_km: float) -> Floats:
    """The chance (B, R), by the pool's weights, that the truth lies within each radius of the places (B, 2)."""
    there = lat_lon[:, None, :]
    distance = haversine_km(there[..., 0], there[..., 1], pool.lat_lon[..., 0], pool.lat_lon[..., 1])[:, None, :]
    weight = np.exp(pool.log_weight.astype(np.float64))
    return np.clip(chances(distance, weight, spread_km)[:, 0], 0.0, 1.0)


def chances(distance: Floats, weight: Floats, spread_km: float) -> Floats:
    """Distance (B, M, C), weight (B, C) -> (B, M, R) chance that the true place lies within each radius."""
    grid, inside = _disk_chance(spread_km)
    columns = [(np.interp(distance, grid, inside[:, r]) @ weight[..., None])[..., 0] for r in range(len(RADII_KM))]
    return np.stack(columns, axis=-1)


@lru_cache(maxsize=4)
def _disk_chance(spread: float) -> tuple[Floats, Floats]:
    """A table: distances (D,) km and the chance (D, R) that a place normally spread around one so far is within r.

    The spread is a standard deviation an axis, so the distance follows Rice's law; points at equal quantiles of the
    normal law's radius and angle stand for it.
    """
    quantile, turn = (np.arange(512) + 0.5) / 512, np.pi * (np.arange(24) + 0.5) / 24
    radius = spread * np.sqrt(-2.0 * np.log1p(-quantile))[:, None]
    east, north = radius * np.cos(turn), radius * np.sin(turn)
    # Steps of a sixteenth of the spread across each radius: nothing changes far from all of them.
    edges = np.add.outer(np.array(RADII_KM), spread * np.linspace(-5.0, 5.0, 161))
    grid = np.unique(np.clip(np.append(edges, 20_040.0), 0.0, None))
    away = np.hypot(grid[:, None] + east.ravel(), north.ravel())
    return grid, np.stack([(away <= r).mean(axis=1) for r in RADII_KM], axis=-1)


def calibrated(stated: Floats, pairs: Sequence[tuple[float, float]]) -> Floats:
    """Platt scaling a radius: chances (B, R) -> 1 / (1 + exp(-a - b logit)), kept growing with the radius."""
    a, b = np.array(pairs).T
    moved = 1.0 / (1.0 + np.exp(-(a + b * _logit(stated))))
    return np.maximum.accumulate(moved, axis=1)


def fit_calibration(stated: Floats, right: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """Intercept and slope of each radius from chances (B, R) and what came true (B, R).

    Logistic regression by Newton's method, with Platt's softened targets (1999), so that a radius within which nothing
    or everything fell stays finite. The slope never falls below zero.
    """
    pairs = []
    for x, hit in zip(_logit(stated).T, right.T, strict=True):
        target = np.where(hit, (hit.sum() + 1.0) / (hit.sum() + 2.0), 1.0 / ((~hit).sum() + 2.0))
        design, weights = np.column_stack([np.ones_like(x), x]), np.array([0.0, 1.0])
        for _ in range(50):
            chance = 1.0 / (1.0 + np.exp(-design @ weights))
            # A faint pull towards doing nothing keeps the step finite where all x are alike.
            slope = design.T @ (chance - target) + 1e-3 * (weights - [0.0, 1.0])
            curve = (design * (chance * (1 - chance))[:, None]).T @ design + 1e-3 * np.eye(2)
            weights = weights - np.clip(np.linalg.solve(curve, slope), -1.0, 1.0)
        pairs.append((float(weights[0]), max(0.0, float(weights[1]))))
    return tuple(pairs)


def _logit(stated: Floats) -> Floats:
    clipped = np.clip(stated, 1e-4, 1 - 1e-4)
    odds: Floats = np.log(clipped / (1 - clipped))
    return odds
