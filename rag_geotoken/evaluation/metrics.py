"""These functions measure a run: shares within radii, median, GeoScore, bootstrap intervals, calibration, abstention.

Distances are kilometers, NaN where a photo got no answer. Such a photo stays in every denominator and counts as wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import Floats, haversine_km
from rag_geotoken.types import RADII_KM, Predictions

GEOSCORE_SCALE_KM = 1492.7
MENDED_KM = 200  # a photo is mended where its answer comes within so many km, broken where it leaves them
BINS = 10  # of equal width, of stated confidences
SHARES = (1.0, 0.9, 0.75, 0.5, 0.25)  # of the photos that are answered


def inside(decided: Predictions, truth: Floats, first: int = 1) -> float:
    """Return minus the mean logarithm of the shares of photos outside 25, 200, 750 and 2500 km.

    Half a photo is always outside. first: 0 for 1 km too.
    """
    outside = (~hits(decided, truth)[:, first:]).sum(axis=0) + 0.5
    return -float(np.log(outside / len(truth)).mean())


def hits(decided: Predictions, truth: Floats) -> NDArray[np.bool_]:
    """Return which of the radii (B, R) each answer lies within."""
    km = haversine_km(*truth.T, *decided.lat_lon.T)
    within: NDArray[np.bool_] = km[:, None] <= np.array(RADII_KM)
    return within


def accuracy(km: ArrayLike) -> dict[str, float]:
    """Return the percentage of ALL photos with a distance (N,) <= r, by radius: {"1": ..., "25": ..., ...}.

    Distances (0.5, 30, NaN, 9000) give 25 % within 1 and 25 km, 50 % within 200 km and more. Raises GeoError for no
    photos or a negative distance.
    """
    distances = _distances(km, 1)
    return {str(r): 100 * float(np.mean(distances <= r)) for r in RADII_KM}


def geoscore(km: ArrayLike) -> float:
    """Return the mean of 5000 exp(-d / 1492.7), the scale of GeoGuessr's world map; 0 for a photo without an answer."""
    return float(np.mean(5000 * np.exp(-_distances(km, 1) / GEOSCORE_SCALE_KM)))


@dataclass(frozen=True)
class Intervals:
    """This class holds 95 % intervals in percent, low and high on the last axis, of V variants and R radii.

    Attributes:
        accuracy: (V, R, 2), of the share within each radius.
        difference: (V, V, R, 2); [a, b] is of accuracy a minus accuracy b on the same photos.
    """

    accuracy: Floats
    difference: Floats


def bootstrap(km: ArrayLike, seed: int, draws: int = 1000) -> Intervals:
    """Return percentile intervals (Efron 1979) over resampled photos, the same photos for every variant.

    km: distances (V, N) of V variants on the same N photos, NaN for no answer; (N,) is one variant. Photos with the
    same hits in every variant are interchangeable, so a draw is one multinomial over the distinct patterns of hits: the
    same distribution as drawing N photos, at a cost that does not grow with N. Raises GeoError for no photos or a
    negative distance.
    """
    distances = _distances(np.atleast_2d(np.asarray(km, np.float64)), 2)
    variants, photos = distances.shape
    # Class 0 is within the first radius, 5 beyond the last: a photo's classes tell all its hits.
    classes, count = np.unique(np.searchsorted(RADII_KM, distances).T, axis=0, return_counts=True)  # (G, V), (G,)
    hits = classes[:, :, None] <= np.arange(len(RADII_KM))  # (G, V, R)
    drawn = np.random.default_rng(seed).multinomial(photos, count / photos, size=draws)  # (draws, G)
    percent = 100 / photos * (drawn.astype(np.float64) @ hits.reshape(len(count), -1).astype(np.float64))
    percent = percent.reshape(draws, variants, len(RADII_KM))
    # One variant at a time keeps the differences at (draws, V, R) in memory.
    difference = np.stack([_interval(percent[:, [a]] - percent) for a in range(variants)])
    return Intervals(_interval(percent), difference)


def summary(km: ArrayLike, interval: Floats) -> dict[str, Any]:
    """Return the figures of ``metrics.json``: n, acc, median_km (None when most photos have no answer) and ci95.

    km: distances (N,), NaN for no answer. interval: (R, 2), such as ``bootstrap(all_variants, seed).accuracy[v]``.
    """
    distances = _distances(km, 1)
    return {"n": len(distances), **_accuracy_and_median(distances), "ci95": interval_by_radius(interval)}


def interval_by_radius(interval: Floats) -> dict[str, list[float]]:
    """Return an interval (R, 2) as low and high by radius, ready for JSON."""
    return {str(r): [round(float(b), 4) for b in pair] for r, pair in zip(RADII_KM, interval, strict=True)}


def _accuracy_and_median(distances: Floats) -> dict[str, Any]:
    median = float(np.median(distances))
    return {
        "acc": {radius: round(value, 4) for radius, value in accuracy(distances).items()},
        "median_km": round(median, 4) if math.isfinite(median) else None,
    }


def changed(after: Floats, before: Floats) -> dict[str, list[int]]:
    """Return the photos that are mended or broken: within ``MENDED_KM`` (N,) after, but not before, or the reverse."""
    right, was_right = after <= MENDED_KM, before <= MENDED_KM
    return {
        name: np.flatnonzero(mask).tolist()
        for name, mask in (("mended", right & ~was_right), ("broken", ~right & was_right))
    }


def gain(after: Floats, before: Floats, best: Floats, bounds: Floats) -> dict[str, Any]:
    """Return the gain over distances before (N,), its interval, its share of the gap to the best, and photos changed.

    best (N,): distances of each photo's best candidate. bounds (R, 2): of the gain, see :class:`Intervals`.
    """
    more = {str(r): round(100 * float((after <= r).mean() - (before <= r).mean()), 4) for r in RADII_KM}
    gap = float((best <= MENDED_KM).mean() - (before <= MENDED_KM).mean())
    closed = round(more[str(MENDED_KM)] / 100 / gap, 4) if gap > 0 else None
    counts = {name: len(photos) for name, photos in changed(after, before).items()}
    return {"gain": more, "gain_ci95": interval_by_radius(bounds), "gap_closed": closed, **counts}


def calibration(confidence: ArrayLike, km: ArrayLike) -> dict[str, dict[str, Any]]:
    """Return how reliable the stated confidences are: of places given 80 %, 80 in 100 should lie within the radius.

    Expected calibration error after Naeini et al. (AAAI 2015): the mean over photos of |confidence - share right| of
    the photo's bin, bins of equal width. Photos that state no confidence (NaN) are left out, and n says how many stay.

    Args:
        confidence: Shares (N, R) in 0..1, one column a radius of RADII_KM.
        km: Distances (N,); NaN counts as outside every radius.

    Returns:
        By radius: {"ece": 0..1 or None without a photo, "n": photos, "bins": [{"low", "high", "n", "confidence",
        "correct"}]}, the last two the means of the bin; empty bins are left out.

    Raises:
        GeoError: A shape does not fit, or a confidence is outside 0..1.
    """
    distances, stated = _distances(km, 1), np.asarray(confidence, np.float64)
    if stated.shape != (len(distances), len(RADII_KM)):
        raise GeoError(f"confidences of shape {stated.shape}: give ({len(distances)}, {len(RADII_KM)})")
    if np.any((stated < -1e-6) | (stated > 1 + 1e-6)):  # float32 sums of weights miss 1 by less
        raise GeoError("a confidence is outside 0..1: give shares, not percent")
    stated = np.clip(stated, 0, 1)
    return {str(radius): _reliability(stated[:, r], distances <= radius) for r, radius in enumerate(RADII_KM)}


def _reliability(stated: Floats, right: NDArray[np.bool_]) -> dict[str, Any]:
    known = np.isfinite(stated)
    stated, right = stated[known], right[known]
    bins = np.minimum((stated * BINS).astype(np.int64), BINS - 1)
    n = np.bincount(bins, minlength=BINS)
    mean_stated = np.bincount(bins, stated, BINS) / np.maximum(n, 1)
    mean_right = np.bincount(bins, right, BINS) / np.maximum(n, 1)
    rows = []
    for b in np.flatnonzero(n).tolist():
        means = {"confidence": round(float(mean_stated[b]), 6), "correct": round(float(mean_right[b]), 6)}
        rows.append({"low": b / BINS, "high": (b + 1) / BINS, "n": int(n[b]), **means})
    ece = float(np.sum(n * np.abs(mean_stated - mean_right)) / len(stated)) if len(stated) else None
    return {"ece": ece, "n": len(stated), "bins": rows}


def abstention(area_km2: ArrayLike, km: ArrayLike) -> list[dict[str, Any]]:
    """Return the accuracy if only the photos with the least spread posteriors are answered.

    Areas (1, 9, 2, NaN) km2 and distances (0.5, 900, 30, NaN) km, half of them kept: the photos of 1 and 2 km2, of
    which 50 % lie within 25 km and 100 % within 200 km.

    Args:
        area_km2: Effective area of each photo's posterior (N,), exp of its spatial entropy; NaN is kept last, equals
            in the order they come.
        km: Distances (N,); NaN, a photo without an answer, counts as wrong if it is kept.

    Returns:
        A row for each of ``SHARES``: {"kept": share, "n": photos kept, at least one, "max_area_km2": the largest area
        kept, None when it is not known, "acc": percent of the kept by radius, "median_km": None when infinite}.

    Raises:
        GeoError: There are no photos, the arrays differ in length, or an area or a distance is negative.
    """
    distances, areas = _distances(km, 1), np.asarray(area_km2, np.float64)
    if areas.shape != distances.shape:
        raise GeoError(f"areas of shape {areas.shape}: give one for each of the {len(distances)} photos")
    if np.any(areas < 0):
        raise GeoError("an area is negative: give km2 >= 0, NaN for a photo without a posterior")
    order = np.argsort(areas, kind="stable")  # NaN goes last
    rows = []
    for share in SHARES:
        kept = order[: max(1, round(share * len(order)))]
        widest = float(areas[kept[-1]])
        area = float(f"{widest:.6g}") if math.isfinite(widest) else None
        figures = _accuracy_and_median(distances[kept])
        rows.append({"kept": share, "n": len(kept), "max_area_km2": area, **figures})
    return rows


def _interval(percent: Floats) -> Floats:
    """Return the 2.5 and 97.5 percentiles (..., R, 2) of draws (draws, ..., R)."""
    return np.moveaxis(np.quantile(percent, (0.025, 0.975), axis=0), 0, -1)


def _distances(km: ArrayLike, axes: int) -> Floats:
    """Check distances and return them with infinity for NaN."""
    distances = np.asarray(km, np.float64)
    if distances.ndim != axes:
        raise GeoError(f"distances of shape {distances.shape}: give {axes} ax{'i' if axes == 1 else 'e'}s")
    if distances.size == 0:
        raise GeoError("there are no photos to score: give at least one")
    if np.any(distances < 0):
        raise GeoError("a distance is negative: give kilometers >= 0, NaN for a photo without an answer")
    return np.where(np.isnan(distances), np.inf, distances)
