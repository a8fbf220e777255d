"""An ablation crosses options of the road; variants share tables and are compared on all photos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision.pool import chosen_pool
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.evaluation.metrics import abstention, bootstrap, calibration, summary
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
from rag_geotoken.types import RADII_KM, Answers, MllmVerdict

Log = Callable[[str], object]
VERSION = 1  # of what metrics.json says
MENDED_KM = 200  # a photo is mended where its answer comes within so many km, broken where it leaves them
SHOWN = 8  # photos in the report


Made = dict[str, dict[str, str]]  # variant -> stage -> table


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
    """Run a recipe into ``out``: metrics.json (returned), report.html, and predictions.parquet of the best variant.

    Run again, only what is missing is done. photos: a source on which every variant is run, and index: one in the place
    of the recipe's own. mllm: opens the multimodal model, where a variant asks one. Raises GeoError for a recipe that
    does not fit or a model that does not answer, before any work.
    """
    plan = read_variants(recipe, photos)
    check_writable(out)
    asks = any(variant.options.asks_mllm for variant in plan.variants)
    if asks and mllm is None:
        raise GeoError("the recipe asks a multimodal model: give --mllm, or leave such variants out")
    session = mllm() if asks and mllm else None
    if index is None and plan.gallery is None:
        raise GeoError("the recipe names no gallery: give --index DIR")
    if index is None and plan.gallery:
        make_index(out / "index", plan.gallery, GeoAlignment.from_pretrained(weights or EARTH, backbone))
    models = Models.from_pretrained(index or out / "index", weights or EARTH, backbone, matcher, session)
    runs = dict[str, tuple[RunFolder, Made]]()
    for split, source in plan.photos.items():
        write_photos(out / split, source)
        run = RunFolder(out / split, models)
        mine = [variant for variant in plan.variants if not variant.splits or split in variant.splits]
        runs[split] = run, walk_variants(run, mine)
    if reused := [f"{run.folder.name}/{name}" for run, _ in runs.values() for name in run.reused]:
        log(f"{len(reused)} tables reused, as an earlier run left them")
    identity = _identity(plan, runs, models)
    if (out / "metrics.json").is_file() and (out / "report.html").is_file():
        done: dict[str, Any] = read_json(out / "metrics.json")
        if done.get("identity") == identity:
            return done
    results = [row for split, (run, made) in runs.items() for row in _rows(plan, split, run, made)]
    stages = _seconds(runs, None if index else out / "index" / "stages")
    return _conclude(plan, out, runs, results, models, {"stages": stages, "identity": identity})


def _identity(plan: Recipe, runs: Mapping[str, tuple[RunFolder, Made]], models: Models) -> str:
    """What metrics and report follow from."""
    facts: list[object] = [VERSION, plan.model_dump(), models.mllm and models.mllm.model, models.identity("encoder")]
    for run, made in runs.values():
        names = [files["predictions"] for files in made.values()]
        facts += [read_json(run.folder / f"{name}.json")["parquet_sha256"] for name in names]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def walk_variants(run: RunFolder, variants: list[Variant]) -> Made:
    """Walk the road in a run's folder, once for every set of options that differ before the decision."""
    groups, made = dict[str, list[Variant]](), Made()
    for variant in variants:
        groups.setdefault(_road_key(variant.options), []).append(variant)
    for group in groups.values():
        shared = _shared(group)
        made |= {variant.name: run.walk(variant.options, shared, variant.name) for variant in group}
    return {variant.name: made[variant.name] for variant in variants}


def _road_key(options: Options) -> str:
    """What the stages before the decision follow from, but for what is put into the pool."""
    own = {*DECIDING, *ASKING}
    parts = [(f.name, getattr(options, f.name)) for f in fields(options) if f.name not in own]
    return repr((parts, options.visual, options.diverse))


def _shared(group: list[Variant]) -> Options:
    """The options of the stages that a group's variants share: all that any of them needs."""
    verify = {name for variant in group for name in variant.options.verify} - {"mllm"}
    verify |= {"visual"} if group[0].options.visual else set()
    options = [variant.options for variant in group]
    own = {name: getattr(Options, name) for name in {*DECIDING, *ASKING} - {"verify", "area", "mllm_mode"}}
    mode = "diversify" if options[0].diverse else "pool"
    area = any(each.frontier for each in options)
    return replace(options[0], verify=tuple(sorted(verify)), mllm_mode=mode, area=area, **own)


@dataclass
class Result:
    """This is a variant on a split: its row of ``metrics.json``, distances (N,), NaN without an answer, and photos."""

    row: dict[str, Any]
    km: Floats
    changed: dict[str, list[int]] = field(default_factory=dict)


def _rows(plan: Recipe, split: str, run: RunFolder, made: Made) -> list[Result]:
    """Every variant on a split: accuracy with intervals, the gain over the same without verification, and cost."""
    variants = {variant.name: variant for variant in plan.variants}
    km = {name: _distances(run, files["predictions"]) for name, files in made.items()}
    best = {name: oracle(run, variants[name].options, files) for name, files in made.items()}
    first = run.tables(variants[next(iter(made))].options, next(iter(made.values())))
    near = _nearest_of(run, first.neighbors.lat_lon, np.ones(first.neighbors.rows.shape, bool))
    shown = km | {f"oracle-{first.neighbors.rows.shape[1]}": near}
    drawn = bootstrap(np.stack(list(shown.values())), plan.seed)
    order, results = list(shown), []
    for i, (name, away) in enumerate(shown.items()):
        result = Result({"name": name, "split": split} | summary(away, drawn.accuracy[i]), away)
        results.append(result)
        if name not in made:
            continue
        result.row["oracle"] = {str(r): round(100 * float((best[name] <= r).mean()), 4) for r in RADII_KM}
        if not variants[name].options.verify:
            continue
        result.row["cost"] = _cost(run, variants[name].options, made[name])
        base = next((n for n in made if variants[n].options == variants[name].unverified), None)
        if base is not None:
            _add_gain(result, km[base], best[name], drawn.difference[i, order.index(base)])
    return results


def _add_gain(result: Result, before: Floats, best: Floats, bounds: Floats) -> None:
    """How much more photos are right than without verification, its interval, and which photos it mended or broke."""
    row, right, was = result.row, result.km <= MENDED_KM, before <= MENDED_KM
    row["gain"] = {str(r): round(100 * float((result.km <= r).mean() - (before <= r).mean()), 4) for r in RADII_KM}
    row["gain_ci95"] = {str(r): [round(float(b), 4) for b in pair] for r, pair in zip(RADII_KM, bounds, strict=True)}
    gap = float((best <= MENDED_KM).mean() - was.mean())
    row["gap_closed"] = round(row["gain"][str(MENDED_KM)] / 100 / gap, 4) if gap > 0 else None
    result.changed = {"mended": np.flatnonzero(right & ~was).tolist(), "broken": np.flatnonzero(~right & was).tolist()}
    row |= {name: len(photos) for name, photos in result.changed.items()}


def _distances(run: RunFolder, name: str) -> Floats:
    found: Answers = run.result(name, Answers)
    truth, answers = found.true_lat_lon, found.lat_lon
    return haversine_km(truth[:, 0], truth[:, 1], answers[:, 0], answers[:, 1])


def oracle(run: RunFolder, options: Options, files: dict[str, str]) -> Floats:
    """Return the distance (N,) of the best place of each photo's pool, NaN where unreadable; this is no method."""
    pool = chosen_pool(options, run.tables(options, files).pool)
    return _nearest_of(run, pool.lat_lon, pool.mask)


def _nearest_of(run: RunFolder, lat_lon: Floats, mask: NDArray[np.bool_]) -> Floats:
    truth, km = run.photos.lat_lon, np.full(len(run.photos), np.nan)
    good = run.readable
    away = haversine_km(truth[good, :1], truth[good, 1:], lat_lon[..., 0], lat_lon[..., 1])
    km[good] = np.where(mask, away, np.inf).min(axis=1)
    return km


def _cost(run: RunFolder, options: Options, files: dict[str, str]) -> dict[str, float]:
    """What a variant's verification takes a photo: seconds, and of a multimodal model requests and tokens."""
    count, cost = len(run.photos), dict[str, float]()
    tables = [file for stage, file in files.items() if stage.split("-")[0] == "verdicts" and _needs(stage, options)]
    tables += [files["matches"]] if options.visual else []
    for stage, file in files.items():
        if stage.startswith("verdicts-mllm"):
            found: MllmVerdict = run.result(file, MllmVerdict)
            cost |= {name: round(float(getattr(found, name).sum()) / count, 3) for name in MllmVerdict.COSTS}
            cost["failed"] = int((~found.answered).sum())
    return {"seconds": round(sum(run.seconds.get(file, 0.0) for file in tables) / count, 5), **cost}


def _needs(stage: str, options: Options) -> bool:
    return stage.split("-")[1] in (*options.verify, *("mllm",) * options.diverse)


def _conclude(
    plan: Recipe,
    out: Path,
    runs: Mapping[str, tuple[RunFolder, Made]],
    results: list[Result],
    models: Models,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write metrics.json, with the facts, predictions.parquet and report.html of all variants -> the first."""
    split, (run, made) = next(iter(runs.items()))
    here = {result.row["name"]: result for result in results if result.row["split"] == split}
    total = {name: sum(here[name].row["acc"].values()) for name in made}
    best = plan.best if plan.best in made else max(total, key=lambda name: total[name])
    shown, file = here[best], made[best]["predictions"]
    answers: Answers = run.result(file, Answers)
    write_table(out / "predictions.parquet", read_table(run.folder / f"{file}.parquet"))
    metrics = {
        "variants": [result.row for result in results],
        "best": best,
        "photos": plan.photos,
        "seed": plan.seed,
        "model": models.mllm.model if models.mllm else None,
        "versions": versions() | {"weights": models.alignment.identity},
        "seconds": round(sum(facts["stages"].values()), 1),
        "calibration": calibration(answers.confidence, shown.km),
        **facts,
    }
    if np.isfinite(answers.area_km2).any():
        metrics["abstention"] = abstention(answers.area_km2, shown.km)
    write_json(out / "metrics.json", metrics)
    _report(plan, out, metrics, run, made[best], shown, models)
    return metrics


def _seconds(runs: Mapping[str, tuple[RunFolder, Made]], index: Path | None) -> dict[str, float]:
    """What making each table took, whenever it was made, those of an index too; all decisions of a split in one."""
    seconds = dict[str, float]()
    for manifest in sorted(index.glob("[a-z]*.json")) if index else []:
        if manifest.stem != "left_out":  # a table that an older version left says no seconds
            seconds[f"index: {manifest.stem}"] = read_json(manifest).get("seconds", 0.0)
    for split, (run, _) in runs.items():
        decisions = 0.0
        for name, spent in run.seconds.items():
            if name.startswith("predictions-"):
                decisions += spent
            else:
                seconds[f"{split}: {name}"] = spent
        seconds[f"{split}: decisions"] = round(decisions, 2)
    return seconds


def _report(
    plan: Recipe,
    out: Path,
    metrics: dict[str, Any],
    run: RunFolder,
    files: dict[str, str],
    shown: Result,
    models: Models,
) -> None:
    """The page: every variant, and photos across the range of errors, or those that verification mended and broke."""
    from rag_geotoken.evaluation.report import example_of, write_report

    answered = np.flatnonzero(np.isfinite(shown.km))
    if plan.examples == "mended":
        chosen = [(row, kind) for kind in ("mended", "broken") for row in shown.changed.get(kind, [])[: SHOWN // 2]]
    else:
        order = answered[np.argsort(shown.km[answered], kind="stable")]
        rows = order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).astype(int)]
        chosen = [(row, shown.row["split"]) for row in rows.tolist()]
    options = next(variant.options for variant in plan.variants if variant.name == metrics["best"])
    tables = run.tables(options, files)
    tables.pool = chosen_pool(options, tables.pool)
    answers: Answers = run.result(files["predictions"], Answers)[run.readable]
    write_report(
        out / "report.html",
        metrics=metrics,
        errors=dict(zip(("lat", "lon"), run.photos.lat_lon.T, strict=True)) | {"km": shown.km, "name": metrics["best"]},
        examples=[
            example_of(tables, answers, models.index, int(np.searchsorted(run.readable, row))) | {"split": kind}
            for row, kind in chosen
        ],
        about=plan.about,
        notes=plan.notes,
    )
