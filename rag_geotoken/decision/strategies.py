"""Selection: the answer out of a pool, one function a strategy. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.decision.confidence import calibrated, confidence, disk_chance
from rag_geotoken.decision.pool import neighbor_pool, reweigh, temper
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.geo import from_unit, haversine_km, pairwise_km, to_unit
from rag_geotoken.types import Neighbors, Pool, Predictions

Floats = NDArray[np.float64]
Scores = Mapping[str, NDArray[np.float32]]
BLOCK = 16  # photos at a time whose distances stay in a processor's cache


def decide(pool: Pool, scores: Scores, tuning: Tuning) -> Predictions:
    """Minimum Bayes risk over a pool that verifiers have reweighted, with a calibrated confidence.

    scores: verifier -> (B, C) over the pool's entries; none leaves the pool as it is.
    """
    scales = {name: getattr(tuning, f"{name}_scale") for name in scores}
    for name, values in scores.items():
        pool = reweigh(pool, values, scales[name])
    tuning = tuning.with_pictures() if "visual" in scores else tuning
    decided = minimum_bayes_risk(pool, tuning)
    sure = confidence(temper(pool, tuning.confidence_scale), decided.lat_lon, tuning.confidence_km)
    pairs = tuning.calibration.get(verified_by(scores))
    return replace(decided, confidence=calibrated(sure, pairs) if pairs else sure)


def verified_by(verifiers: Iterable[str]) -> str:
    """The verifiers' names in one: alignment+reward, or none."""
    return "+".join(sorted(verifiers)) or "none"


def log_probability(pool: Pool, tuning: Tuning) -> Predictions:
    """The entry with the highest weight."""
    return highest(pool, pool.log_weight, tuning)


def highest(pool: Pool, scores: NDArray[np.float32], tuning: Tuning) -> Predictions:
    """The entry with the highest score (B, C): the image-GPS similarity (G3) or the reward head (GeoToken)."""
    return _choose(pool, np.where(pool.mask, scores, -np.inf).argmax(axis=1), tuning)


def medoid(pool: Pool, tuning: Tuning) -> Predictions:
    """The entry with the least expected distance to the truth, by the pool's weights."""
    return _choose(pool, np.where(pool.mask, _expected(pool, lambda km: km), np.inf).argmin(axis=1), tuning)


def density(pool: Pool, tuning: Tuning) -> Predictions:
    """Kernel density (Vo, Jacobs and Hays, ICCV 2017): the entry where it is highest, Gaussian of ``density_km``."""
    return _choose(pool, _densest(pool, tuning), tuning)


def mean_shift(pool: Pool, tuning: Tuning, steps: int = 20) -> Predictions:
    """From the densest entry uphill to the mode of the kernel density, which need not be an entry.

    Each step goes to the mean of the entries as unit vectors, weighted by the kernel around the present place.
    """
    start = _choose(pool, _densest(pool, tuning), tuning)
    points, place = to_unit(pool.lat_lon[..., 0], pool.lat_lon[..., 1]), start.lat_lon
    weight = np.where(pool.mask, np.exp(pool.log_weight.astype(np.float64)), 0.0)
    for _ in range(steps):
        km = haversine_km(place[:, :1], place[:, 1:], pool.lat_lon[..., 0], pool.lat_lon[..., 1])
        near = weight * np.exp(-0.5 * (km / tuning.density_km) ** 2)
        place = np.stack(from_unit(np.einsum("bc,bcx->bx", near, points)), axis=-1)
    return replace(start, lat_lon=place, confidence=confidence(pool, place, tuning.confidence_km))


def minimum_bayes_risk(pool: Pool, tuning: Tuning, radius: int | None = None) -> Predictions:
    """The entry with the highest expected utility: the chance to lie within a radius, or its mean over all of them.

    Chance: sum over entries x of weight(x) * P(the truth behind x is within r of c), the truth spread normally around
    its entry by ``spread_km``.
    """
    utility = _expected(pool, lambda km: disk_chance(km, tuning.spread_km, radius))
    return _choose(pool, np.where(pool.mask, utility, -1.0).argmax(axis=1), tuning)


def nearest(neighbors: Neighbors, tuning: Tuning) -> Predictions:
    """The first neighbour; its confidence is the softmax-weighted share of the neighbours within each radius of it."""
    return log_probability(neighbor_pool(neighbors, tuning.density_scale), tuning)


def snap(predictions: Predictions, neighbors: Neighbors, tokenizer: S2Tokenizer, within_km: float = 1.0) -> Predictions:
    """Move an answer to the densest cluster of neighbours inside its cell, if the cell holds any.

    The neighbour with most neighbours of the cell within ``within_km`` wins, the better ranked of equals.
    """
    answers, places = predictions.lat_lon, neighbors.lat_lon
    cells = tokenizer.cell_ids(places[..., 0], places[..., 1])
    here = tokenizer.cell_ids(*answers.T)[:, None] == cells
    crowd = np.where(here, ((pairwise_km(places) <= within_km) & here[:, None, :]).sum(axis=2), 0)
    chosen = places[np.arange(len(answers)), crowd.argmax(axis=1)]
    return replace(predictions, lat_lon=np.where(here.any(axis=1)[:, None], chosen, answers))


def _expected(pool: Pool, value: Callable[[Floats], Floats]) -> Floats:
    """What a value of the distance (..., C, C) is on average over a pool's weights, from each entry -> (B, C)."""
    weight = np.where(pool.mask, np.exp(pool.log_weight.astype(np.float64)), 0.0)
    places = np.where(pool.mask[..., None], pool.lat_lon, 0.0)
    result = np.empty(pool.mask.shape)
    for start in range(0, len(result), BLOCK):
        at = slice(start, start + BLOCK)
        result[at] = (value(pairwise_km(places[at])) @ weight[at, :, None])[..., 0]
    return result


def _densest(pool: Pool, tuning: Tuning) -> NDArray[np.int64]:
    density = _expected(pool, lambda km: np.exp(-0.5 * (km / tuning.density_km) ** 2))
    best: NDArray[np.int64] = np.where(pool.mask, density, -1.0).argmax(axis=1)
    return best


def _choose(pool: Pool, best: NDArray[np.int64], tuning: Tuning) -> Predictions:
    rows = np.arange(len(best))
    lat_lon = pool.lat_lon[rows, best]
    return Predictions(lat_lon, confidence(pool, lat_lon, tuning.confidence_km), pool.source[rows, best])
