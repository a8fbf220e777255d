"""The main job on the embedded Earth imagery: gallery, index, three splits, an ablation table and a report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.files import check_writable, write_json
from rag_geotoken.geo import haversine_km
from rag_geotoken.index import GeoIndex
from rag_geotoken.indexing import Plan, build_approximate, build_index
from rag_geotoken.metrics import RADII_KM, abstention, bootstrap, calibration, summary
from rag_geotoken.mllm import open_client
from rag_geotoken.options import VERIFIERS, Options
from rag_geotoken.pictures import load_pictures
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.posterior import heat_map
from rag_geotoken.run import ablation, retrieval, stages
from rag_geotoken.run.mllm_stage import Asked, Asking
from rag_geotoken.run.tables import read_neighbors, read_pool, read_posterior, read_predictions
from rag_geotoken.tables import read_table, to_numpy, versions, write_table
from rag_geotoken.types import SOURCES
from rag_geotoken.weights import EARTH

if TYPE_CHECKING:
    from numpy.typing import NDArray

BEST = "pool+gps+visual+alignment"
NOTES = [
    "The photos are satellite views cut from NASA's Blue Marble picture (public domain): real, free and small. They "
    "are not street photos; the same road serves those with another encoder and gallery.",
    "unseen: points of 5 % of the level-5 S2 cells, in which neither gallery nor training has a point. relief: the "
    "same Earth from another picture (shaded relief) that the models have never seen.",
    "oracle-20 is no method: it picks the best of the 20 neighbours with the truth in hand.",
]


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add what happens inside to the seconds of a named part of the run."""
    begun = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - begun, 2)


def run_demo(
    out: Path,
    test_n: int = 2000,
    seed: int = 0,
    weights: Path = EARTH,
    gallery: int = 24_000,
    mllm: str | None = None,
) -> dict[str, Any]:
    """Run everything into ``out`` -> what ``metrics.json`` holds. What is already there is not done again.

    mllm: a multimodal model, as :func:`.open_client` takes it, that verifies the split ``test`` too.

    Writes predictions.parquet (of the best variant on ``test``), metrics.json and report.html, and under index/ and a
    folder a split every stage's table. Raises GeoError for a folder that cannot be written or broken weights.
    """
    begun = time.perf_counter()
    check_writable(out)
    seconds: dict[str, float] = {}
    alignment = GeoAlignment.from_pretrained(weights)
    with _timed(seconds, "gallery: read, encode, index"):
        make_index(out / "index", f"blue-marble:gallery,n={gallery}", alignment)
    geolocator = Geolocator.from_pretrained(out / "index", weights)
    asked = Asked(open_client(mllm), Asking(), resume=True) if mllm else None
    few = max(1, min(1000, test_n // 2))
    options = Options()
    variants: list[dict[str, Any]] = []
    sizes = {"test": test_n, "unseen": few, "relief": few}
    for split, n in sizes.items():
        with _timed(seconds, f"{split}: read"):
            retrieval.write_photos(out / split, f"blue-marble:{split},n={n},seed={seed}")
        with _timed(seconds, f"{split}: crop to prediction"):
            run_road(out / split, geolocator, options)
        if asked and split == "test":
            with _timed(seconds, f"{split}: multimodal model"):
                ablation.ask_all(out / split, geolocator, asked)
                ablation.decide_all(out / split, geolocator)
        variants += score(out / split, split, seed)
    write_table(out / "predictions.parquet", read_table(out / "test" / f"predictions-{BEST}.parquet"))
    truth, answers, confidence = read_predictions(out / "predictions.parquet")
    km = haversine_km(truth[:, 0], truth[:, 1], answers[:, 0], answers[:, 1])
    area = to_numpy(read_table(out / "predictions.parquet", ["area_km2"])["area_km2"])
    metrics = {
        "variants": variants,
        "seed": seed,
        "model": asked.client.model if asked else None,
        "versions": versions() | {"weights": alignment.identity},
        "seconds": round(time.perf_counter() - begun, 1),
        "stages": seconds,
        "calibration": calibration(confidence, km),
        "abstention": abstention(area, km),
    }
    _report(out, metrics, truth, km, geolocator.index)
    metrics["seconds"] = round(time.perf_counter() - begun, 1)
    write_json(out / "metrics.json", metrics)
    return metrics


def make_index(
    folder: Path, source: str, alignment: GeoAlignment, plan: Plan | None = None, thumbnails: int | None = None
) -> dict[str, Any]:
    """Read and encode a source and index it under ``folder`` -> the manifest. Its stage tables lie in stages/.

    Few photos are searched exactly, unless the plan says otherwise; of many, or with a factory, only the projections
    are kept. thumbnails: keep the pictures in the index too, their longer side so many pixels.
    """
    check_writable(folder)
    tables, encoder, plan = folder / "stages", alignment.identity, plan or Plan()
    photos = retrieval.write_photos(tables, source)
    small = retrieval.thumbnails(tables, thumbnails) if thumbnails else None
    if plan.choose(len(read_table(photos, ["id"])), alignment.config.dim) == "Flat":
        return build_index(folder, photos, retrieval.encode(tables, alignment), encoder, small)
    projections = retrieval.encode(tables, alignment, projections=True)
    return build_approximate(folder, photos, projections, encoder, alignment.heads, plan, small)


def run_road(folder: Path, geolocator: Geolocator, options: Options) -> None:
    """The stages from a written photos table to the predictions of every variant of the ablation."""
    retrieval.encode(folder, geolocator.alignment)
    retrieval.search(folder, geolocator.index, options.neighbors, geolocator.tuning.search_weights)
    stages.propose(folder, geolocator, options)
    stages.places(folder, geolocator, options)
    stages.posterior(folder, geolocator, options)
    stages.matches(folder, geolocator)
    stages.pool(folder, geolocator, replace(options, verify=VERIFIERS))
    for verifier in VERIFIERS:
        stages.verify(folder, geolocator, verifier)
    ablation.decide_all(folder, geolocator)


def score(folder: Path, split: str, seed: int) -> list[dict[str, Any]]:
    """Distances of every variant's answers -> rows of ``metrics.json``, intervals by paired bootstrap."""
    km = {name: ablation.distances(folder, name) for name in ablation.variants_of(folder)} | {
        "oracle-20": ablation.oracle(folder, read_neighbors(folder).lat_lon)
    }
    intervals = bootstrap(np.stack(list(km.values())), seed).accuracy
    return [summary(name, split, away, interval=intervals[i]) for i, (name, away) in enumerate(km.items())]


def ablation_text(metrics: dict[str, Any]) -> str:
    """The ablation table of ``metrics.json`` as plain text."""
    radii = "".join(f"{f'<= {r} km':>12}" for r in RADII_KM)
    lines = [f"{'split':<8}{'variant':<23}{'n':>6}{radii}{'median km':>12}"]
    for row in metrics["variants"]:
        shares = "".join(f"{row['acc'][str(r)]:>11.2f}%" for r in RADII_KM)
        median = "-" if row["median_km"] is None else f"{row['median_km']:.1f}"
        lines.append(f"{row['split']:<8}{row['name']:<23}{row['n']:>6}{shares}{median:>12}")
    return "\n".join(lines)


def _report(
    out: Path, metrics: dict[str, Any], truth: NDArray[np.float64], km: NDArray[np.float64], index: GeoIndex
) -> None:
    from rag_geotoken.report import write_report

    # Photos across the range of errors, the same for the same run: the report must not show the good ones only.
    shown = np.argsort(km)[np.linspace(0, len(km) - 1, min(8, len(km))).astype(int)]
    write_report(
        out / "report.html",
        metrics=metrics,
        errors={"lat": truth[:, 0], "lon": truth[:, 1], "km": km, "name": BEST},
        examples=[example(out / "test", row, index, BEST, "test") for row in shown.tolist()],
        notes=NOTES,
    )


def example(folder: Path, row: int, index: GeoIndex, variant: str, split: str) -> dict[str, Any]:
    """One readable photo with its neighbours, candidates and a variant's answer, as the report wants it."""
    photo = read_table(folder / "photos.parquet").slice(row, 1).to_pylist()[0]
    answer = read_table(folder / f"predictions-{variant}.parquet").slice(row, 1).to_pylist()[0]
    truth = photo["lat"], photo["lon"]
    neighbors, entries = read_neighbors(folder), read_pool(folder)
    rows = neighbors.rows[row, :8]
    crops, _ = load_pictures([photo["image"], *index.rows["image"].take(rows).to_pylist()], 64)
    near = [
        {"crop": crop, "lat": lat, "lon": lon, "score": float(s), "km": float(haversine_km(*truth, lat, lon))}
        for crop, (lat, lon), s in zip(crops[1:], neighbors.lat_lon[row].tolist(), neighbors.scores[row], strict=False)
    ]
    kept, posterior = np.flatnonzero(entries.mask[row]), folder / "posterior.parquet"
    return {
        "id": photo["id"],
        "split": split,
        "crop": crops[0],
        "true": truth,
        "neighbours": near,
        "candidates": [
            {
                "lat": float(entries.lat_lon[row, c, 0]),
                "lon": float(entries.lat_lon[row, c, 1]),
                "source": SOURCES[entries.source[row, c]],
                "weight": float(np.exp(entries.log_weight[row, c])),
            }
            for c in kept
        ],
        **({"heat": heat_map(read_posterior(folder), row, height=360, detail=9)} if posterior.is_file() else {}),
        "area_km2": answer["area_km2"],
        "answer": (answer["lat"], answer["lon"]),
        "km": float(haversine_km(*truth, answer["lat"], answer["lon"])),
        "confidence": {r: answer[f"confidence_{r}"] for r in RADII_KM},
    }
