"""Between the pool's answer and a place of the model's own: a calibrated choice, inside a gate.

A photo may carry writing that gives orders, and a model may obey it. So a place of its own counts only near a place
that retrieval or generation found too, and only where the alignment finds it about as likely as the pool's answer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision.confidence import calibrated, confidence
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.geo.sphere import Floats, haversine_km
from rag_geotoken.types import MLLM, RADII_KM, Pool, Predictions

GATE_KM, GATE_SCORE = 500.0, 0.05  # from a pool's entry; less similar to the photo than the pool's answer
NEAR_KM = 200.0


def features(pool: Pool, decided: Predictions, own: Floats, stated: Floats, gain: Floats) -> Floats:
    """What the choice is made by -> (B, 6), the first a one.

    own (B, 2): the model's places, NaN for none; stated (B,): its confidence from 0 to 1; gain (B,): how much more
    similar the photo is to the model's place than to the pool's answer.
    """
    away = haversine_km(pool.lat_lon[..., 0], pool.lat_lon[..., 1], own[:, :1], own[:, 1:])
    weight = np.where(away <= NEAR_KM, pool.weight, 0.0)
    apart = np.log1p(haversine_km(*decided.lat_lon.T, *own.T))
    sure = decided.confidence[:, RADII_KM.index(int(NEAR_KM))]
    columns = np.stack([np.ones(len(own)), stated, sure, weight.sum(axis=1), 10 * gain, apart / 10], axis=1)
    known: Floats = np.nan_to_num(columns)
    return known


def gate(pool: Pool, own: Floats, gain: Floats) -> NDArray[np.bool_]:
    """Where a model's place (B, 2) may override the pool's answer; never where it has none."""
    away = haversine_km(pool.lat_lon[..., 0], pool.lat_lon[..., 1], own[:, :1], own[:, 1:])
    near = np.where(pool.mask, away, np.inf).min(axis=1) <= GATE_KM
    inside: NDArray[np.bool_] = near & (gain >= -GATE_SCORE) & np.isfinite(own).all(axis=1)
    return inside


def route(
    pool: Pool, decided: Predictions, own: Floats, stated: Floats, gain: Floats, tuning: Tuning, verified: str
) -> Predictions:
    """The pool's answer, or the model's own place where that is likelier the better one and inside the gate.

    ``tuning.router`` are the weights of :func:`features` in the log odds; ``verified`` names the calibration of what is
    said of a place of the model's own.
    """
    odds = features(pool, decided, own, stated, gain) @ np.asarray(tuning.router)
    chosen = (odds > 0) & gate(pool, own, gain)
    if not chosen.any():
        return decided
    sure = confidence(pool, np.where(chosen[:, None], own, decided.lat_lon), tuning.confidence_km)
    pairs = tuning.calibration.get(verified)
    return replace(
        decided,
        lat_lon=np.where(chosen[:, None], own, decided.lat_lon),
        confidence=np.where(chosen[:, None], calibrated(sure, pairs) if pairs else sure, decided.confidence),
        source=np.where(chosen, MLLM, decided.source).astype(np.int8),
    )


def fit_router(columns: Floats, ours: Floats, own: Floats) -> tuple[float, ...]:
    """Weights of the choice from photos with known places: logistic regression on which answer is the better one.

    columns (B, 6): see :func:`features`; ours, own (B,): distances of the pool's answer and of the model's place from
    the truth. A photo counts by how many of the radii the two differ in, so one where both are right or wrong counts
    nothing. Weights are pulled towards never choosing the model's place.
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

    found: Floats = minimize(loss, prior, jac=True, method="L-BFGS-B").x
    return tuple(float(value) for value in found)
