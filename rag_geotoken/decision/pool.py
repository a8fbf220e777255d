"""The pool: generated and retrieved places of a photo together, one of which will be the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.geo.cells import S2Tokenizer, cell_centers
from rag_geotoken.geo.sphere import Floats, haversine_km
from rag_geotoken.types import (
    FRONTIER,
    GPS,
    MLLM,
    NEIGHBOR,
    SOURCES,
    VISUAL,
    Candidates,
    Neighbors,
    Places,
    Pool,
    Posterior,
    Tables,
)  # fmt: skip

if TYPE_CHECKING:
    from rag_geotoken.options import Options


def pool_of(tables: Tables, options: Options, tokenizer: S2Tokenizer, tuning: Tuning) -> Pool:
    """The places that verifiers score: of the one source that the options ask for, or of all.

    Of all: retrieved and generated together, one entry a cell, then moved ones, then those of a multimodal model.
    """
    if len(options.sources) == 1:
        made = _source_alone(options.sources[0], tables, tokenizer, tuning)
    else:
        candidates = tables.candidates if options.propose else None
        places = tables.places if options.gps_places else None
        made = make_pool(tables.neighbors, candidates, tokenizer, tuning, places)
        if options.visual:
            made = extend(made, tables.matches, tuning)
        if options.diverse:
            own = tables.diverse.lat_lon
            made = join(made, own, np.zeros(own.shape[:2]), tuning.mllm_share, MLLM)
    return keep_within(made, options.within) if options.within else made


def _source_alone(source: str, tables: Tables, tokenizer: S2Tokenizer, tuning: Tuning) -> Pool:
    if source == "neighbor":
        return scored_pool(tables.neighbors, tuning.density_scale, NEIGHBOR)
    if source == "visual":
        return scored_pool(tables.matches, tuning.match_scale, VISUAL)
    if source == "frontier":
        return posterior_pool(tables.posterior)
    if source == "gps":
        return make_pool(None, None, tokenizer, tuning, tables.places)
    return generated_pool(tables.candidates, SOURCES.index(source), tokenizer, tuning)


def chosen_pool(options: Options, pool: Pool) -> Pool:
    """The entries one of which will be the answer: those of the sources that the options let into the decision."""
    kinds = [SOURCES.index(name) for name in options.pooled]
    return pool if np.isin(pool.source[pool.mask], kinds).all() else only(pool, *kinds)


def make_pool(
    neighbors: Neighbors | None,
    candidates: Candidates | None,
    tokenizer: S2Tokenizer,
    tuning: Tuning,
    places: Places | None = None,
) -> Pool:
    """Put generated and retrieved places together, one entry a cell of the tokenizer's level.

    Generated entries are weighted by their untempered probability, neighbors by a softmax of their score, places found
    by GPS embedding evenly; each kind's weights add up to its share. The first of a cell keeps its coordinates and has
    the sum of all weights: neighbors come first, then generated cells, then places. Raises ValueError for no entries.
    """
    parts: list[tuple[Floats, Floats, NDArray[np.int8], NDArray[np.uint64]]] = []
    shares = _shares([kind is not None for kind in (neighbors, candidates, places)], tuning)
    if neighbors is not None:
        cells = tokenizer.cell_ids(neighbors.lat_lon[..., 0], neighbors.lat_lon[..., 1])
        weight = log_softmax(tuning.neighbor_scale * neighbors.scores.astype(np.float64)) + np.log(shares[0])
        parts.append((neighbors.lat_lon, weight, np.full(cells.shape, NEIGHBOR, np.int8), cells))
    if candidates is not None:
        cells = tokenizer.tokens_to_ids(candidates.tokens)
        log_prob = np.where(_repeats(cells), -np.inf, candidates.log_prob.astype(np.float64))
        parts.append((candidates.lat_lon, log_softmax(log_prob) + np.log(shares[1]), candidates.source, cells))
    if places is not None:
        cells = tokenizer.cell_ids(places.lat_lon[..., 0], places.lat_lon[..., 1])
        with np.errstate(divide="ignore"):
            weight = np.full(cells.shape, np.log(shares[2] / cells.shape[1]))
        parts.append((places.lat_lon, weight, np.full(cells.shape, GPS, np.int8), cells))
    return _merge(*(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)))


def _shares(there: list[bool], tuning: Tuning) -> Floats:
    """The weight (3,) of each kind that is there; the shares of those that are not go to the others in proportion."""
    if not any(there):
        raise ValueError("a pool needs neighbors, candidates or places")
    given = [tuning.neighbor_share, 1.0 - tuning.neighbor_share - tuning.gps_share, tuning.gps_share]
    shares: Floats = np.multiply(given, there)
    if not shares.any():  # the only kind that is there has no share: it gets all
        shares = np.array(there, np.float64)
    shares /= shares.sum()
    return shares


def extend(pool: Pool, matches: Places, tuning: Tuning) -> Pool:
    """A pool with the places to which its neighbors' pictures move the photo, each an entry of its own, at the end.

    They have ``visual_share`` of the weight, by a softmax of ``match_scale`` times their scores.
    """
    weight = scored_pool(matches, tuning.match_scale, VISUAL).log_weight.astype(np.float64)
    return join(pool, matches.lat_lon, weight, tuning.visual_share, VISUAL)


def join(pool: Pool, lat_lon: Floats, log_weight: Floats, share: float, source: int) -> Pool:
    """A pool with places (B, N, 2), NaN for none, and their logarithmic weights (B, N) as entries at the end.

    They have a share of the weight, the others the rest in proportion, so that :func:`without` takes them out again. A
    pool that gets no place keeps all its weight.
    """
    there: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(lat_lon), axis=2)
    some = there.any(axis=1, keepdims=True)
    added = np.where(there, log_weight, -np.inf)
    added = np.where(some, log_softmax(np.where(some, added, 0.0)) + np.log(share), -np.inf)
    weight = np.concatenate([pool.log_weight + np.where(some, np.log1p(-share), 0.0), added], axis=1)
    return Pool(
        np.concatenate([pool.lat_lon, np.where(there[..., None], lat_lon, 0.0)], axis=1),
        weight.astype(np.float32),
        np.concatenate([pool.source, np.full(there.shape, source, np.int8)], axis=1),
        np.concatenate([pool.mask, there], axis=1),
    )


def generated_pool(candidates: Candidates, source: int, tokenizer: S2Tokenizer, tuning: Tuning) -> Pool:
    """The cells of one way to generate alone."""
    keep = candidates.source[0] == source
    cells = Candidates(*(values[:, keep] for values in vars(candidates).values()))
    return make_pool(None, cells, tokenizer, tuning)


def without(pool: Pool, source: int) -> Pool:
    """A pool less the entries of one source; a cell that another source has too stays."""
    return _masked(pool, pool.mask & (pool.source != source))


def only(pool: Pool, *sources: int) -> Pool:
    """The entries of some sources alone, of which every photo must have one."""
    return _masked(pool, pool.mask & np.isin(pool.source, sources))


def scored_pool(places: Neighbors | Places, scale: float, source: int) -> Pool:
    """Places of one source alone, each an entry of its own, weighted by a softmax of ``scale`` times their scores."""
    shape = places.scores.shape
    weight = scale * places.scores.astype(np.float64)
    return _weighted(places.lat_lon, weight, np.full(shape, source, np.int8), np.ones(shape, bool))


def posterior_pool(posterior: Posterior, most: int = 64) -> Pool:
    """The ``most`` heaviest cells of a posterior, each at its center."""
    mass = posterior.mass[:, :most].astype(np.float64)
    with np.errstate(divide="ignore"):
        weight = np.log(mass)
    lat_lon = np.stack(cell_centers(posterior.cells[:, :most]), axis=-1)
    return _weighted(lat_lon, weight, np.full(mass.shape, FRONTIER, np.int8), mass > 0)


def keep_within(pool: Pool, within: tuple[float, float, float]) -> Pool:
    """The entries no further than (lat, lon, km) from that place; where none is, the nearest alone stays."""
    lat, lon, km = within
    away = np.where(pool.mask, haversine_km(pool.lat_lon[..., 0], pool.lat_lon[..., 1], lat, lon), np.inf)
    return _masked(pool, pool.mask & (away <= np.maximum(km, away.min(axis=1, keepdims=True))))


def reweigh(pool: Pool, scores: NDArray[np.float32], scale: float) -> Pool:
    """A verdict as evidence: each entry's weight times exp(scale * score (B, C)), normalized."""
    weight = pool.log_weight + scale * scores.astype(np.float64)
    return _weighted(pool.lat_lon, weight, pool.source, pool.mask)


def temper(pool: Pool, power: float) -> Pool:
    """Every weight raised to a power, normalized: below 1 milder, above 1 sharper."""
    with np.errstate(invalid="ignore"):
        weight = power * pool.log_weight.astype(np.float64)
    return _weighted(pool.lat_lon, weight, pool.source, pool.mask)


def log_softmax(values: Floats) -> Floats:
    """Over the last axis; minus infinity stays so."""
    shifted = values - values.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _masked(pool: Pool, mask: NDArray[np.bool_]) -> Pool:
    return _weighted(pool.lat_lon, pool.log_weight.astype(np.float64), pool.source, mask)


def _weighted(lat_lon: Floats, log_weight: Floats, source: NDArray[np.int8], mask: NDArray[np.bool_]) -> Pool:
    """A pool whose weights are normalized over the entries."""
    weight = log_softmax(np.where(mask, log_weight, -np.inf))
    return Pool(lat_lon, weight.astype(np.float32), source, mask)


def _merge(lat_lon: Floats, log_weight: Floats, source: NDArray[np.int8], cells: NDArray[np.uint64]) -> Pool:
    """One entry a cell: the first stays, with the sum of the weights; the others are masked."""
    same = cells[:, :, None] == cells[:, None, :]
    total = np.log((same * np.exp(log_weight)[:, None, :]).sum(axis=2) + 1e-30)
    mask = ~_repeats(cells) & np.isfinite(log_weight)
    return _weighted(lat_lon, total, source, mask)


def _repeats(ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(B, N) -> true where the same value stands further left in its row."""
    earlier = np.tri(ids.shape[1], k=-1, dtype=bool)
    repeats: NDArray[np.bool_] = ((ids[:, :, None] == ids[:, None, :]) & earlier).any(axis=2)
    return repeats
