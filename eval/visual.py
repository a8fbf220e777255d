"""Comparing pictures: a photo registered with its neighbors' pictures, as a verifier, alone and beside the alignment.

Validation photos that the tuning did not see (seed 1). "visual-best" is the place to which the most alike neighbor
moves the photo, "visual-consensus" the one on which the neighbors agree, "beyond ... km" the same where the gallery
has no photo nearer; the others decide over the whole pool. The views of photos and gallery are cut from one picture of
the Earth, so light and season are the same: with photos of another day fewer will match. No test photo is looked at.
About ten minutes on 2 cores; the index is the demo's.

    python eval/visual.py --index runs/demo/index --json eval/results/visual.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rag_geotoken.decision import strategies
from rag_geotoken.decision.pool import scored_pool, without
from rag_geotoken.decision.strategies import Given
from rag_geotoken.encoders.dense import affine
from rag_geotoken.evaluation.metrics import accuracy, bootstrap
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.photos.agreement import moved_places
from rag_geotoken.photos.matching import AerialMatcher
from rag_geotoken.photos.registration import (
    CHUNK,
    KEPT,
    RADIUS,
    REACH,
    SCALES,
    SIDE,
    STEPS,
    TURNS,
    Registration,
    register,
)
from rag_geotoken.photos.sources import read_source
from rag_geotoken.run.walk import answered, embedded
from rag_geotoken.storage.files import write_json
from rag_geotoken.storage.parquet import versions
from rag_geotoken.storage.recipes import training_recipe
from rag_geotoken.types import RADII_KM, VISUAL, Photos, Places, Pool, Predictions
from rag_geotoken.verifiers.visual import support

SOURCE = "blue-marble:validation,n=3000,seed=1"
VERIFIERS: list[tuple[str, ...]] = [(), ("alignment",), ("visual",), ("alignment", "visual")]
COMPARED = [  # the first minus the second
    ("pool+gps+visual", "pool+gps"),
    ("pool+gps+visual", "pool+gps+alignment"),
    ("pool+gps+alignment+visual", "pool+gps+alignment"),
    ("pool+gps+alignment+visual", "pool+gps+visual"),
    ("pool+gps+alignment+visual", "visual-consensus"),
]
SPARSER_KM, RIGHT_KM = (50, 100, 150), 5.0
TIMED = 256  # photos
Scores = dict[str, NDArray[np.float32]]
Pixels = NDArray[np.uint8]


class Measuring(AerialMatcher):
    """The matcher of the road, which keeps how it found pictures to lie, and the first ``TIMED`` photos' pictures."""

    def __init__(self, width_km: float) -> None:
        super().__init__(width_km)
        self.found: list[Registration] = []
        self.pictures: list[tuple[Pixels, Pixels]] = []

    def match(self, pixels: Pixels, near: Pixels, places: NDArray[np.float64]) -> Places:
        """As the road does it."""
        self.found.append(register(pixels, near))
        if sum(len(shown) for shown, _ in self.pictures) < TIMED:
            self.pictures.append((pixels, near))
        return _matches(self.found[-1], places, self.width_km)


def main() -> None:
    """Measure all, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=Path("runs/demo/index"), help="built with the embedded models")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    result = {
        "command": "python eval/visual.py --json eval/results/visual.json",
        "photos": SOURCE,
        **compare(Models.from_pretrained(given.index)),
        "versions": versions(),
    }
    for name, figures in [*result["variants"].items(), *result["differences"].items()]:
        print(f"{name:60}", *figures.values())
    print(*(f"{name} {result[name]}" for name in ("speed", "matches", "calibration")), sep="\n")
    if given.json:
        write_json(given.json, result)


def compare(models: Models) -> dict[str, Any]:
    """Share of the photos within each radius by variant, and intervals of the paired differences, percent."""
    photos, grid = Photos.from_table(read_source(SOURCE)), training_recipe(None)["tuning"]["grid"]
    options, tuning, truth = Options(verify=("alignment", "visual")), models.tuning, photos.lat_lon
    measuring = Measuring(tuning.view_km)
    models = models.replace(matcher=measuring)
    parts: list[tuple[Pool, Scores]] = []
    near: list[NDArray[np.float64]] = []
    moved: list[Places] = []
    for start in range(0, len(photos), TIMED):
        tables = embedded(models, options, photos[start : start + TIMED])
        answered(models, options, tables, until="verdicts-visual")
        parts.append((tables.pool, {name: found.scores for name, found in tables.verdicts.items()}))
        near.append(tables.neighbors.lat_lon)
        moved.append(tables.matches)
    found = measuring.found
    registration = Registration(*(torch.cat([vars(each)[name] for each in found]) for name in vars(found[0])))
    neighbors, matches = np.concatenate(near), Places.join(moved)
    away = haversine_km(truth[:, :1], truth[:, 1:], neighbors[..., 0], neighbors[..., 1])

    def decided(verifiers: tuple[str, ...]) -> Predictions:
        answers = []
        for pool, given in parts:
            chosen = pool if "visual" in verifiers else without(pool, VISUAL)
            answers.append(strategies.decide(chosen, Given({name: given[name] for name in verifiers}, tuning)))
        return Predictions.join(answers)

    def consensus(those: Places) -> NDArray[np.float64]:
        pool = scored_pool(those, tuning.match_scale, VISUAL)
        return strategies.decide(pool, Given({"visual": support(pool, those, tuning.visual_km)}, tuning)).lat_lon

    by_verifiers = {"+".join(["pool+gps", *names]): decided(names) for names in VERIFIERS}
    answers = {name: each.lat_lon for name, each in by_verifiers.items()}
    alike = Given({"visual": matches.scores}, tuning)
    moved_alone = scored_pool(matches, tuning.match_scale, VISUAL)
    answers["visual-best"] = strategies.highest(moved_alone, alike).lat_lon
    answers["visual-consensus"] = consensus(matches)
    for km in SPARSER_KM:
        fewer = replace(registration, alike=registration.alike.masked_fill(torch.from_numpy(away < km), 0.0))
        answers[f"visual-consensus, neighbors beyond {km} km"] = consensus(_matches(fewer, neighbors, tuning.view_km))
    distance = {name: haversine_km(*truth.T, *lat_lon.T) for name, lat_lon in answers.items()}
    drawn, names = bootstrap(np.stack(list(distance.values())), seed=0), list(distance)
    sure, right = by_verifiers["pool+gps+alignment+visual"].confidence, distance["pool+gps+alignment+visual"]
    pixels, others = (np.concatenate(part) for part in zip(*measuring.pictures, strict=True))
    return {
        "tuning": {name: getattr(tuning, name) for name in (*grid["visual"], *grid["visual_confidence"], "view_km")},
        "variants": {name: {r: round(v, 2) for r, v in accuracy(km).items()} for name, km in distance.items()},
        "median_km": {name: round(float(np.median(km)), 3) for name, km in distance.items()},
        "ci95": {name: _pairs(drawn.accuracy[i]) for i, name in enumerate(names)},
        "differences": {f"{a} - {b}": _pairs(drawn.difference[names.index(a), names.index(b)]) for a, b in COMPARED},
        "calibration": {
            str(r): {"stated": round(float(sure[:, i].mean()), 4), "true": round(float((right <= r).mean()), 4)}
            for i, r in enumerate(RADII_KM)
        },
        "matches": _quality(matches, away, truth),
        "speed": speed(pixels, others, neighbors[: len(pixels)]),
    }


def _matches(found: Registration, places: NDArray[np.float64], view_km: float) -> Places:
    return Places(moved_places(found, places, view_km), found.alike.numpy())


def _quality(matches: Places, away: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, Any]:
    """By how far the neighbor really is: the share of its matches that are right, and of those that are believed."""
    km = haversine_km(truth[:, :1], truth[:, 1:], matches.lat_lon[..., 0], matches.lat_lon[..., 1])
    right, believed, result = km <= RIGHT_KM, matches.scores > 0.5, {}
    for low, high in ((0, 50), (50, 100), (100, 150), (150, 200), (200, 20_040)):
        band = (away >= low) & (away < high)
        result[f"{low}-{high} km"] = {
            "pairs": int(band.sum()),
            f"within_{RIGHT_KM:g}_km": round(float(right[band].mean()), 4),
            "score_above_half": round(float(believed[band].mean()), 4),
            "of_these_right": round(float(right[band & believed].mean()), 4) if (band & believed).any() else None,
        }
    return result


def speed(pixels: Pixels, others: Pixels, places: NDArray[np.float64]) -> dict[str, Any]:
    """Milliseconds a photo, the best of three, beside what its arithmetic and its transforms alone would take."""
    found = register(pixels, others)
    registering = min(_seconds(lambda: register(pixels, others)) for _ in range(3))
    agreeing = min(_seconds(lambda: moved_places(found, places, 300.0)) for _ in range(3))
    k, ways, plane = others.shape[1], len(TURNS) * len(SCALES), SIDE // 2 + REACH + RADIUS - (SIDE // 2 - 1) // 2
    transform = 2.5 * plane**2 * np.log2(plane**2)  # of a real picture
    search = ways * (transform + 3 * 8 * plane * (plane // 2 + 1) + 12 * (2 * REACH + 1) ** 2)
    # A step takes about 140 operations a pixel: the sampling and the sums over 3 colors, and 4 parameters' products.
    refine = 140 * (KEPT * (STEPS[0] + 1) * (SIDE // 2) ** 2 + (STEPS[1] + 1) * SIDE**2)
    rows, side = torch.rand(2048, 768), torch.rand(2048, 768)
    with torch.inference_mode():
        rate = 2 * 2048 * 2048 * 768 / min(_seconds(lambda: affine(rows, side, torch.zeros(2048))) for _ in range(10))
        spectrum = torch.randn(CHUNK, k, ways, plane, plane // 2 + 1, dtype=torch.complex64)
        inverse = min(_seconds(lambda: torch.fft.irfft2(spectrum, s=(plane, plane))) for _ in range(10)) / CHUNK
    count = len(pixels)
    return {
        "photos": count,
        "neighbors": k,
        "register_ms": round(1e3 * registering / count, 2),
        "agree_ms": round(1e3 * agreeing / count, 2),
        "mflop": round(k * (search + refine) / 1e6),
        "gflop_a_second_of_a_product": round(rate / 1e9),
        "floor_ms_by_arithmetic": round(1e3 * k * (search + refine) / rate, 2),
        "floor_ms_of_the_inverse_transforms": round(1e3 * inverse, 2),
    }


def _seconds(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def _pairs(bounds: NDArray[np.float64]) -> dict[str, list[float]]:
    return {str(r): [round(float(b), 2) for b in pair] for r, pair in zip(RADII_KM, bounds, strict=True)}


if __name__ == "__main__":
    main()
