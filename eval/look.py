"""What a place should look like (RANGE) as a verifier, alone and beside the alignment.

Validation photos that the tuning did not see (seed 1) are decided with and without the look's score, over the pool with
and without places found by GPS embedding. "candidates only" scores a retrieved place by its own photo instead, and so
estimates the look of generated ones alone; it gets the scale that does best on these very photos, in hindsight. No test
photo is looked at. About five minutes on 2 cores; the index is the demo's.

    python eval/look.py --index runs/demo/index --json eval/results/look.json
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rag_geotoken.decision import strategies
from rag_geotoken.decision.pool import without
from rag_geotoken.decision.strategies import Given
from rag_geotoken.encoders.dense import affine
from rag_geotoken.evaluation.metrics import accuracy, bootstrap
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.photos.sources import read_source
from rag_geotoken.run.walk import answered, embedded
from rag_geotoken.storage.files import write_json
from rag_geotoken.storage.parquet import versions
from rag_geotoken.storage.recipes import training_recipe
from rag_geotoken.types import GPS, NEIGHBOR, RADII_KM, Photos, Pool
from rag_geotoken.verifiers import load_verifier
from rag_geotoken.verifiers.range_plus import RangeBank

SOURCE = "blue-marble:validation,n=3000,seed=1"
VERIFIERS: list[tuple[str, ...]] = [(), ("look",), ("alignment",), ("alignment", "look")]
COMPARED = [  # the first minus the second
    ("pool+look", "pool"),
    ("pool+gps+look", "pool+gps"),
    ("pool+gps+look", "pool+gps+alignment"),
    ("pool+gps+alignment+look", "pool+gps+alignment"),
    ("pool+gps+look", "pool+gps+look, candidates only"),
]
BANK, PLACES, DIM = 24_000, 20_000, 256  # of the measurement of speed
Scores = dict[str, NDArray[np.float32]]


def main() -> None:
    """Measure both, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=Path("runs/demo/index"), help="built with the embedded models")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    result = {
        "command": "python eval/look.py --json eval/results/look.json",
        "photos": SOURCE,
        "speed": speed(),
        **compare(Models.from_pretrained(given.index)),
        "versions": versions(),
    }
    for name, figures in [*result["variants"].items(), *result["differences"].items()]:
        print(f"{name:45}", *figures.values())
    print(result["speed"], result["verify_seconds"])
    if given.json:
        write_json(given.json, result)


def compare(models: Models) -> dict[str, Any]:
    """Share of the photos within each radius by variant, and intervals of the paired differences, percent."""
    photos, options, tuning = Photos.from_table(read_source(SOURCE)), Options(verify=("alignment",)), models.tuning
    grid = training_recipe(None)["tuning"]["grid"]["look"]
    parts: list[tuple[Pool, Scores]] = []
    spent, entries = 0.0, 0
    for start in range(0, len(photos), 256):
        tables = embedded(models, options, photos[start : start + 256])
        aligned = answered(models, options, tables, until="verdicts-alignment").scores
        pool, near = tables.pool, tables.neighbors
        begun = time.monotonic()
        look = load_verifier("look").scores(models, options, tables, pool).scores
        spent, entries = spent + time.monotonic() - begun, entries + int(pool.mask.sum())
        own = np.zeros_like(look)  # a pool begins with the neighbors
        images = models.index.vectors(near.rows)[:, :, 0]
        own[:, : options.neighbors] = np.einsum("bd,bkd->bk", tables.embeddings.image, images)
        own = np.where(pool.source == NEIGHBOR, own, look)
        parts.append((pool, {"alignment": aligned, "look": look, "own": own}))

    def away(gps: bool, verifiers: tuple[str, ...], look: str = "look", scale: float = tuning.look_scale) -> Any:
        found = []
        for pool, scores in parts:
            given = {name: scores[look if name == "look" else name] for name in verifiers}
            chosen = pool if gps else without(pool, GPS)
            found.append(strategies.decide(chosen, Given(given, replace(tuning, look_scale=scale))).lat_lon)
        return haversine_km(*photos.lat_lon.T, *np.concatenate(found).T)

    km = {"+".join([base, *v]): away("gps" in base, v) for base in ("pool", "pool+gps") for v in VERIFIERS}
    by_scale = {scale: away(True, ("look",), "own", scale) for scale in grid["look_scale"]}
    best = max(by_scale, key=lambda scale: float(np.mean(list(accuracy(by_scale[scale]).values()))))
    km["pool+gps+look, candidates only"] = by_scale[best]
    drawn, names = bootstrap(np.stack(list(km.values())), seed=0), list(km)
    return {
        "look": {name: getattr(tuning, name) for name in grid} | {"candidates_only_scale": best},
        "entries": entries,
        "verify_seconds": round(spent, 1),
        "variants": {name: {r: round(v, 2) for r, v in accuracy(values).items()} for name, values in km.items()},
        "ci95": {name: _pairs(drawn.accuracy[i]) for i, name in enumerate(names)},
        "differences": {f"{a} - {b}": _pairs(drawn.difference[names.index(a), names.index(b)]) for a, b in COMPARED},
    }


def speed() -> dict[str, Any]:
    """Seconds of ``RangeBank.of``, the best of three, and what its products of matrices alone would take."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2 * BANK + PLACES, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lat_lon = np.column_stack([rng.uniform(-80, 80, BANK + PLACES), rng.uniform(-180, 180, BANK + PLACES)])
    look = RangeBank(lat_lon[:BANK], vectors[:BANK], vectors[BANK : 2 * BANK])
    seconds = min(_seconds(lambda: look.of(lat_lon[BANK:], vectors[2 * BANK :])) for _ in range(3))
    few, keys, zeros = (torch.from_numpy(x) for x in (vectors[:2048], look.place, np.zeros(BANK, np.float32)))
    with torch.inference_mode():
        rate = 2 * len(few) * BANK * DIM / min(_seconds(lambda: affine(few, keys, zeros)) for _ in range(10))
    flop = 4 * PLACES * BANK * DIM
    return {
        "places": PLACES,
        "bank": BANK,
        "dim": DIM,
        "seconds": round(seconds, 2),
        "gflop": round(flop / 1e9),
        "gflop_a_second_of_a_product": round(rate / 1e9),
        "floor_seconds": round(flop / rate, 2),
    }


def _seconds(work: Any) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def _pairs(bounds: NDArray[np.float64]) -> dict[str, list[float]]:
    return {str(r): [round(float(b), 2) for b in pair] for r, pair in zip(RADII_KM, bounds, strict=True)}


if __name__ == "__main__":
    main()
