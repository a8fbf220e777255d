"""Choose the few numbers of the selection on validation photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision import strategies as selection
from rag_geotoken.decision.confidence import calibrated, fit_calibration
from rag_geotoken.decision.pool import extend, make_pool, neighbor_pool
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.errors import GeoError
from rag_geotoken.geo import haversine_km
from rag_geotoken.options import Options
from rag_geotoken.pipeline import Geolocator, digests
from rag_geotoken.sources import read_source
from rag_geotoken.types import RADII_KM, Candidates, Neighbors, Places, Pool, Predictions
from rag_geotoken.verifiers.agreement import support
from rag_geotoken.verifiers.range_plus import likeness

# One setting after the other, twice around: what leaves the fewest photos outside 25, 200, 750 and 2500 km, the radii
# that views can reach. The mean of the shares' logarithms is compared, or 25 km would decide alone.
DECISION = {
    "neighbor_share": [0.02, 0.05, 0.1, 0.2, 0.3, 0.5],
    "gps_share": [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1],
    "neighbor_scale": [5.0, 10.0, 15.0, 20.0, 30.0, 45.0],
    "alignment_scale": [64.0, 96.0, 128.0, 160.0, 192.0, 256.0, 384.0, 512.0],
    "spread_km": [12.0, 18.0, 25.0, 35.0, 50.0, 75.0, 100.0],
}
REWARD = {"reward_scale": [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]}
# By the look alone, from where the bell is as wide as a gallery's spacing: exp(10,000 cos) is one of 64 km. From the
# released bell of 1000 km the search ends where the look of the surroundings does not count at all, and does worse.
LOOK = {
    "look_scale": [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 240.0, 320.0, 480.0],
    "look_spatial": [40.0, 4000.0, 10000.0, 20000.0, 50000.0],
    "look_semantic": [12.0, 24.0, 48.0],
    "look_beta": [0.0, 0.25, 0.5, 0.75, 1.0],
}
# The same for the mean squared error of the calibrated chances (Brier), the decision standing still.
CONFIDENCE = {
    "confidence_scale": [0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0],
    "confidence_km": [6.0, 10.0, 14.0, 18.0, 25.0, 35.0, 50.0],
}
VISUAL_CONFIDENCE = {
    "visual_confidence_scale": [0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0],
    "visual_confidence_km": [0.5, 1.0, 2.0, 5.0, 10.0, 20.0],
}
# Verified by the pictures and the alignment; 1 km counts too.
VISUAL = {
    "visual_scale": [0.5, 1.0, 2.0, 4.0, 8.0, 16.0],
    "visual_share": [0.1, 0.3, 0.5, 0.7, 0.9],
    "match_scale": [0.0, 2.0, 5.0, 10.0, 20.0, 40.0],
    "visual_km": [40.0, 20.0, 10.0, 5.0, 2.0, 1.0],  # of equals the first, which asks least of a gallery's places
    "visual_spread_km": [0.5, 1.0, 2.0, 5.0, 15.0, 50.0],
}
DENSITY = {"density_scale": [5.0, 10.0, 20.0, 40.0], "density_km": [10.0, 25.0, 50.0, 100.0, 200.0, 300.0]}
MODES: tuple[tuple[str, ...], ...] = (
    (),
    ("alignment",),
    ("reward",),
    ("alignment", "reward"),
    ("look",),
    ("alignment", "look"),
    ("visual",),
    ("alignment", "visual"),
)
Log = Callable[[str], None]
Mix = tuple[float, float, float]  # beta, semantic, spatial
Scores = dict[str | Mix, NDArray[np.float32]]  # of a verifier, or of the look by how it is mixed


def tune(geolocator: Geolocator, source: str, log: Log) -> Tuning:
    """Coordinate search on a source of validation photos -> the tuning that did best on them.

    The decision is tuned as verified by alignment, then the reward head's scale beside it, then the look as the only
    verifier, then the comparison of pictures beside the alignment, then the confidence, with a calibration for every
    set of verifiers. The density baseline gets its best kernel too, to be an honest opponent. Photos without a place
    are left out. Raises GeoError when none has one or a picture cannot be read.
    """
    photos = read_source(source)
    photos = photos.filter(photos["lat"].is_valid())
    if not len(photos):
        raise GeoError(f"{source} has no photo with a place: tuning needs the truth")
    truth = np.column_stack([photos["lat"].to_numpy(), photos["lon"].to_numpy()])
    parts = _propose(geolocator, photos["image"].to_pylist(), log)
    modes = [mode for mode in MODES if "reward" not in mode or geolocator.reward is not None]

    def decide(tuning: Tuning, mode: tuple[str, ...]) -> Predictions:
        found = []
        mix = tuning.look_beta, tuning.look_semantic, tuning.look_spatial
        for near, cells, places, matches, scores in parts:
            pool = make_pool(near, cells, geolocator.tokenizer, tuning, places)
            pool = extend(pool, matches, tuning) if "visual" in mode else pool
            given = {name: scores[mix if name == "look" else name] for name in mode if name != "visual"}
            chosen = {name: values[:, : pool.mask.shape[1]] for name, values in given.items()}
            if "visual" in mode:
                chosen["visual"] = support(pool, matches, tuning.visual_km)
            found.append(selection.decide(pool, chosen, tuning))
        return _together(found)

    def density(tuning: Tuning) -> Predictions:
        pools = (neighbor_pool(near, tuning.density_scale) for near, *_ in parts)
        return _together([selection.density(pool, tuning) for pool in pools])

    def brier(tuning: Tuning, mode: tuple[str, ...], first: int = 1) -> float:
        decided = decide(tuning, mode)
        right = hits(decided, truth)
        sure = calibrated(decided.confidence, fit_calibration(decided.confidence, right))
        return -float(np.mean((sure - right)[:, first:] ** 2))

    best = Tuning(search_weights=geolocator.tuning.search_weights)
    best = _search(best, DECISION, lambda tuning: inside(decide(tuning, ("alignment",)), truth), log)
    if geolocator.reward is not None:
        best = _search(best, REWARD, lambda tuning: inside(decide(tuning, ("alignment", "reward")), truth), log)
    best = _search(best, LOOK, lambda tuning: inside(decide(tuning, ("look",)), truth), log)
    best = _search(best, VISUAL, lambda tuning: inside(decide(tuning, ("alignment", "visual")), truth, 0), log)
    best = _search(best, CONFIDENCE, lambda tuning: brier(tuning, ("alignment",)), log)
    best = _search(best, VISUAL_CONFIDENCE, lambda tuning: brier(tuning, ("alignment", "visual"), 0), log)
    best = _search(best, DENSITY, lambda tuning: inside(density(tuning), truth), log)
    decided = {mode: decide(best, mode) for mode in modes}
    for mode, predictions in decided.items():
        shares = " ".join(f"{share:.2f}" for share in 100 * hits(predictions, truth).mean(axis=0))
        log(f"verified by {selection.verified_by(mode)}: {shares} % within 1, 25, 200, 750, 2500 km")
    pairs = {mode: fit_calibration(found.confidence, hits(found, truth)) for mode, found in decided.items()}
    return replace(best, calibration={selection.verified_by(mode): each for mode, each in pairs.items()})


def _propose(
    geolocator: Geolocator, references: list[str], log: Log
) -> list[tuple[Neighbors, Candidates, Places, Scores]]:
    """Neighbours, candidates, matches and verifiers' scores of photos, in blocks: what no setting changes."""
    options, parts = Options(), []
    for start in range(0, len(references), 256):
        pixels, errors = geolocator.alignment.load(references[start : start + 256])
        if any(errors):
            raise GeoError(f"tuning needs pictures that can be read: {next(filter(None, errors))}")
        photo = geolocator.encode(pixels)
        near = geolocator.search(photo, options.neighbors, digests(pixels))
        keys = list(range(start, start + len(photo)))
        cells = geolocator.propose(photo, near, options, keys)
        places = geolocator.places(photo, options.gps_places)
        matches = geolocator.match(pixels, near)
        pool = geolocator.pool(near, cells, places, matches=matches)
        names = ["alignment"] if geolocator.reward is None else ["alignment", "reward"]
        scores: Scores = {name: geolocator.verify(name, photo, near, pool) for name in names}
        parts.append((near, cells, places, matches, scores | _looks(geolocator, photo, pool)))
    log(f"pools of {len(references)} validation photos")
    return parts


def _looks(geolocator: Geolocator, photo: NDArray[np.float32], pool: Pool) -> Scores:
    """The look's scores (B, C) for every mixture of the grid; the two parts of a look are estimated once."""
    spots, photo = pool.lat_lon[pool.mask], photo[np.nonzero(pool.mask)[0], 0]
    places, look, result = geolocator.alignment.embed_places(spots), geolocator.look, Scores()
    semantic = {sharp: look.of(spots, places, beta=1.0, semantic=sharp) for sharp in LOOK["look_semantic"]}
    spatial = {sharp: look.of(spots, places, beta=0.0, spatial=sharp) for sharp in LOOK["look_spatial"]}
    for beta, alike, near in product(LOOK["look_beta"], semantic, spatial):
        scores = np.zeros(pool.mask.shape, np.float32)
        scores[pool.mask] = likeness(photo, beta * semantic[alike] + (1 - beta) * spatial[near])
        result[beta, alike, near] = scores
    return result


def _search(best: Tuning, grid: dict[str, list[float]], value: Callable[[Tuning], float], log: Log) -> Tuning:
    """Coordinate search: every setting's best value with the others as they are, twice around."""
    for _ in range(2 if len(grid) > 1 else 1):
        for name, choices in grid.items():
            tried = [replace(best, **{name: choice}) for choice in choices]  # type: ignore[arg-type]
            values = [value(tuning) for tuning in tried]
            best = tried[int(np.argmax(values))]
            log(f"{name} {getattr(best, name)}: " + " ".join(f"{v:.4f}" for v in values))
    return best


def _together(parts: list[Predictions]) -> Predictions:
    return Predictions(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))


def inside(decided: Predictions, truth: NDArray[np.float64], first: int = 1) -> float:
    """Minus the mean logarithm of the shares outside 25, 200, 750 and 2500 km; half a photo is always outside.

    first: 0 for 1 km too.
    """
    outside = (~hits(decided, truth)[:, first:]).sum(axis=0) + 0.5
    return -float(np.log(outside / len(truth)).mean())


def hits(decided: Predictions, truth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the radii (B, R) each answer lies within."""
    km = haversine_km(*truth.T, *decided.lat_lon.T)
    hits: NDArray[np.bool_] = km[:, None] <= np.array(RADII_KM)
    return hits
