"""Selection: one pool of generated and retrieved places a photo, and the decision over it. Arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.geo import haversine_km, pairwise_km
from rag_geotoken.metrics import RADII_KM
from rag_geotoken.types import NEIGHBOUR, Candidates, Neighbors, Pool, Predictions

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tuning:
    """What was chosen on validation photos, in one place.

    search_weights: of the image, GPS and text part of an embedding in the search.
    neighbor_share: the weight of the retrieved entries in the pool, the generated have the rest.
    neighbor_scale, alignment_scale: how sharply a similarity counts in a decision, in nats a unit of cosine.
    spread_km: spread of the places behind one pool entry, for the utility of a decision.
    confidence_scale, confidence_km: the same two where a confidence is stated, chosen for calibration.
    density_scale, density_km: sharpness and Gaussian kernel of the density baseline, chosen for it alone.
    """

    search_weights: tuple[float, ...] = (0.5, 1.0, 0.5)
    neighbor_share: float = 0.1
    neighbor_scale: float = 10.0
    alignment_scale: float = 100.0
    spread_km: float = 25.0
    confidence_scale: float = 30.0
    confidence_km: float = 15.0
    density_scale: float = 10.0
    density_km: float = 50.0


def make_pool(
    neighbors: Neighbors | None, candidates: Candidates | None, tokenizer: S2Tokenizer, tuning: Tuning
) -> Pool:
    """Put generated and retrieved places together, one entry a cell of the tokenizer's level.

    Generated entries are weighted by their untempered probability, retrieved ones by a softmax of their score; either
    kind's weights add up to its share. A retrieved place in a generated cell keeps its own coordinates and the sum of
    both weights. Raises ValueError when both are missing.
    """
    places, weights, sources, cells = [], [], [], []
    share = tuning.neighbor_share if candidates is not None else 1.0
    if neighbors is not None:
        scores = tuning.neighbor_scale * neighbors.scores.astype(np.float64)
        places.append(neighbors.lat_lon)
        weights.append(log_softmax(scores) + np.log(share))
        sources.append(np.full(scores.shape, NEIGHBOUR, np.int8))
        cells.append(tokenizer.cell_ids(*neighbors.lat_lon.reshape(-1, 2).T).reshape(scores.shape))
    if candidates is not None:
        flat = candidates.tokens.reshape(-1, candidates.tokens.shape[-1])
        shape = candidates.log_prob.shape
        ids = tokenizer.tokens_to_ids(flat).reshape(shape)
        log_prob = np.where(_repeats(ids), -np.inf, candidates.log_prob.astype(np.float64))
        places.append(np.stack(tokenizer.decode(flat), axis=-1).reshape(*shape, 2))
        weights.append(log_softmax(log_prob) + (np.log(1.0 - share) if neighbors is not None else 0.0))
        sources.append(candidates.source)
        cells.append(ids)
    if not places:
        raise ValueError("a pool needs neighbours or candidates")
    return _merge(*(np.concatenate(parts, axis=1) for parts in (places, weights, sources, cells)))


def _merge(lat_lon: Floats, log_weight: Floats, source: NDArray[np.int8], cells: NDArray[np.uint64]) -> Pool:
    """One entry a cell: the first stays, with the sum of the weights; the others are masked."""
    same = cells[:, :, None] == cells[:, None, :]
    total = np.log((same * np.exp(log_weight)[:, None, :]).sum(axis=2) + 1e-30)
    mask = ~_repeats(cells) & np.isfinite(log_weight)
    log_weight = log_softmax(np.where(mask, total, -np.inf))
    return Pool(lat_lon, log_weight.astype(np.float32), source, mask)


def _repeats(ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(B, N) -> true where the same value stands further left in its row."""
    earlier = np.tri(ids.shape[1], k=-1, dtype=bool)
    repeats: NDArray[np.bool_] = ((ids[:, :, None] == ids[:, None, :]) & earlier).any(axis=2)
    return repeats


def align(pool: Pool, similarity: NDArray[np.float32], scale: float) -> Pool:
    """G3's verification as evidence: each entry's weight times exp(scale * image-GPS cosine (B, C)), normalised."""
    weight = pool.log_weight + scale * similarity.astype(np.float64)
    weight = log_softmax(np.where(pool.mask, weight, -np.inf))
    return Pool(pool.lat_lon, weight.astype(np.float32), pool.source, pool.mask)


def decide(pool: Pool, similarity: NDArray[np.float32] | None, tuning: Tuning) -> Predictions:
    """Minimum Bayes risk over a pool, verified by similarity (B, C) or, with None, not verified.

    A sharp scale decides best and is far too sure of itself, so the confidence comes from a milder one.
    """
    if similarity is None:
        return minimum_bayes_risk(pool, tuning)
    decided = minimum_bayes_risk(align(pool, similarity, tuning.alignment_scale), tuning)
    belief = align(pool, similarity, tuning.confidence_scale)
    return replace(decided, confidence=confidence(belief, decided.lat_lon, tuning))


def minimum_bayes_risk(pool: Pool, tuning: Tuning) -> Predictions:
    """The entry with the highest expected utility, the mean over the radii of the chance to lie within each.

    Chance: sum over entries x of weight(x) * P(the truth behind x is within r of c), the truth spread normally around
    its entry by ``spread_km``.
    """
    distance = pairwise_km(np.where(pool.mask[..., None], pool.lat_lon, 0.0))
    utility = _chances(distance, np.exp(pool.log_weight.astype(np.float64)), tuning.spread_km).mean(axis=-1)
    return _choose(pool, np.where(pool.mask, utility, -1.0).argmax(axis=1), tuning)


def log_probability(pool: Pool, tuning: Tuning) -> Predictions:
    """The entry with the highest weight: the simple alternative to :func:`minimum_bayes_risk`."""
    return _choose(pool, np.where(pool.mask, pool.log_weight, -np.inf).argmax(axis=1), tuning)


def nearest(neighbors: Neighbors, tuning: Tuning) -> Predictions:
    """The first neighbour; its confidence is the softmax-weighted share of the neighbours within each radius of it."""
    return log_probability(_neighbor_pool(neighbors, tuning), tuning)


def density(neighbors: Neighbors, tuning: Tuning) -> Predictions:
    """Kernel density over the neighbours (Vo, Jacobs and Hays, ICCV 2017): the neighbour where it is highest.

    Gaussian kernel of ``density_km``, weights by similarity.
    """
    pool = _neighbor_pool(neighbors, tuning)
    kernel = np.exp(-0.5 * (pairwise_km(pool.lat_lon) / tuning.density_km) ** 2)
    best = (kernel @ np.exp(pool.log_weight.astype(np.float64))[..., None])[..., 0].argmax(axis=1)
    return _choose(pool, best, tuning)


def confidence(pool: Pool, lat_lon: Floats, tuning: Tuning) -> Floats:
    """The chance (B, R), by the pool's weights, that the truth lies within each radius of the places (B, 2)."""
    there = lat_lon[:, None, :]
    distance = haversine_km(there[..., 0], there[..., 1], pool.lat_lon[..., 0], pool.lat_lon[..., 1])[:, None, :]
    weight = np.exp(pool.log_weight.astype(np.float64))
    return np.clip(_chances(distance, weight, tuning.confidence_km)[:, 0], 0.0, 1.0)


def _neighbor_pool(neighbors: Neighbors, tuning: Tuning) -> Pool:
    """The neighbours alone, each an entry of its own."""
    weight = log_softmax(tuning.density_scale * neighbors.scores.astype(np.float64)).astype(np.float32)
    mask = np.ones(weight.shape, bool)
    return Pool(neighbors.lat_lon, weight, np.full(weight.shape, NEIGHBOUR, np.int8), mask)


def log_softmax(values: Floats) -> Floats:
    """Over the last axis; minus infinity stays so."""
    shifted = values - values.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _chances(distance: Floats, weight: Floats, spread: float) -> Floats:
    """Distance (B, M, C), weight (B, C) -> (B, M, R) chance that the true place lies within each radius."""
    grid, inside = _disk_chance(spread)
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


def _choose(pool: Pool, best: NDArray[np.int64], tuning: Tuning) -> Predictions:
    rows = np.arange(len(best))
    lat_lon = pool.lat_lon[rows, best]
    return Predictions(lat_lon, confidence(pool, lat_lon, tuning), pool.source[rows, best])
