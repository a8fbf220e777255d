"""These functions run an ablation: options are crossed, tables are shared and all variants compared on the same photos.

A recipe names splits of photos and variants. ``Made`` says for every variant which table each of its stages has.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rag_geotoken.decision.pool import chosen_pool
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.evaluation.metrics import (
    abstention,
    bootstrap,
    calibration,
    changed,
    gain,
    summary,
)
from rag_geotoken.geo.sphere import Floats, haversine_km
from rag_geotoken.mllm.session import MllmSession
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.run.build_index import make_index
from rag_geotoken.run.road import ASKING, DECIDING
from rag_geotoken.run.variants import Recipe, Variant, read_variants
from rag_geotoken.run.walk import RunFolder, write_photos
from rag_geotoken.storage.files import check_writable, read_json, write_json
from rag_geotoken.storage.parquet import read_table, versions, write_table
from rag_geotoken.storage.weights import EARTH
from rag_geotoken.types import RADII_KM, Answers, MllmVerdict, Neighbors

Log = Callable[[str], object]
Made = dict[str, dict[str, str]]
Runs = list[tuple[RunFolder, Made]]  # one for each split, whose name is the folder's

VERSION = 1  # of the contents of metrics.json
SHOWN = 8  # photos in the report
# The options that only the decision depends on, at their defaults: variants that differ in these alone share tables.
DECISION = {name: getattr(Options, name) for name in (*DECIDING, *ASKING)}


def ablate(
    recipe: Mapping[str, Any],
    out: Path,
    log: Log,
    *,
    photos: str | None = None,
    index: Path | None = None,
    weights: Path | None = None,
    backbone: str | None = None,
    matcher: str | None = None,
    mllm: Callable[[], MllmSession] | None = None,
) -> dict[str, Any]:
    """Run a recipe into the folder ``out`` and return what ``metrics.json`` holds.

    ``report.html`` shows it, ``predictions.parquet`` has the answers of the best variant. Run again, only what is
    missing is computed. photos, index: in the place of the recipe's own photos and of an index of its gallery. mllm:
    opens the multimodal model, called only if a variant needs it. Raises GeoError, before any work, for a recipe that
    does not fit or a model that does not answer.
    """
    plan = read_variants(recipe, photos)
    check_writable(out)
    session = None
    if any(variant.options.asks_mllm for variant in plan.variants):
        if mllm is None:
            raise GeoError("the recipe asks a multimodal model: give --mllm, or leave such variants out")
        session = mllm()
    if index is None:
        if plan.gallery is None:
            raise GeoError("the recipe names no gallery: give --index DIR")
        make_index(out / "index", plan.gallery, GeoAlignment.from_pretrained(weights or EARTH, backbone))
    folder = index or out / "index"
    models = Models.from_pretrained(folder, weights or EARTH, backbone, matcher=matcher, mllm=session)
    runs = Runs()
    for split, source in plan.photos.items():
        write_photos(out / split, source)
        run = RunFolder(out / split, models)
        runs.append((run, walk_variants(run, [v for v in plan.variants if not v.splits or split in v.splits])))
    if reused := sum(len(run.reused) for run, _ in runs):
        log(f"{reused} tables reused, as an earlier run left them")
    identity = _identity(plan, runs, models)
    if (out / "metrics.json").is_file() and (out / "report.html").is_file():
        metrics: dict[str, Any] = read_json(out / "metrics.json")
        if metrics.get("identity") == identity:
            return metrics
    seconds = _seconds(runs, None if index else out / "index" / "stages")
    return _write_results(plan, out, runs, models, {"stages": seconds, "identity": identity})


def walk_variants(run: RunFolder, variants: list[Variant]) -> Made:
    """Walk the road in a run's folder for all variants, which share the stages before the decision where they can."""
    groups, made = defaultdict[tuple[Options, bool, bool], list[Variant]](list), Made()
    for variant in variants:
        options = variant.options
        own = DECISION | ({"picture_size": options.picture_size} if options.diverse else {})  # asked before the pool
        groups[replace(options, **own), options.visual, options.diverse].append(variant)
    for (common, visual, diverse), group in groups.items():
        verify = {name for variant in group for name in variant.options.verify if name != "mllm"}
        verify |= {"visual"} if visual else set()
        mode, area = "diversify" if diverse else "pool", any(variant.options.frontier for variant in group)
        shared = replace(common, verify=tuple(sorted(verify)), mllm_mode=mode, area=area)
        made |= {variant.name: run.walk(variant.options, shared, variant.name) for variant in group}
    return {variant.name: made[variant.name] for variant in variants}


def oracle(run: RunFolder, options: Options, files: dict[str, str]) -> Floats:
    """Return the distance (N,) of the best place that may be each photo's answer, NaN for unreadable ones: a bound."""
    pool = chosen_pool(options, run.tables(options, files).pool)
    return _nearest_km(run, pool.lat_lon, pool.mask)


def _nearest_km(run: RunFolder, lat_lon: Floats, mask: ArrayLike = True) -> Floats:
    """Return the distance (N,) of the nearest of places (B, C, 2) of the readable photos, NaN for unreadable ones."""
    truth, km = run.photos.lat_lon[run.readable], np.full(len(run.photos), np.nan)
    away = haversine_km(truth[:, :1], truth[:, 1:], lat_lon[..., 0], lat_lon[..., 1])
    km[run.readable] = np.where(mask, away, np.inf).min(axis=1)
    return km


def _identity(plan: Recipe, runs: Runs, models: Models) -> str:
    """Return a SHA-256 of all that metrics and report depend on."""
    facts: list[object] = [VERSION, plan.model_dump(), models.mllm and models.mllm.model, models.identity("encoder")]
    for run, made in runs:
        names = [files["predictions"] for files in made.values()]
        facts += [read_json(run.folder / f"{name}.json")["parquet_sha256"] for name in names]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass
class Result:
    """This class holds a variant's row of ``metrics.json`` and its distances (N,) on a split, NaN without an answer.

    changed: the positions of photos that verification mended or broke.
    """

    row: dict[str, Any]
    km: Floats
    changed: dict[str, list[int]] = field(default_factory=dict)


def _results(plan: Recipe, run: RunFolder, made: Made) -> dict[str, Result]:
    """Return every variant's result on a split, and the best neighbor's, by name."""
    variants, km = {variant.name: variant for variant in plan.variants}, {}
    for name, files in made.items():
        answers: Answers = run.result(files["predictions"], Answers)
        km[name] = haversine_km(*answers.true_lat_lon.T, *answers.lat_lon.T)
    neighbors: Neighbors = run.result(next(iter(made.values()))["neighbors"], Neighbors)
    km[f"oracle-{neighbors.rows.shape[1]}"] = _nearest_km(run, neighbors.lat_lon)
    order, drawn = list(km), bootstrap(np.stack(list(km.values())), plan.seed)
    results = dict[str, Result]()
    for i, name in enumerate(order):
        row = {"name": name, "split": run.folder.name} | summary(km[name], drawn.accuracy[i])
        results[name] = Result(row, km[name])
        if name not in made:
            continue
        options = variants[name].options
        best = oracle(run, options, made[name])
        row["oracle"] = {str(r): round(100 * float((best <= r).mean()), 4) for r in RADII_KM}
        if not options.verify:
            continue
        row["cost"] = _cost(run, options, made[name])
        base = next((plain for plain in made if variants[plain].options == variants[name].unverified), None)
        if base is not None:
            bounds = drawn.difference[i, order.index(base)]
            row |= gain(km[name], km[base], best, bounds)
            results[name].changed = changed(km[name], km[base])
    return results


def _cost(run: RunFolder, options: Options, files: dict[str, str]) -> dict[str, float]:
    """Return what verification takes a photo: seconds, and a multimodal model's requests and tokens."""
    photos, seconds, mllm = len(run.photos), 0.0, dict[str, float]()
    for stage, file in files.items():
        kind, verifier, *_ = [*stage.split("-"), ""]
        if kind == "verdicts" and verifier == "mllm":
            verdict: MllmVerdict = run.result(file, MllmVerdict)
            mllm = {name: round(float(getattr(verdict, name).sum()) / photos, 3) for name in MllmVerdict.COSTS}
            mllm["failed"] = int((~verdict.answered).sum())
        if (kind == "verdicts" and verifier in (*options.verify, "mllm")) or (kind == "matches" and options.visual):
            seconds += run.seconds.get(file, 0.0)
    return {"seconds": round(seconds / photos, 5), **mllm}


def _seconds(runs: Runs, index: Path | None) -> dict[str, float]:
    """Return what making each table took, an index's tables too; all decisions of a split count as one."""
    seconds = dict[str, float]()
    for manifest in sorted(index.glob("[a-z]*.json")) if index else []:
        if manifest.stem != "left_out":  # a table that an older version left says no seconds
            seconds[f"index: {manifest.stem}"] = read_json(manifest).get("seconds", 0.0)
    for run, _ in runs:
        decisions = [name for name in run.seconds if name.startswith("predictions-")]
        tables = {name: spent for name, spent in run.seconds.items() if name not in decisions}
        tables["decisions"] = round(sum(run.seconds[name] for name in decisions), 2)
        seconds |= {f"{run.folder.name}: {name}": spent for name, spent in tables.items()}
    return seconds


def _write_results(plan: Recipe, out: Path, runs: Runs, models: Models, facts: dict[str, Any]) -> dict[str, Any]:
    """Write metrics.json, with the facts given, predictions.parquet and report.html, and return the first."""
    from rag_geotoken.evaluation.report import example_of, write_report

    results = [_results(plan, run, made) for run, made in runs]
    (run, made), first = runs[0], results[0]
    total = {name: sum(first[name].row["acc"].values()) for name in made}
    best = plan.best if plan.best in made else max(total, key=total.__getitem__)
    result, file = first[best], made[best]["predictions"]
    answers: Answers = run.result(file, Answers)
    write_table(out / "predictions.parquet", read_table(run.folder / f"{file}.parquet"))
    metrics = {
        "variants": [result.row for by_name in results for result in by_name.values()],
        "best": best,
        "photos": plan.photos,
        "seed": plan.seed,
        "model": models.mllm.model if models.mllm else None,
        "versions": versions() | {"weights": models.alignment.identity},
        "seconds": round(sum(facts["stages"].values()), 1),
        "calibration": calibration(answers.confidence, result.km),
        **facts,
    }
    if np.isfinite(answers.area_km2).any():
        metrics["abstention"] = abstention(answers.area_km2, result.km)
    write_json(out / "metrics.json", metrics)
    options = next(variant.options for variant in plan.variants if variant.name == best)
    tables, (lat, lon) = run.tables(options, made[best]), run.photos.lat_lon.T
    tables.pool = chosen_pool(options, tables.pool)
    examples = []
    for photo, label in _chosen_photos(plan, result):
        at = int(np.searchsorted(run.readable, photo))
        examples.append(example_of(tables, answers[run.readable], models.index, at) | {"split": label})
    errors, page = {"lat": lat, "lon": lon, "km": result.km, "name": best}, out / "report.html"
    write_report(page, metrics=metrics, errors=errors, examples=examples, about=plan.about, notes=plan.notes)
    return metrics


def _chosen_photos(plan: Recipe, result: Result) -> list[tuple[int, str]]:
    """Return photos and labels for the report: mended and broken ones, or some across the range of errors."""
    if plan.examples == "mended":
        return [(photo, kind) for kind, photos in result.changed.items() for photo in photos[: SHOWN // 2]]
    order = np.argsort(result.km, kind="stable")[: np.isfinite(result.km).sum()]  # NaN comes last
    ranks = np.linspace(0, len(order) - 1, min(SHOWN, len(order))).astype(int)
    return [(photo, result.row["split"]) for photo in order[ranks].tolist()]
