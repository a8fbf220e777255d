"""These functions compute a decision's confidence: the calibrated chance to lie within 1, 25, 200, 750 and 2500 km."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.geo.sphere import Floats, haversine_km
from rag_geotoken.types import RADII_KM, Pool

FARTHEST_KM = 20_040.0  # more than half the way around the Earth
POINTS = 2**16  # of a look-up table


def confidence(pool: Pool, lat_lon: Floats, spread_km: float) -> Floats:
    """Return the chance (B, R), by the pool's weights, that the truth lies within each radius of the places (B, 2)."""
    distance = haversine_km(lat_lon[:, :1], lat_lon[:, 1:], pool.lat_lon[..., 0], pool.lat_lon[..., 1])
    inside = [np.vecdot(disk_chance(distance, spread_km, radius), pool.weight) for radius in RADII_KM]
    chances: Floats = np.clip(np.stack(inside, axis=-1), 0.0, 1.0)
    return chances


def disk_chance(distance: Floats, spread_km: float, radius: int | None = None) -> Floats:
    """Return the chance that a normally spread place is within a radius, or its mean over all radii.

    distance (...): km from the center of the spread to the center of the radius; NaN stays NaN.
    """
    chance, step = _even_table(spread_km, radius)
    position = np.sqrt(distance * (1 / FARTHEST_KM)) * POINTS
    with np.errstate(invalid="ignore"):
        below = position.astype(np.int32)
    result: Floats = chance.take(below, mode="clip") + step.take(below, mode="clip") * (position - below)
    return result


@lru_cache(maxsize=16)
def _even_table(spread: float, radius: int | None) -> tuple[Floats, Floats]:
    """Tabulate :func:`_disk_chance` at even steps of the distance's square root, and the differences.

    So a look-up needs no search, which is ten times as fast; steps are small where radii are.
    """
    grid, inside = _disk_chance(spread)
    column = inside.mean(axis=1) if radius is None else inside[:, RADII_KM.index(radius)]
    chance: Floats = np.interp(FARTHEST_KM * (np.arange(POINTS + 1) / POINTS) ** 2, grid, column)
    return chance, np.diff(chance, append=chance[-1])


@lru_cache(maxsize=4)
def _disk_chance(spread: float) -> tuple[Floats, Floats]:
    """Tabulate distances (D,) km and the chance (D, R) that a place normally spread so far away is within each radius.

    The spread is a standard deviation per axis, so the distance follows Rice's law; points at equal quantiles of the
    normal law's radius and angle stand for it.
    """
    quantile, turn = (np.arange(512) + 0.5) / 512, np.pi * (np.arange(24) + 0.5) / 24
    radius = spread * np.sqrt(-2.0 * np.log1p(-quantile))[:, None]
    east, north = radius * np.cos(turn), radius * np.sin(turn)
    # Steps of a sixteenth of the spread across each radius: nothing changes far from all of them.
    edges = np.add.outer(np.array(RADII_KM), spread * np.linspace(-5.0, 5.0, 161))
    grid = np.unique(np.clip(np.append(edges, FARTHEST_KM), 0.0, None))
    distance = np.hypot(grid[:, None] + east.ravel(), north.ravel())
    return grid, np.stack([(distance <= r).mean(axis=1) for r in RADII_KM], axis=-1)


def calibrated(stated: Floats, pairs: Sequence[tuple[float, float]]) -> Floats:
    """Calibrate chances (B, R) by Platt scaling, 1 / (1 + exp(-a - b logit)), kept growing with the radius."""
    a, b = np.array(pairs).T
    return np.maximum.accumulate(np.exp(-np.logaddexp(0.0, -a - b * _logit(stated))), axis=1)


def fit_calibration(stated: Floats, right: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """Fit the intercept and slope of each radius to stated chances (B, R) and whether they came true (B, R).

    Logistic regression with Platt's softened targets (1999), so that a radius within which nothing or everything fell
    stays finite, and with no slope below zero.
    """
    from scipy.optimize import minimize

    pairs = []
    for x, hit in zip(_logit(stated).T, right.T, strict=True):
        target = np.where(hit, (hit.sum() + 1.0) / (hit.sum() + 2.0), 1.0 / ((~hit).sum() + 2.0))
        data, bounds = (np.column_stack([np.ones_like(x), x]), target), [(None, None), (0.0, None)]
        a, b = minimize(_log_loss, [0.0, 1.0], data, "SLSQP", jac=True, bounds=bounds, tol=1e-9).x
        pairs.append((float(a), float(b)))
    return tuple(pairs)


def _log_loss(weights: Floats, design: Floats, target: Floats) -> tuple[float, Floats]:
    """Return the logistic loss of intercept and slope (2,), and its gradient."""
    logit, change = design @ weights, weights - [0.0, 1.0]
    log_sum = np.logaddexp(0.0, logit)
    # A faint pull towards no change decides where all x are alike.
    loss = log_sum.sum() - target @ logit + 0.5e-3 * (change @ change)
    return float(loss), design.T @ (np.exp(logit - log_sum) - target) + 1e-3 * change


def _logit(stated: Floats) -> Floats:
    clipped = np.clip(stated, 1e-4, 1 - 1e-4)
    odds: Floats = np.log(clipped / (1 - clipped))
    return odds
