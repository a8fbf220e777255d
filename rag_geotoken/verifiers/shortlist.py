"""These functions make the shortlist that a multimodal model is shown: a few distant places with their evidence."""

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
Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Shortlist:
    """This class holds M places that stand for each photo's pool, the heaviest first.

    entries (B, M) int64 into the pool, -1 where there are no more; stands (B, C) int64, which of the M stands for a
    pool entry, -1 for none; lat_lon (B, M, 2) degrees.
    """

    entries: NDArray[np.int64]
    stands: NDArray[np.int64]
    lat_lon: Floats

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Return a mask (B, M), true where there is a place."""
        mask: NDArray[np.bool_] = self.entries >= 0
        return mask

    def spread(self, values: Scores, none: Scores) -> Scores:
        """Spread values of the places (B, M) and of "none of these" (B,) to the pool's entries (B, C)."""
        whole = np.concatenate([values, none[:, None]], axis=1)
        return np.take_along_axis(whole, np.where(self.stands < 0, values.shape[1], self.stands), axis=1)


@dataclass(frozen=True)
class Evidence:
    """This class holds the evidence for the places of a shortlist, each field (B, M).

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
    """Select the heaviest entry of each pool, then the heaviest further than ``APART_KM`` from it, and so on.

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
        valid = free[rows, best]
        entries[valid, turn] = best[valid]
        free &= ~(near[rows, best] & valid[:, None])
    lat_lon = pool.lat_lon[rows[:, None], np.maximum(entries, 0)]
    distance = np.where((entries >= 0)[:, None, :], _distances(pool.lat_lon, lat_lon), np.inf)
    stands = np.where(pool.mask & (distance.min(axis=2) <= APART_KM), distance.argmin(axis=2), -1)
    return Shortlist(entries, stands, lat_lon)


def evidence(
    chosen: Shortlist, pool: Pool, neighbors: Neighbors, *, aligned: Scores, tuning: Tuning, matches: Places | None
) -> Evidence:
    """Collect the evidence for a shortlist's places from the pool, the neighbors and the alignment's scores (B, C).

    tuning: the weights of the search, by which a neighbor's score becomes a similarity of at most one, and how sharply
    the alignment tells places apart. matches: where the neighbors' pictures, compared with the photo, put it.
    """
    near = _distances(chosen.lat_lon, neighbors.lat_lon) <= APART_KM
    alike = np.where(near, neighbors.scores[:, None, :] / sum(tuning.search_weights), 0.0).max(axis=2)
    stands = (chosen.stands[:, None, :] == np.arange(chosen.entries.shape[1])[:, None]) & pool.mask[:, None, :]
    mass = np.where(np.isin(pool.source, (GREEDY, BEAM, SAMPLE)), pool.weight, 0.0)
    mass /= np.maximum(mass.sum(axis=1, keepdims=True), 1e-30)
    with np.errstate(divide="ignore"):
        generated = np.log((stands * mass[:, None, :]).sum(axis=2))
    cosines = np.where(stands, tuning.alignment_scale * aligned[:, None, :].astype(np.float64), -np.inf).max(axis=2)
    known = Evidence(near.sum(axis=2), alike, np.exp(log_softmax(cosines)), generated)
    if matches is None:
        return known
    fits = np.where(_distances(chosen.lat_lon, matches.lat_lon) <= APART_KM, matches.scores[:, None, :], -1.0)
    together = _distances(matches.lat_lon, matches.lat_lon) <= AGREE_KM
    best = np.take_along_axis(together, fits.argmax(axis=2)[..., None], axis=1)
    match, agree = np.maximum(fits.max(axis=2), 0.0), np.where(fits.max(axis=2) >= 0, best.sum(axis=2), 0)
    return replace(known, match=match, agree=agree)


def nearby_rows(chosen: Shortlist, neighbors: Neighbors) -> NDArray[np.int64]:
    """Return the index row (B, M) of the most similar neighbor within ``APART_KM`` of each place, -1 for none."""
    near = _distances(chosen.lat_lon, neighbors.lat_lon) <= APART_KM
    scores = np.where(near & chosen.mask[..., None], neighbors.scores[:, None, :], -np.inf)
    rows = np.take_along_axis(neighbors.rows, scores.argmax(axis=2), axis=1)
    return np.where(np.isfinite(scores.max(axis=2)), rows, -1)


def place_texts(chosen: Shortlist) -> list[list[str | None]]:
    """Describe each of a shortlist's places by a text, B lists of M; None where there is no place."""
    texts = iter(place_text(*chosen.lat_lon[chosen.mask].T))
    return [[next(texts) if valid else None for valid in row] for row in chosen.mask.tolist()]


def candidates(
    chosen: Shortlist, row: int, places: list[str | None] | None = None, known: Evidence | None = None
) -> list[dict[str, Any]]:
    """List a photo's shortlist as a prompt shows it, in order: numbers rounded, similarities in percent.

    places: a text for each of the M places, in order.
    """
    return [
        {
            "lat": float(chosen.lat_lon[row, i, 0]),
            "lon": float(chosen.lat_lon[row, i, 1]),
            "place": places and places[i],
            "evidence": known and _rounded(known, row, i),
        }
        for i in np.flatnonzero(chosen.mask[row]).tolist()
    ]


def _rounded(known: Evidence, row: int, i: int) -> dict[str, Any]:
    generated = float(known.generated[row, i])
    shown = {
        "neighbors": int(known.neighbors[row, i]),
        "alike": round(100 * float(known.alike[row, i])),
        "place": round(100 * float(known.place[row, i])),
        "generated": max(-9.9, generated) if np.isfinite(generated) else None,
    }
    if known.match is not None and known.agree is not None:
        shown |= {"match": round(100 * float(known.match[row, i])), "agree": int(known.agree[row, i])}
    return shown


def _distances(a: Floats, b: Floats) -> Floats:
    """Return the distances (B, N, M) in km between places (B, N, 2) and (B, M, 2)."""
    return haversine_km(a[:, :, None, 0], a[:, :, None, 1], b[:, None, :, 0], b[:, None, :, 1])
