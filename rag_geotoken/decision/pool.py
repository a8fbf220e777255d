"""These functions make the pool: the generated and retrieved places of a photo, one of which will be the answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rag_geotoken import types
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.geo.cells import S2Tokenizer, cell_centers
from rag_geotoken.geo.sphere import Floats, haversine_km
from rag_geotoken.options import Options
from rag_geotoken.types import SOURCES, Candidates, Neighbors, Places, Pool, Posterior, Tables


def pool_of(tables: Tables, options: Options, tokenizer: S2Tokenizer, tuning: Tuning) -> Pool:
    """Make the pool that verifiers score: from one source alone where the options name a single one, else from all.

    From all: retrieved and generated places merged, one entry per cell, then moved places, then those of a multimodal
    model. ``within`` of the options drops the entries outside its region.
    """
    if len(options.sources) == 1:
        pool = _single_source_pool(options.sources[0], tables, tokenizer, tuning)
    else:
        candidates = tables.candidates if options.propose else None
        places = tables.places if options.gps_places else None
        pool = make_pool(tables.neighbors, candidates, tokenizer, tuning=tuning, places=places)
        if options.visual:
            pool = extend(pool, tables.matches, tuning)
        if options.diverse:
            named = tables.diverse.lat_lon
            pool = join(pool, named, np.zeros(named.shape[:2]), share=tuning.mllm_share, source=types.MLLM)
    return keep_within(pool, options.within) if options.within else pool


def _single_source_pool(source: str, tables: Tables, tokenizer: S2Tokenizer, tuning: Tuning) -> Pool:
    if source == "neighbor":
        return scored_pool(tables.neighbors, tuning.density_scale, types.NEIGHBOR)
    if source == "visual":
        return scored_pool(tables.matches, tuning.match_scale, types.VISUAL)
    if source == "frontier":
        return posterior_pool(tables.posterior)
    if source == "gps":
        return make_pool(None, None, tokenizer, tuning=tuning, places=tables.places)
    kept = tables.candidates.source[0] == SOURCES.index(source)
    cells = Candidates(*(values[:, kept] for values in vars(tables.candidates).values()))
    return make_pool(None, cells, tokenizer, tuning=tuning)


def chosen_pool(options: Options, pool: Pool) -> Pool:
    """Select the entries of the sources that the options admit to the decision."""
    sources = [SOURCES.index(name) for name in options.pooled]
    return pool if np.isin(pool.source[pool.mask], sources).all() else only(pool, *sources)


def make_pool(
    neighbors: Neighbors | None,
    candidates: Candidates | None,
    tokenizer: S2Tokenizer,
    tuning: Tuning,
    places: Places | None = None,
) -> Pool:
    """Merge generated and retrieved places, one entry per cell of the tokenizer's level.

    Generated entries are weighted by their probability at temperature 1, neighbors by a softmax of their scores, places
    found by GPS embedding evenly; each kind's weights add up to its share. The first entry of a cell keeps its
    coordinates and gets the sum of all weights: neighbors come first, then generated cells, then places. Raises
    ValueError for no entries.
    """
    kinds: list[tuple[Floats, Floats, NDArray[np.int8], NDArray[np.uint64]]] = []
    present = [kind is not None for kind in (neighbors, candidates, places)]
    if not any(present):
        raise ValueError("a pool needs neighbors, candidates or places")
    # The shares of absent kinds go to the others in proportion; a single kind without a share gets all.
    given = [tuning.neighbor_share, 1.0 - tuning.neighbor_share - tuning.gps_share, tuning.gps_share]
    shares: Floats = np.multiply(given, present)
    shares = shares / shares.sum() if shares.any() else np.divide(present, sum(present))
    if neighbors is not None:
        cells = tokenizer.cell_ids(neighbors.lat_lon[..., 0], neighbors.lat_lon[..., 1])
        weight = log_softmax(tuning.neighbor_scale * neighbors.scores.astype(np.float64)) + np.log(shares[0])
        kinds.append((neighbors.lat_lon, weight, np.full(cells.shape, types.NEIGHBOR, np.int8), cells))
    if candidates is not None:
        cells = tokenizer.tokens_to_ids(candidates.tokens)
        log_prob = np.where(_repeats(cells), -np.inf, candidates.log_prob.astype(np.float64))
        kinds.append((candidates.lat_lon, log_softmax(log_prob) + np.log(shares[1]), candidates.source, cells))
    if places is not None:
        cells = tokenizer.cell_ids(places.lat_lon[..., 0], places.lat_lon[..., 1])
        with np.errstate(divide="ignore"):
            weight = np.full(cells.shape, np.log(shares[2] / cells.shape[1]))
        kinds.append((places.lat_lon, weight, np.full(cells.shape, types.GPS, np.int8), cells))
    lat_lon, log_weight, source, cells = (np.concatenate(parts, axis=1) for parts in zip(*kinds, strict=True))
    same_cell = cells[:, :, None] == cells[:, None, :]
    total = np.log((same_cell * np.exp(log_weight)[:, None, :]).sum(axis=2) + 1e-30)
    return _normalized(Pool(lat_lon, total, source, ~_repeats(cells) & np.isfinite(log_weight)))


def extend(pool: Pool, matches: Places, tuning: Tuning) -> Pool:
    """Append the places to which the neighbors' pictures move the photo, each an entry of its own.

    They have ``visual_share`` of the weight, by a softmax of ``match_scale`` times their scores.
    """
    weight = scored_pool(matches, tuning.match_scale, types.VISUAL).log_weight.astype(np.float64)
    return join(pool, matches.lat_lon, weight, share=tuning.visual_share, source=types.VISUAL)


def join(pool: Pool, lat_lon: Floats, log_weight: Floats, *, share: float, source: int) -> Pool:
    """Append places (B, N, 2), NaN for none, with logarithmic weights (B, N) as entries of a pool.

    They have a share of the weight, the others the rest in proportion, so that :func:`without` takes them out again. A
    pool that gets no place keeps all its weight.
    """
    mask: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(lat_lon), axis=2)
    some = mask.any(axis=1, keepdims=True)
    added = np.where(mask, log_weight, -np.inf)
    added = np.where(some, log_softmax(np.where(some, added, 0.0)) + np.log(share), -np.inf)
    weight = np.concatenate([pool.log_weight + np.where(some, np.log1p(-share), 0.0), added], axis=1)
    return Pool(
        np.concatenate([pool.lat_lon, np.where(mask[..., None], lat_lon, 0.0)], axis=1),
        weight.astype(np.float32),
        np.concatenate([pool.source, np.full(mask.shape, source, np.int8)], axis=1),
        np.concatenate([pool.mask, mask], axis=1),
    )


def without(pool: Pool, source: int) -> Pool:
    """Remove the entries of one source; a cell that another source has too stays."""
    return _normalized(replace(pool, mask=pool.mask & (pool.source != source)))


def only(pool: Pool, *sources: int) -> Pool:
    """Select the entries of some sources, of which every photo must have one."""
    return _normalized(replace(pool, mask=pool.mask & np.isin(pool.source, sources)))


def scored_pool(places: Neighbors | Places, scale: float, source: int) -> Pool:
    """Make a pool of one source alone, one entry per place, weighted by a softmax of ``scale`` times their scores."""
    shape, weight = places.scores.shape, scale * places.scores.astype(np.float64)
    return _normalized(Pool(places.lat_lon, weight, np.full(shape, source, np.int8), np.ones(shape, bool)))


def posterior_pool(posterior: Posterior, most: int = 64) -> Pool:
    """Make a pool of the ``most`` heaviest cells of a posterior, each at its center."""
    mass = posterior.mass[:, :most].astype(np.float64)
    with np.errstate(divide="ignore"):
        weight = np.log(mass)
    lat_lon = np.stack(cell_centers(posterior.cells[:, :most]), axis=-1)
    return _normalized(Pool(lat_lon, weight, np.full(mass.shape, types.FRONTIER, np.int8), mass > 0))


def keep_within(pool: Pool, within: tuple[float, float, float]) -> Pool:
    """Select the entries within a region (lat, lon, km); where none is, the nearest entry alone stays."""
    lat, lon, km = within
    distance = np.where(pool.mask, haversine_km(pool.lat_lon[..., 0], pool.lat_lon[..., 1], lat, lon), np.inf)
    nearest = distance.min(axis=1, keepdims=True)
    return _normalized(replace(pool, mask=pool.mask & (distance <= np.maximum(km, nearest))))


def reweigh(pool: Pool, scores: NDArray[np.float32], scale: float) -> Pool:
    """Multiply each entry's weight by exp(scale * score), for a verifier's scores (B, C), and normalize."""
    return _normalized(replace(pool, log_weight=pool.log_weight + scale * scores.astype(np.float64)))


def temper(pool: Pool, power: float) -> Pool:
    """Raise every weight to a power and normalize: below 1 flatter, above 1 sharper."""
    with np.errstate(invalid="ignore"):
        weight = power * pool.log_weight.astype(np.float64)
    return _normalized(replace(pool, log_weight=weight))


def log_softmax(values: Floats) -> Floats:
    """Return the logarithm of the softmax over the last axis; minus infinity stays so."""
    shifted = values - values.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _normalized(pool: Pool) -> Pool:
    """Normalize logarithmic weights of any precision over the entries."""
    weight = log_softmax(np.where(pool.mask, pool.log_weight, -np.inf).astype(np.float64))
    return replace(pool, log_weight=weight.astype(np.float32))


def _repeats(ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return a mask (B, N), true where the same value stands further left in its row."""
    earlier = np.tri(ids.shape[1], k=-1, dtype=bool)
    repeats: NDArray[np.bool_] = ((ids[:, :, None] == ids[:, None, :]) & earlier).any(axis=2)
    return repeats
