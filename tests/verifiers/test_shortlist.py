"""The shortlist of a pool against plain loops, and what is said of its places."""

from __future__ import annotations

import numpy as np
import pytest

from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.types import GPS, NEIGHBOR, SAMPLE, Neighbors, Places, Pool
from rag_geotoken.verifiers.shortlist import AGREE_KM, APART_KM, candidates, evidence, shortlist

TUNING = Tuning(search_weights=(0.5, 1.0, 0.5), alignment_scale=3.0)


def make_pool(rng: np.random.Generator, photos: int, entries: int) -> Pool:
    lat_lon = rng.uniform([40, 0], [46, 8], (photos, entries, 2))
    mask = rng.random((photos, entries)) < 0.8
    mask[:, 0] = True
    weight = np.where(mask, rng.dirichlet(np.full(entries, 0.3), photos), 0.0) + np.where(mask, 1e-6, 0.0)
    with np.errstate(divide="ignore"):
        log_weight = np.log(weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
    source = rng.choice([NEIGHBOR, SAMPLE, GPS], (photos, entries)).astype(np.int8)
    return Pool(lat_lon, log_weight, source, mask)


def plain(pool: Pool, b: int, count: int) -> list[int]:
    """One photo's shortlist by loops."""
    there = np.flatnonzero(pool.mask[b]).tolist()
    weight = np.exp(pool.log_weight[b].astype(float))
    km = {(i, j): float(haversine_km(*pool.lat_lon[b, i], *pool.lat_lon[b, j])) for i in there for j in there}
    mass = {i: sum(weight[j] for j in there if km[i, j] <= APART_KM) + 1e-6 * weight[i] for i in there}
    chosen: list[int] = []
    while len(chosen) < count:
        free = [i for i in there if all(km[i, j] > APART_KM for j in chosen)]
        if not free:
            break
        chosen.append(max(free, key=lambda i: mass[i]))
    return chosen


def test_the_shortlist_is_that_of_plain_loops() -> None:
    pool = make_pool(np.random.default_rng(0), 12, 40)
    found = shortlist(pool, 6)
    for b in range(12):
        chosen = plain(pool, b, 6)
        assert found.entries[b].tolist() == chosen + [-1] * (6 - len(chosen))
        for c in range(40):
            km = [float(haversine_km(*pool.lat_lon[b, c], *pool.lat_lon[b, i])) for i in chosen]
            near = pool.mask[b, c] and min(km) <= APART_KM
            assert found.stands[b, c] == (int(np.argmin(km)) if near else -1)


def test_values_of_places_reach_the_entries_that_they_stand_for() -> None:
    pool = make_pool(np.random.default_rng(1), 4, 30)
    found = shortlist(pool, 3)
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    spread = found.spread(values, np.full(4, -7, np.float32))
    for b in range(4):
        for c in range(30):
            assert spread[b, c] == (-7 if found.stands[b, c] < 0 else values[b, found.stands[b, c]])
        assert (spread[b, found.entries[b][found.mask[b]]] == values[b][found.mask[b]]).all()


def test_evidence_counts_what_lies_nearby() -> None:
    rng = np.random.default_rng(2)
    pool = make_pool(rng, 3, 20)
    near = Neighbors(
        np.zeros((3, 5), int), rng.uniform([40, 0], [46, 8], (3, 5, 2)), rng.random((3, 5)).astype(np.float32)
    )
    aligned = rng.random(pool.mask.shape).astype(np.float32)
    matches = Places(rng.uniform([40, 0], [46, 8], (3, 5, 2)), rng.random((3, 5)).astype(np.float32))
    chosen = shortlist(pool, 4)
    found = evidence(chosen, pool, near, aligned=aligned, tuning=TUNING, matches=matches)
    assert found.match is not None and found.agree is not None
    for b in range(3):
        token = pool.mask[b] & (pool.source[b] == SAMPLE)
        mass = np.where(token, np.exp(pool.log_weight[b].astype(float)), 0)
        for m in np.flatnonzero(chosen.mask[b]).tolist():
            here = chosen.lat_lon[b, m]
            km = haversine_km(*here, *near.lat_lon[b].T)
            assert found.neighbors[b, m] == (km <= APART_KM).sum()
            alike = near.scores[b][km <= APART_KM] / 2
            assert found.alike[b, m] == pytest.approx(alike.max() if len(alike) else 0.0)
            stood = chosen.stands[b] == m
            assert np.exp(found.generated[b, m]) == pytest.approx(mass[stood].sum() / mass.sum())
            best = [aligned[b][chosen.stands[b] == i].max() for i in np.flatnonzero(chosen.mask[b])]
            share = np.exp(3.0 * np.array(best, float)) / np.exp(3.0 * np.array(best, float)).sum()
            assert found.place[b, m] == pytest.approx(share[m])
            fits = np.flatnonzero(haversine_km(*here, *matches.lat_lon[b].T) <= APART_KM)
            if len(fits):
                best = fits[matches.scores[b][fits].argmax()]
                assert found.match[b, m] == matches.scores[b, best]
                together = haversine_km(*matches.lat_lon[b, best], *matches.lat_lon[b].T) <= AGREE_KM
                assert found.agree[b, m] == together.sum()
            else:
                assert found.match[b, m] == found.agree[b, m] == 0


def test_evidence_in_words_is_rounded_and_absent_when_not_wanted() -> None:
    pool = make_pool(np.random.default_rng(3), 1, 10)
    near = Neighbors(np.zeros((1, 1), int), np.array([[[-40.0, 100.0]]]), np.array([[1.0]], np.float32))
    chosen = shortlist(pool, 3)
    aligned = np.full(pool.mask.shape, 0.514, np.float32)
    found = evidence(chosen, pool, near, aligned=aligned, tuning=TUNING, matches=None)
    shown = candidates(chosen, 0, ["Vienna, Austria"] * 3, found)
    assert len(shown) == chosen.mask.sum()
    for place in shown:
        assert place["evidence"].keys() == {"neighbors", "alike", "place", "generated"}
        assert (place["evidence"]["neighbors"], place["evidence"]["place"]) == (0, round(100 / chosen.mask.sum()))
    assert all(place["evidence"] is None for place in candidates(chosen, 0))
