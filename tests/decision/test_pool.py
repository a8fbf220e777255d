"""The pool and what is done to its weights, against plain loops: one photo and one entry at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import PHOTOS, TOKENIZER, TUNING, K, N, pool_of

from rag_geotoken.decision.pool import keep_within, log_softmax, make_pool, posterior_pool, reweigh, scored_pool, temper
from rag_geotoken.geo.cells import S2Tokenizer, cell_centers
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.types import FRONTIER, NEIGHBOR, SOURCES, Candidates, Neighbors, Pool, Posterior


def entries(pool: Pool, row: int) -> list[tuple[float, float, str, float]]:
    """Lat, lon, source and weight of a photo's entries."""
    kept = np.flatnonzero(pool.mask[row])
    return [
        (*pool.lat_lon[row, c].tolist(), SOURCES[pool.source[row, c]], math.exp(pool.log_weight[row, c])) for c in kept
    ]


def check_weights(pool: Pool) -> None:
    """Weights of the entries add up to one; where there is no entry, there is no weight."""
    np.testing.assert_allclose(np.exp(pool.log_weight).sum(axis=1), 1, atol=1e-5)
    assert (pool.log_weight[~pool.mask] == -np.inf).all() and np.isfinite(pool.log_weight[pool.mask]).all()
    assert pool.log_weight.dtype == np.float32 and pool.mask.dtype == bool and pool.source.dtype == np.int8


# make_pool


def test_a_pool_is_one_entry_a_cell(neighbors: Neighbors, candidates: Candidates, pool: Pool) -> None:
    shared = 0
    for b in range(PHOTOS):
        found: dict[int, list[object]] = {}
        near = [math.exp(TUNING.neighbor_scale * s) for s in neighbors.scores[b].astype(float)]
        for (lat, lon), weight in zip(neighbors.lat_lon[b].tolist(), near, strict=True):
            cell = int(TOKENIZER.cell_ids(lat, lon))
            entry = found.setdefault(cell, [lat, lon, "neighbor", 0.0])
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
    check_weights(pool)
    assert pool.lat_lon.shape == (PHOTOS, K + N, 2) and (~pool.mask).any()


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_either_kind_has_its_share(neighbors: Neighbors, candidates: Candidates, share: float) -> None:
    # In cells of a meter or so, no neighbor lies in a generated one.
    fine = S2Tokenizer(24, 2)
    lat, lon = TOKENIZER.decode(candidates.tokens.reshape(-1, 4))
    tokens = fine.encode(lat, lon).reshape(PHOTOS, N, -1)
    made = make_pool(neighbors, replace(candidates, tokens=tokens), fine, replace(TUNING, neighbor_share=share))
    weight = np.where(made.mask, np.exp(made.log_weight), 0.0)
    np.testing.assert_allclose((weight * (made.source == NEIGHBOR)).sum(axis=1), share, atol=1e-5)


def test_a_pool_of_one_kind_alone(neighbors: Neighbors, candidates: Candidates) -> None:
    retrieved = make_pool(neighbors, None, TOKENIZER, TUNING)
    generated = make_pool(None, candidates, TOKENIZER, TUNING)
    for made in (retrieved, generated):
        check_weights(made)
    assert (retrieved.source == NEIGHBOR).all() and not (generated.source == NEIGHBOR).any()
    np.testing.assert_array_equal(retrieved.lat_lon, neighbors.lat_lon)
    with pytest.raises(ValueError, match="neighbors, candidates or places"):
        make_pool(None, None, TOKENIZER, TUNING)


def test_a_candidate_without_a_chance_is_no_entry(candidates: Candidates) -> None:
    # So a beam inside a region of few cells is filled up.
    log_prob = candidates.log_prob.copy()
    log_prob[:, 3] = -np.inf
    alone = replace(candidates, tokens=candidates.tokens.copy(), log_prob=log_prob)
    alone.tokens[:, 3] = TOKENIZER.encode([-80.0], [10.0])
    made = make_pool(None, alone, TOKENIZER, TUNING)
    assert not made.mask[:, 3].any()
    check_weights(made)


# pools of another kind


def test_a_pool_of_the_neighbors_alone(neighbors: Neighbors) -> None:
    made = scored_pool(neighbors, 7.0, NEIGHBOR)
    for b in range(PHOTOS):
        weights = [math.exp(7.0 * float(score)) for score in neighbors.scores[b]]
        for given, place, weight in zip(entries(made, b), neighbors.lat_lon[b].tolist(), weights, strict=True):
            assert given[:3] == (*place, "neighbor") and given[3] == pytest.approx(weight / sum(weights), rel=1e-5)
    check_weights(made)


def test_a_pool_of_the_posteriors_heaviest_cells() -> None:
    coarse, fine = S2Tokenizer(2, 2), S2Tokenizer(10, 2)
    lat, lon = np.array([[10.0, 40.0, -30.0], [0.5, 60.0, 7.0]]), np.array([[179.9, -5.0, 20.0], [3.0, 100.0, -70.0]])
    cells = fine.cell_ids(lat, lon)
    cells[:, 1] = coarse.cell_ids(lat[:, 1], lon[:, 1])
    mass = np.array([[0.5, 0.3, 0.2], [0.75, 0.25, 0.0]], np.float32)
    made = posterior_pool(Posterior(cells, mass), most=2)
    for b, expected in enumerate([[0.625, 0.375], [0.75, 0.25]]):
        for c, weight in enumerate(expected):
            assert made.lat_lon[b, c].tolist() == pytest.approx([float(x) for x in cell_centers(cells[b, c])])
            assert math.exp(made.log_weight[b, c]) == pytest.approx(weight, rel=1e-6)
    assert made.mask.shape == (2, 2) and (made.source == FRONTIER).all()
    check_weights(made)
    whole = posterior_pool(Posterior(cells, mass))
    assert whole.mask.tolist() == [[True] * 3, [True, True, False]]
    check_weights(whole)


# what is done to the weights


@pytest.mark.parametrize("km", [150.0, 300.0])
def test_keep_within_is_a_plain_loop(pool: Pool, neighbors: Neighbors, km: float) -> None:
    sizes = set()
    for b in range(PHOTOS):
        lat, lon = neighbors.lat_lon[b, 0].tolist()
        made = keep_within(pool[b : b + 1], (lat, lon, km))
        inside = [entry for entry in entries(pool, b) if float(haversine_km(lat, lon, *entry[:2])) <= km]
        total = sum(entry[3] for entry in inside)
        for given, expected in zip(entries(made, 0), inside, strict=True):
            assert given[:3] == expected[:3] and given[3] == pytest.approx(expected[3] / total, rel=1e-4)
        check_weights(made)
        sizes.add(len(inside))
    assert len(sizes) > 1


def test_keep_within_goes_across_the_date_line() -> None:
    made = keep_within(pool_of([(0.0, 179.9), (0.0, -179.9), (0.0, 178.0)], [0.2, 0.3, 0.5]), (0.0, -180.0, 50.0))
    assert made.mask.tolist() == [[True, True, False]]
    np.testing.assert_allclose(np.exp(made.log_weight), [[0.4, 0.6, 0.0]], rtol=1e-6)


def test_where_nothing_is_within_the_nearest_alone_stays() -> None:
    # The masked place at (0, 0) is nearer still, and no entry.
    made = keep_within(pool_of([(20.0, 20.0), (10.0, 10.0), (60.0, 60.0)], [0.6, 0.1, 0.3], masked=2), (0.0, 0.0, 5.0))
    assert made.mask.tolist() == [[False, True, False, False, False]]
    np.testing.assert_array_equal(made.log_weight, [[-np.inf, 0.0, -np.inf, -np.inf, -np.inf]])


def test_temper_is_a_plain_loop(pool: Pool) -> None:
    for power in (0.3, 1.0, 4.0):
        made = temper(pool, power)
        for b in range(PHOTOS):
            raised = [entry[3] ** power for entry in entries(pool, b)]
            found = [entry[3] for entry in entries(made, b)]
            assert found == pytest.approx([weight / sum(raised) for weight in raised], rel=1e-4)
        check_weights(made)
        np.testing.assert_array_equal(made.mask, pool.mask)
        np.testing.assert_array_equal(made.lat_lon, pool.lat_lon)


def test_a_verdict_multiplies_the_weights(pool: Pool) -> None:
    scores = np.random.default_rng(3).normal(size=pool.mask.shape).astype(np.float32)
    scores[~pool.mask] = 1e6  # no entry, no say
    made = reweigh(pool, scores, 1.5)
    for b in range(PHOTOS):
        pairs = zip(entries(pool, b), scores[b][pool.mask[b]].tolist(), strict=True)
        given = [entry[3] * math.exp(1.5 * score) for entry, score in pairs]
        assert [entry[3] for entry in entries(made, b)] == pytest.approx([w / sum(given) for w in given], rel=1e-4)
    check_weights(made)


def test_a_verdict_of_equals_changes_nothing(pool: Pool) -> None:
    made = reweigh(pool, np.full(pool.mask.shape, 0.7, np.float32), 10.0)
    np.testing.assert_allclose(made.log_weight, pool.log_weight, atol=1e-5)


def test_log_softmax_keeps_minus_infinity() -> None:
    values = np.array([[1000.0, -np.inf, 1000.0], [0.0, -800.0, -np.inf]])
    result = log_softmax(values)
    np.testing.assert_allclose(result, [[-math.log(2), -np.inf, -math.log(2)], [0.0, -800.0, -np.inf]], atol=1e-9)
