"""The router between pool and model's own place: its gate, its features, and that it learns which is better."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import pool_of

from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.types import MLLM, NEIGHBOR, Pool, Predictions
from rag_geotoken.verifiers.router import GATE_SCORE, features, fit_router, gate, route

FEATURES = 6
ALWAYS = replace(Tuning(), router=(9.0,) + (0.0,) * (FEATURES - 1))


def one(lat: float, lon: float) -> tuple[Pool, Predictions]:
    pool = pool_of([(lat, lon)], [1.0])
    return pool, Predictions(pool.lat_lon[:, 0], np.full((1, 5), 0.5), np.array([NEIGHBOR], np.int8))


@pytest.mark.parametrize(
    ("own", "gain", "inside"),
    [
        ((48.5, 16.5), 0.0, True),
        ((48.5, 16.5), -GATE_SCORE - 0.01, False),  # the alignment finds it less likely
        ((-33.0, 151.0), 1.0, False),  # nothing was found there
        ((np.nan, np.nan), 1.0, False),
    ],
)
def test_a_place_of_the_models_own_counts_only_inside_the_gate(
    own: tuple[float, float], gain: float, inside: bool
) -> None:
    pool, decided = one(48.2, 16.4)
    named, gains = np.array([own]), np.array([gain])
    assert gate(pool, named, gains).tolist() == [inside]
    routed = route(pool, decided, named, stated=np.ones(1), gain=gains, tuning=ALWAYS, verified="none")
    assert routed.lat_lon[0].tolist() == list(own if inside else (48.2, 16.4))
    assert routed.source[0] == (MLLM if inside else NEIGHBOR) and np.isfinite(routed.confidence).all()


def test_without_weights_the_pool_decides() -> None:
    pool, decided = one(48.2, 16.4)
    own, one_each = np.array([[48.3, 16.4]]), {"stated": np.ones(1), "gain": np.ones(1)}
    assert route(pool, decided, own, **one_each, tuning=Tuning(), verified="none") is decided


def test_it_learns_whom_to_believe() -> None:
    rng = np.random.default_rng(0)
    columns = np.column_stack([np.ones(2000), rng.random((2000, FEATURES - 1))])
    own_is_right = columns[:, 1] > 0.6  # where it says that it is sure
    weights = fit_router(columns, np.where(own_is_right, 900.0, 10.0), np.where(own_is_right, 10.0, 900.0))
    assert (((columns @ np.array(weights)) > 0) == own_is_right).mean() > 0.95


def test_where_both_are_equally_good_it_keeps_the_pools() -> None:
    columns = np.column_stack([np.ones(50), np.random.default_rng(0).random((50, FEATURES - 1))])
    weights = fit_router(columns, np.full(50, 10.0), np.full(50, 12.0))
    assert ((columns @ np.array(weights)) < 0).all()


def test_features_are_finite_without_a_place() -> None:
    pool, decided = one(0.0, 0.0)
    nothing = np.full((1, 2), np.nan)
    assert np.isfinite(features(pool, decided, nothing, np.full(1, np.nan), np.zeros(1))).all()
