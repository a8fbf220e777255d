"""Choose the few numbers of the selection on validation photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from rag_geotoken import selection
from rag_geotoken.geo import haversine_km
from rag_geotoken.metrics import RADII_KM
from rag_geotoken.pictures import load_pictures
from rag_geotoken.pipeline import Geolocator, Options
from rag_geotoken.selection import Tuning
from rag_geotoken.sources import read_source
from rag_geotoken.types import Neighbors, Pool, Predictions

# One setting after the other, twice around: what is best for the mean share within the radii that views can reach.
DECISION = {
    "neighbor_share": [0.02, 0.05, 0.1, 0.2, 0.3, 0.5],
    "neighbor_scale": [5.0, 10.0, 15.0, 20.0, 30.0],
    "alignment_scale": [32.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0],
    "spread_km": [12.0, 18.0, 25.0, 35.0, 50.0, 75.0],
}
# The same for the mean squared error of the stated chances (Brier), the decision standing still.
CONFIDENCE = {
    "confidence_scale": [8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0],
    "confidence_km": [6.0, 10.0, 14.0, 18.0, 25.0, 35.0],
}
DENSITY = {"density_scale": [5.0, 10.0, 20.0, 40.0], "density_km": [10.0, 25.0, 50.0, 100.0, 200.0]}


Log = Callable[[str], None]


def tune(geolocator: Geolocator, source: str, log: Log) -> Tuning:
    """Coordinate search on a source of validation photos -> the tuning that did best on them.

    The density baseline gets its best kernel too, so that it is an honest opponent.
    """
    photos = read_source(source)
    truth = np.column_stack([photos["lat"].to_numpy(), photos["lon"].to_numpy()])
    pixels, _ = load_pictures(photos["image"].to_pylist(), 64)
    photo = geolocator.encode(pixels)
    best = Tuning(search_weights=geolocator.tuning.search_weights)
    options = Options()
    neighbors = geolocator.search(photo, options.neighbors)
    blocks = [slice(i, i + 256) for i in range(0, len(photo), 256)]
    parts = [Neighbors(neighbors.rows[b], neighbors.lat_lon[b], neighbors.scores[b]) for b in blocks]
    candidates = [geolocator.propose(photo[b], n, options) for b, n in zip(blocks, parts, strict=True)]

    def pools(tuning: Tuning) -> list[Pool]:
        pairs = zip(parts, candidates, strict=True)
        return [selection.make_pool(n, c, geolocator.tokenizer, tuning) for n, c in pairs]

    similar = [geolocator.verify(photo[b], pool) for b, pool in zip(blocks, pools(best), strict=True)]

    def decide(tuning: Tuning) -> list[Predictions]:
        return [selection.decide(p, s, tuning) for p, s in zip(pools(tuning), similar, strict=True)]

    def density(tuning: Tuning) -> list[Predictions]:
        return [selection.density(n, tuning) for n in parts]

    best = _search(best, DECISION, lambda tuning: _share(decide(tuning), truth), log)
    best = _search(best, CONFIDENCE, lambda tuning: -_brier(decide(tuning), truth), log)
    return _search(best, DENSITY, lambda tuning: _share(density(tuning), truth), log)


def _search(best: Tuning, grid: dict[str, list[float]], value: Callable[[Tuning], float], log: Log) -> Tuning:
    """Coordinate search: every setting's best value with the others as they are, twice around."""
    for _ in range(2):
        for name, choices in grid.items():
            tried = [Tuning(**asdict(best) | {name: choice}) for choice in choices]
            values = [value(tuning) for tuning in tried]
            best = tried[int(np.argmax(values))]
            log(f"{name} {getattr(best, name)}: " + " ".join(f"{v:.4f}" for v in values))
    return best


def _share(decided: list[Predictions], truth: NDArray[np.float64]) -> float:
    """Mean percent within 25, 200, 750 and 2500 km."""
    return 100.0 * float(_hits(decided, truth).mean())


def _brier(decided: list[Predictions], truth: NDArray[np.float64]) -> float:
    """Mean squared error of the stated chances at 25, 200, 750 and 2500 km."""
    stated = np.concatenate([part.confidence for part in decided])[:, 1:]
    return float(np.mean((stated - _hits(decided, truth)) ** 2))


def _hits(decided: list[Predictions], truth: NDArray[np.float64]) -> NDArray[np.bool_]:
    answers = np.concatenate([part.lat_lon for part in decided])
    km = haversine_km(*truth.T, *answers.T)
    hits: NDArray[np.bool_] = km[:, None] <= np.array(RADII_KM[1:])
    return hits
