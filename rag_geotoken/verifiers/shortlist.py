"""A pool as a multimodal model is shown it: a few places far enough apart, with what is known of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision.pool import log_softmax
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.geo.gazetteer import place_text
from rag_geotoken.geo.sphere import Floats, haversine_km, pairwise_km
from rag_geotoken.types import BEAM, GREEDY, SAMPLE, Neighbors, Places, Pool

COUNT = 6  # places; on validation photos one of them is within 200 km of the truth as often as 99.9 %
APART_KM, AGREE_KM = 100.0, 25.0


@dataclass(frozen=True)
class Shortlist:
    """M places of each photo's pool that stand for all of it, the heaviest first.

    entries (B, M) int64 into the pool, -1 where there are no more; stands (B, C) int64, which of the M stands for a
    pool entry, -1 for none; lat_lon (B, M, 2) degrees.
    """

    entries: NDArray[np.int64]
    stands: NDArray[np.int64]
    lat_lon: Floats

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(B, M) where there is a place."""
        there: NDArray[np.bool_] = self.entries >= 0
        return there

    def spread(self, values: NDArray[np.float32], none: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values of the places (B, M), and of "none of these" (B,) -> values of the pool's entries (B, C)."""
        whole = np.concatenate([values, none[:, None]], axis=1)
        return np.take_along_axis(whole, np.where(self.stands < 0, values.shape[1], self.stands), axis=1)


@dataclass(frozen=True)
class Evidence:
    """What speaks for the places of a shortlist, each (B, M).

    neighbors: how many lie within ``APART_KM``; alike: the best one's similarity, 0 without one; place: the share that
    the alignment gives it among these places; generated: log of its share of the token model's mass, -inf for none.
    Where pictures were compared, match: how well the best fitting one that puts the photo nearby does; agree:
    how many put it within ``AGREE_KM`` of where that one does.
    """

    neighbors: NDArray[np.int64]
    alike: Floats
    place: Floats
    generated: Floats
    match: Floats | None = None
    agree: NDArray[np.int64] | None = None


def shortlist(pool: Pool, count: int = COUNT) -> Shortlist:
    """The heaviest entry of each pool, then the heaviest of those further than ``APART_KM`` from it, and so on.

    An entry weighs what all within ``APART_KM`` of it weigh together. Every entry within that distance of a chosen one
    is stood for by the nearest of them.
    """
    weight = pool.weight
    near = pairwise_km(np.where(pool.mask[..., None], pool.lat_lon, 0.0)) <= APART_KM
    near &= pool.mask[:, None, :] & pool.mask[:, :, None]
    # Of entries with the same surroundings the one that is heavier itself.
    mass = (near @ weight[..., None])[..., 0] + 1e-6 * weight
    rows, free = np.arange(len(mass)), pool.mask.copy()
    entries = np.full((len(rows), count), -1)
    for turn in range(count):
        best = np.where(free, mass, -1.0).argmax(axis=1)
        there = free[rows, best]
        entries[there, turn] = best[there]
        free &= ~(near[rows, best] & there[:, None])
    lat_lon = pool.lat_lon[rows[:, None], np.maximum(entries, 0)]
    away = np.where((entries >= 0)[:, None, :], _between(pool.lat_lon, lat_lon), np.inf)
    stands = np.where(pool.mask & (away.min(axis=2) <= APART_KM), away.argmin(axis=2), -1)
    return Shortlist(entries, stands, lat_lon)


def evidence(
    chosen: Shortlist,
    pool: Pool,
    neighbors: Neighbors,
    aligned: NDArray[np.float32],
    tuning: Tuning,
    matches: Places | None = None,
) -> Evidence:
    """What is known of a shortlist's places from the pool, the neighbors and the alignment's scores (B, C).

    tuning: the weights of the search, by which a neighbor's score becomes a similarity of at most one, and how sharply
    the alignment tells places apart. matches: where the neighbors' pictures, compared with the photo, put it.
    """
    near = _between(chosen.lat_lon, neighbors.lat_lon) <= APART_KM
    alike = np.where(near, neighbors.scores[:, None, :] / sum(tuning.search_weights), 0.0).max(axis=2)
    stood = (chosen.stands[:, None, :] == np.arange(chosen.entries.shape[1])[:, None]) & pool.mask[:, None, :]
    mass = np.where(np.isin(pool.source, (GREEDY, BEAM, SAMPLE)), pool.weight, 0.0)
    mass /= np.maximum(mass.sum(axis=1, keepdims=True), 1e-30)
    with np.errstate(divide="ignore"):
        generated = np.log((stood * mass[:, None, :]).sum(axis=2))
    cosines = np.where(stood, tuning.alignment_scale * aligned[:, None, :].astype(np.float64), -np.inf).max(axis=2)
    found = Evidence(near.sum(axis=2), alike, np.exp(log_softmax(cosines)), generated)
    if matches is None:
        return found
    fits = np.where(_between(chosen.lat_lon, matches.lat_lon) <= APART_KM, matches.scores[:, None, :], -1.0)
    together = _between(matches.lat_lon, matches.lat_lon) <= AGREE_KM
    best = np.take_along_axis(together, fits.argmax(axis=2)[..., None], axis=1)
    there = fits.max(axis=2) >= 0
    return replace(found, match=np.where(there, fits.max(axis=2), 0.0), agree=np.where(there, best.sum(axis=2), 0))


def nearby_rows(chosen: Shortlist, neighbors: Neighbors) -> NDArray[np.int64]:
    """The index's row (B, M) of the most alike neighbor within ``APART_KM`` of each place, -1 for none."""
    near = _between(chosen.lat_lon, neighbors.lat_lon) <= APART_KM
    scores = np.where(near & chosen.mask[..., None], neighbors.scores[:, None, :], -np.inf)
    rows = np.take_along_axis(neighbors.rows, scores.argmax(axis=2), axis=1)
    return np.where(np.isfinite(scores.max(axis=2)), rows, -1)


def place_texts(chosen: Shortlist) -> list[list[str | None]]:
    """A text for each of a shortlist's places, B lists of M; None where there is none."""
    texts = iter(place_text(*chosen.lat_lon[chosen.mask].T))
    return [[next(texts) if there else None for there in row] for row in chosen.mask.tolist()]


def candidates(
    chosen: Shortlist, row: int, places: list[str | None] | None = None, found: Evidence | None = None
) -> list[dict[str, Any]]:
    """A photo's shortlist as a prompt shows it, in the shortlist's order: numbers rounded, similarities of a hundred.

    places: a text for each of the M places, in order.
    """
    result = []
    for i in np.flatnonzero(chosen.mask[row]).tolist():
        lat, lon = chosen.lat_lon[row, i].tolist()
        result.append(
            {"lat": lat, "lon": lon, "place": places and places[i], "evidence": found and _words(found, row, i)}
        )
    return result


def _words(found: Evidence, row: int, i: int) -> dict[str, Any]:
    log = float(found.generated[row, i])
    words = {
        "neighbors": int(found.neighbors[row, i]),
        "alike": round(100 * float(found.alike[row, i])),
        "place": round(100 * float(found.place[row, i])),
        "generated": max(-9.9, log) if np.isfinite(log) else None,
    }
    if found.match is not None and found.agree is not None:
        words |= {"match": round(100 * float(found.match[row, i])), "agree": int(found.agree[row, i])}
    return words


def _between(a: Floats, b: Floats) -> Floats:
    """Distances (B, N, M) in km between places (B, N, 2) and (B, M, 2)."""
    return haversine_km(a[:, :, None, 0], a[:, :, None, 1], b[:, None, :, 0], b[:, None, :, 1])
