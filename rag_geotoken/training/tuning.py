"""Choose the few numbers of the selection on validation photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

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
GRID: dict[str, list[float]] = {
    "neighbor_share": [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5],
    "neighbor_scale": [5.0, 10.0, 15.0, 20.0, 30.0, 45.0],
    "alignment_scale": [32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0],
    "spread_km": [6.0, 12.0, 18.0, 25.0, 35.0, 50.0],
}


def tune(geolocator: Geolocator, source: str, log: Callable[[str], None]) -> Tuning:
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

    def full(tuning: Tuning) -> float:
        aligned = [selection.align(p, s, tuning) for p, s in zip(pools(tuning), similar, strict=True)]
        return _score([selection.minimum_bayes_risk(p, tuning) for p in aligned], truth)

    for _ in range(2):
        for name, values in GRID.items():
            tried = [Tuning(**asdict(best) | {name: value}) for value in values]
            scores = [full(tuning) for tuning in tried]
            best = tried[int(np.argmax(scores))]
            log(f"{name} {getattr(best, name)}: {max(scores):.3f} " + " ".join(f"{s:.2f}" for s in scores))
    kernels = [replace(best, density_km=km) for km in (25.0, 50.0, 100.0, 150.0, 200.0)]
    return max(kernels, key=lambda tuning: _score([selection.density(n, tuning) for n in parts], truth))


def _score(decided: list[Predictions], truth: NDArray[np.float64]) -> float:
    """Mean percent within 25, 200, 750 and 2500 km."""
    answers = np.concatenate([part.lat_lon for part in decided])
    km = haversine_km(*truth.T, *answers.T)
    return 100.0 * float(np.mean([np.mean(km <= radius) for radius in RADII_KM[1:]]))
