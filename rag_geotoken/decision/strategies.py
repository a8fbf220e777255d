"""These functions choose one answer from each pool: a strategy is one function, arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rag_geotoken.decision.confidence import calibrated, confidence, disk_chance
from rag_geotoken.decision.pool import reweigh, temper
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.geo.sphere import Floats, from_unit, haversine_km, pairwise_km, to_unit
from rag_geotoken.options import verified_by
from rag_geotoken.types import Neighbors, Pool, Predictions

Scores = Mapping[str, NDArray[np.float32]]
BLOCK = 16  # photos at a time whose distances stay in a processor's cache
SNAP_KM = 1.0


@dataclass(frozen=True)
class Given:
    """This class holds what a decision is made from besides the pool.

    scores: (B, C) over the pool's entries, by verifier. neighbors, tokenizer: for strategies that use them.
    """

    scores: Scores
    tuning: Tuning
    neighbors: Neighbors | None = None
    tokenizer: S2Tokenizer | None = None


@dataclass(frozen=True)
class Chosen:
    """This class holds a chosen place of each photo: lat_lon (B, 2) degrees, source (B,) int8 into ``SOURCES``."""

    lat_lon: Floats
    source: NDArray[np.int8]


def decide(pool: Pool, given: Given, select: str = "bayes-risk") -> Predictions:
    """Reweight a pool by the verifiers' scores and choose a place by a strategy, with a calibrated confidence.

    select: a name in ``STRATEGIES``. Without scores the pool stays as it is.
    """
    tuning = given.tuning.with_pictures() if "visual" in given.scores else given.tuning
    for name, values in given.scores.items():
        pool = reweigh(pool, values, _scale(tuning, name))
    strategy: Callable[[Pool, Given], Chosen] = globals()[select.replace("-", "_")]
    chosen = strategy(pool, replace(given, tuning=tuning))
    chances = confidence(temper(pool, tuning.confidence_scale), chosen.lat_lon, tuning.confidence_km)
    pairs = tuning.calibration.get(verified_by(given.scores))
    return Predictions(chosen.lat_lon, calibrated(chances, pairs) if pairs else chances, chosen.source)


def bayes_risk(pool: Pool, given: Given, radius: int | None = None) -> Chosen:
    """Choose the entry with the highest expected utility: the chance to lie within a radius, or its mean over all.

    Chance: sum over entries x of weight(x) * P(the truth behind x is within r of c), the truth spread normally around
    its entry by ``spread_km``.
    """
    return _best_entry(pool, _expected(pool, lambda km: disk_chance(km, given.tuning.spread_km, radius)))


# These choose the entry that most probably lies within 25 or 200 km of the truth.
bayes_risk_25 = partial(bayes_risk, radius=25)
bayes_risk_200 = partial(bayes_risk, radius=200)


def log_probability(pool: Pool, given: Given) -> Chosen:
    """Choose the entry with the highest weight."""
    return _best_entry(pool, pool.log_weight)


def highest(pool: Pool, given: Given) -> Chosen:
    """Choose the entry that the verifiers score highest, whatever its weight in the pool.

    By the alignment alone it is G3's choice, by the reward head GeoToken's. Raises GeoError without a verifier.
    """
    if not given.scores:
        raise GeoError("select highest takes the place that verifiers score highest: name one in verify")
    return _best_entry(pool, sum(_scale(given.tuning, name) * values for name, values in given.scores.items()))


def medoid(pool: Pool, given: Given) -> Chosen:
    """Choose the entry with the least expected distance to the truth, by the pool's weights."""
    return _best_entry(pool, -_expected(pool, lambda km: km))


def density(pool: Pool, given: Given) -> Chosen:
    """Choose the entry of the highest kernel density, a Gaussian of ``density_km`` (Vo, Jacobs and Hays, ICCV 2017)."""
    return _best_entry(pool, _expected(pool, lambda km: _kernel(km, given.tuning)))


def mean_shift(pool: Pool, given: Given, steps: int = 20) -> Chosen:
    """Go from the densest entry uphill to the mode of the kernel density, which need not be an entry.

    Each step goes to the mean of the entries as unit vectors, weighted by the kernel around the present place.
    """
    start = density(pool, given)
    points, place, weight = to_unit(pool.lat_lon[..., 0], pool.lat_lon[..., 1]), start.lat_lon, pool.weight
    for _ in range(steps):
        km = haversine_km(place[:, :1], place[:, 1:], pool.lat_lon[..., 0], pool.lat_lon[..., 1])
        mean = np.einsum("bc,bcx->bx", weight * _kernel(km, given.tuning), points)
        place = np.stack(from_unit(mean), axis=-1)
    return replace(start, lat_lon=place)


def snap(pool: Pool, given: Given) -> Chosen:
    """Move the usual choice to the densest cluster of neighbors inside its cell, if the cell holds any.

    The neighbor with most neighbors of the cell within ``SNAP_KM`` wins, the better ranked of equals.
    """
    start = bayes_risk(pool, given)
    if given.neighbors is None or given.tokenizer is None:
        raise GeoError("select snap needs neighbors to move an answer to")
    answers, places, cell_ids = start.lat_lon, given.neighbors.lat_lon, given.tokenizer.cell_ids
    cells = cell_ids(places[..., 0], places[..., 1])
    same_cell = cell_ids(*answers.T)[:, None] == cells
    crowd = np.where(same_cell, ((pairwise_km(places) <= SNAP_KM) & same_cell[:, None, :]).sum(axis=2), 0)
    chosen = places[np.arange(len(answers)), crowd.argmax(axis=1)]
    return replace(start, lat_lon=np.where(same_cell.any(axis=1)[:, None], chosen, answers))


def _expected(pool: Pool, value: Callable[[Floats], Floats]) -> Floats:
    """Average a value of the distances (..., C, C) from each entry over the pool's weights, (B, C)."""
    weight = pool.weight
    places = np.where(pool.mask[..., None], pool.lat_lon, 0.0)
    result = np.empty(pool.mask.shape)
    for start in range(0, len(result), BLOCK):
        at = slice(start, start + BLOCK)
        result[at] = (value(pairwise_km(places[at])) @ weight[at, :, None])[..., 0]
    return result


def _kernel(km: Floats, tuning: Tuning) -> Floats:
    density: Floats = np.exp(-0.5 * (km / tuning.density_km) ** 2)
    return density


def _scale(tuning: Tuning, verifier: str) -> float:
    """Return how sharply a verifier's scores count; one without a scale in the tuning gives nats."""
    return float(getattr(tuning, f"{verifier}_scale", 1.0))


def _best_entry(pool: Pool, value: ArrayLike) -> Chosen:
    """Choose the entry of the highest value (B, C), the first of equals."""
    best = np.where(pool.mask, value, -np.inf).argmax(axis=1)
    rows = np.arange(len(best))
    return Chosen(pool.lat_lon[rows, best], pool.source[rows, best])
