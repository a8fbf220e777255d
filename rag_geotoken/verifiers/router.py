"""These functions choose between the pool's answer and a place that the multimodal model named itself.

Text in a photo may contain instructions, and a model may follow them (prompt injection). So a place of its own counts
only near a place that retrieval or generation found too, and only where the alignment gives it about the same score.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision.confidence import calibrated, confidence
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.geo.sphere import Floats, haversine_km
from rag_geotoken.types import MLLM, RADII_KM, Pool, Predictions

GATE_KM, GATE_SCORE = 500.0, 0.05  # farthest from a pool's entry; most that the cosine may be below the answer's
NEAR_KM = 200.0


def features(pool: Pool, decided: Predictions, own: Floats, stated: Floats, gain: Floats) -> Floats:
    """Return the features (B, 6) of the choice, the first a one.

    own (B, 2): the model's places, NaN for none; stated (B,): its confidence from 0 to 1; gain (B,): how much more
    similar the photo is to the model's place than to the pool's answer.
    """
    distance = haversine_km(pool.lat_lon[..., 0], pool.lat_lon[..., 1], own[:, :1], own[:, 1:])
    weight = np.where(distance <= NEAR_KM, pool.weight, 0.0)
    apart = np.log1p(haversine_km(*decided.lat_lon.T, *own.T))
    chance = decided.confidence[:, RADII_KM.index(int(NEAR_KM))]
    columns = [np.ones(len(own)), stated, chance, weight.sum(axis=1), 10 * gain, apart / 10]
    finite: Floats = np.nan_to_num(np.stack(columns, axis=1))
    return finite


def gate(pool: Pool, own: Floats, gain: Floats) -> NDArray[np.bool_]:
    """Return a mask (B,), true where a model's place (B, 2) may override the pool's answer; NaN never may."""
    distance = haversine_km(pool.lat_lon[..., 0], pool.lat_lon[..., 1], own[:, :1], own[:, 1:])
    near = np.where(pool.mask, distance, np.inf).min(axis=1) <= GATE_KM
    inside: NDArray[np.bool_] = near & (gain >= -GATE_SCORE) & np.isfinite(own).all(axis=1)
    return inside


def route(
    pool: Pool, decided: Predictions, own: Floats, *, stated: Floats, gain: Floats, tuning: Tuning, verified: str
) -> Predictions:
    """Choose the pool's answer, or the model's own place where that is more likely better and inside the gate.

    ``tuning.router`` are the weights of :func:`features` in the log odds; ``verified`` names the calibration of the
    confidence in a place of the model's own.
    """
    log_odds = features(pool, decided, own, stated=stated, gain=gain) @ np.asarray(tuning.router)
    chosen = (log_odds > 0) & gate(pool, own, gain)
    if not chosen.any():
        return decided
    lat_lon = np.where(chosen[:, None], own, decided.lat_lon)
    chances = confidence(pool, lat_lon, tuning.confidence_km)
    pairs = tuning.calibration.get(verified)
    return replace(
        decided,
        lat_lon=lat_lon,
        confidence=np.where(chosen[:, None], calibrated(chances, pairs) if pairs else chances, decided.confidence),
        source=np.where(chosen, MLLM, decided.source).astype(np.int8),
    )


def fit_router(columns: Floats, ours: Floats, own: Floats) -> tuple[float, ...]:
    """Fit the weights of the choice by logistic regression on which answer is the better one.

    columns (B, 6): see :func:`features`; ours, own (B,): distances of the pool's answer and of the model's place from
    the truth. A photo counts by how many of the radii the two differ in, so one where both are right or wrong does not
    count. Weights are pulled towards never choosing the model's place.
    """
    from scipy.optimize import minimize

    radii = np.asarray(RADII_KM)
    gained = (own[:, None] <= radii).mean(axis=1) - (ours[:, None] <= radii).mean(axis=1)
    label, weight = np.sign(gained), np.abs(gained)
    prior = np.zeros(columns.shape[1])
    prior[0] = -1.0

    def loss(w: Floats) -> tuple[float, Floats]:
        margin = label * (columns @ w)
        slope = -weight * label / (1 + np.exp(np.clip(margin, -50, 50)))
        value = float(weight @ np.logaddexp(0, -margin)) + float((w - prior) @ (w - prior)) / 2
        return value, columns.T @ slope + (w - prior)

    return tuple(float(value) for value in minimize(loss, prior, jac=True, method="L-BFGS-B").x)
