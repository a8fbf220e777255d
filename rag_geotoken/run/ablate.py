"""Ablations: options of the road crossed, every variant decided from tables that are shared, compared on all photos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.files import check_writable, read_json, write_json
from rag_geotoken.geo import Floats, haversine_km
from rag_geotoken.metrics import abstention, bootstrap, calibration, summary
from rag_geotoken.mllm.session import MllmSession
from rag_geotoken.options import Options
from rag_geotoken.pictures import load_pictures
from rag_geotoken.posterior import heat_map
from rag_geotoken.run.build_index import make_index
from rag_geotoken.run.models import Models
from rag_geotoken.run.road import ASKING, DECIDING
from rag_geotoken.run.stages import chosen_pool
from rag_geotoken.run.variants import Recipe, Variant, read_variants
from rag_geotoken.run.walk import RunFolder, write_photos
from rag_geotoken.tables import read_table, versions, write_table
from rag_geotoken.types import RADII_KM, SOURCES, Answers, MllmVerdict, Pool, Tables
from rag_geotoken.weights import EARTH

Log = Callable[[str], object]
VERSION = 1  # of what metrics.json says
MENDED_KM = 200  # a photo is mended where its answer comes within so many km, broken where it leaves them
SHOWN = 8  # photos in the report


@dataclass(frozen=True)
class Setup:
    """What a recipe runs with: photos or an index in the place of its own, weights, a multimodal model.

    photos: a source, on which every variant is run.
    """

    photos: str | None = None
    index: Path | None = None
    weights: Path | None = None
    backbone: str | None = None
    matcher: str | None = None
    mllm: str | None = None
    mllm_model: str | None = None
    mllm_concurrent: int | None = None
    resume: bool = False


def ablate(recipe: Mapping[str, Any], out: Path, setup: Setup, log: Log) -> dict[str, Any]:
    """Run a recipe into ``out`` -> what ``metrics.json`` holds; report.html shows it, predictions.parquet has the best.

    Run again, only what is missing is done. Raises GeoError for a recipe that does not fit or a model that does not
    answer, before any work.
    """
    plan = read_variants(recipe if setup.photos is None else _elsewhere(recipe, setup.photos))
    check_writable(out)
    asks = any(variant.options.asks_mllm for variant in plan.variants)
    session = None
    if asks:
        if setup.mllm is None:
            raise GeoError("the recipe asks a multimodal model: give --mllm, or leave such variants out")
        session = MllmSession.open(setup.mllm, setup.mllm_model, setup.mllm_concurrent, setup.resume)
    models = _open(plan, out, setup, session)
    runs = dict[str, tuple[RunFolder, Made]]()
    for split, source in plan.photos.items():
        write_photos(out / split, source)
        run = RunFolder(out / split, models)
        mine = [variant for variant in plan.variants if not variant.splits or split in variant.splits]
        runs[split] = run, walk_variants(run, mine)
    if reused := [f"{run.folder.name}/{name}" for run, _ in runs.values() for name in run.reused]:
        log(f"{len(reused)} tables reused, as an earlier run left them")
    facts: list[object] = [VERSION, plan, session and session.model, models.identity("encoder")]
    for run, made in runs.values():
        names = [files["predictions"] for files in made.values()]
        facts += [read_json(run.folder / f"{name}.json")["parquet_sha256"] for name in names]
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True, default=vars).encode()).hexdigest()
    metrics_file, report = out / "metrics.json", out / "report.html"
    if metrics_file.is_file() and report.is_file() and read_json(metrics_file).get("identity") == identity:
        done: dict[str, Any] = read_json(metrics_file)
        return done
    results = [row for split, (run, made) in runs.items() for row in _rows(plan, split, run, made)]
    return _conclude(plan, out, runs, results, models, identity, None if setup.index else out / "index" / "stages")


def _elsewhere(recipe: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A recipe with all of its variants run on one source."""
    blocks = [{key: value for key, value in block.items() if key != "photos"} for block in recipe["variants"]]
    return dict(recipe) | {"photos": {"photos": source}, "variants": blocks}


def _open(plan: Recipe, out: Path, setup: Setup, session: MllmSession | None) -> Models:
    """Index and models; the index is made of the recipe's gallery where none is given."""
    from rag_geotoken.alignment import GeoAlignment

    weights, folder = setup.weights or EARTH, setup.index or out / "index"
    if setup.index is None:
        if plan.gallery is None:
            raise GeoError("the recipe names no gallery: give --index DIR")
        make_index(folder, plan.gallery, GeoAlignment.from_pretrained(weights, setup.backbone))
    return Models.from_pretrained(folder, weights, setup.backbone, setup.matcher, session)


Made = dict[str, dict[str, str]]  # variant -> stage -> table


def walk_variants(run: RunFolder, variants: list[Variant]) -> Made:
    """The road in a run's folder, once for every set of options that differ before the decision."""
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
    """A variant on a split: its row of ``metrics.json``, distances (N,), NaN without an answer, and photos."""

    row: dict[str, Any]
    km: Floats
    changed: dict[str, list[int]] = field(default_factory=dict)


def _rows(plan: Recipe, split: str, run: RunFolder, made: Made) -> list[Result]:
    """Every variant on a split: accuracy with intervals, the gain over the same without verification, and cost."""
    variants = {variant.name: variant for variant in plan.variants}
    km = {name: _distances(run, files["predictions"]) for name, files in made.items()}
    best = {name: oracle(run, variants[name].options, files) for name, files in made.items()}
    first = run.tables(variants[next(iter(made))].options, next(iter(made.values())))
    near = _nearest_of(run, first.neighbours.lat_lon, np.ones(first.neighbours.rows.shape, bool))
    shown = km | {f"oracle-{first.neighbours.rows.shape[1]}": near}
    drawn = bootstrap(np.stack(list(shown.values())), plan.seed)
    order, results = list(shown), []
    for i, (name, away) in enumerate(shown.items()):
        result = Result(summary(name, split, away, interval=drawn.accuracy[i]), away)
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
    """Distance (N,) of the best place that may be each photo's answer, NaN for unreadable ones. Not a method."""
    pool = chosen_pool(run.models, options, run.tables(options, files))
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
    identity: str,
    index: Path | None,
) -> dict[str, Any]:
    """Write metrics.json, predictions.parquet and report.html of all variants -> the first.

    index: the stage tables of an index that was made here.
    """
    split, (run, made) = next(iter(runs.items()))
    here = [result for result in results if result.row["split"] == split and result.row["name"] in made]
    total = {result.row["name"]: sum(result.row["acc"].values()) for result in here}
    best = plan.best if plan.best in made else max(total, key=lambda name: total[name])
    shown = next(result for result in here if result.row["name"] == best)
    answers: Answers = run.result(made[best]["predictions"], Answers)
    write_table(out / "predictions.parquet", read_table(run.folder / f"{made[best]['predictions']}.parquet"))
    stages = _seconds(runs, index)
    metrics = {
        "variants": [result.row for result in results],
        "best": best,
        "photos": plan.photos,
        "seed": plan.seed,
        "model": models.mllm.model if models.mllm else None,
        "versions": versions() | {"weights": models.alignment.identity},
        "seconds": round(sum(stages.values()), 1),
        "stages": stages,
        "calibration": calibration(answers.confidence, shown.km),
        "identity": identity,
    }
    if np.isfinite(answers.area_km2).any():
        metrics["abstention"] = abstention(answers.area_km2, shown.km)
    write_json(out / "metrics.json", metrics)
    _report(plan, out, metrics, run, made[best], shown, models)
    return metrics


def _seconds(runs: Mapping[str, tuple[RunFolder, Made]], index: Path | None) -> dict[str, float]:
    """What making each table took, whenever it was made; all decisions of a split in one."""
    manifests = sorted(index.glob("[a-z]*.json")) if index else []
    # A table that an older version left says no seconds.
    seconds = {
        f"index: {path.stem}": read_json(path).get("seconds", 0.0) for path in manifests if path.stem != "left_out"
    }
    for split, (run, _) in runs.items():
        decisions = sum(spent for name, spent in run.seconds.items() if name.startswith("predictions-"))
        rest = {name: spent for name, spent in run.seconds.items() if not name.startswith("predictions-")}
        seconds |= {f"{split}: {name}": spent for name, spent in rest.items()}
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
    from rag_geotoken.report import write_report

    answers: Answers = run.result(files["predictions"], Answers)
    answered = np.flatnonzero(np.isfinite(shown.km))
    if plan.examples == "mended":
        chosen = [(row, kind) for kind in ("mended", "broken") for row in shown.changed.get(kind, [])[: SHOWN // 2]]
    else:
        order = answered[np.argsort(shown.km[answered], kind="stable")]
        rows = order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).astype(int)]
        chosen = [(row, shown.row["split"]) for row in rows.tolist()]
    options = next(variant.options for variant in plan.variants if variant.name == metrics["best"])
    tables = run.tables(options, files)
    pool = chosen_pool(models, options, tables)
    write_report(
        out / "report.html",
        metrics=metrics,
        errors={
            "lat": run.photos.lat_lon[:, 0],
            "lon": run.photos.lat_lon[:, 1],
            "km": shown.km,
            "name": metrics["best"],
        },
        examples=[_example(run, tables, pool, models, answers, row) | {"split": kind} for row, kind in chosen],
        about=plan.about,
        notes=plan.notes,
    )


def _example(run: RunFolder, tables: Tables, pool: Pool, models: Models, answers: Answers, row: int) -> dict[str, Any]:
    """One readable photo with its neighbours, candidates and answer, as the report wants it."""
    at = int(np.searchsorted(run.readable, row))
    neighbors, truth = tables.neighbours, run.photos.lat_lon[row]
    rows = neighbors.rows[at, :8]
    crops, _ = load_pictures([run.photos.images[row]], 64)
    others = models.index.pictures(rows, 64)
    near = [
        {
            "crop": crop,
            "lat": lat,
            "lon": lon,
            "score": float(s),
            "km": float(haversine_km(truth[0], truth[1], lat, lon)),
        }
        for crop, (lat, lon), s in zip(others, neighbors.lat_lon[at].tolist(), neighbors.scores[at], strict=False)
    ]
    entries = [
        {
            "lat": float(pool.lat_lon[at, c, 0]),
            "lon": float(pool.lat_lon[at, c, 1]),
            "source": SOURCES[pool.source[at, c]],
            "weight": float(np.exp(pool.log_weight[at, c])),
        }
        for c in np.flatnonzero(pool.mask[at])
    ]
    believed = hasattr(tables, "posterior")
    heat = {"heat": heat_map(tables.posterior, at, height=360, detail=9)} if believed else {}
    lat, lon = answers.lat_lon[row].tolist()
    return {
        "id": run.photos.ids[row],
        "crop": crops[0],
        "true": tuple(truth.tolist()),
        "neighbours": near,
        "candidates": entries,
        **heat,
        "area_km2": float(answers.area_km2[row]) if believed else None,
        "answer": (lat, lon),
        "km": float(haversine_km(truth[0], truth[1], lat, lon)),
        "confidence": dict(zip(RADII_KM, answers.confidence[row].tolist(), strict=True)),
    }


def table_text(metrics: dict[str, Any]) -> str:
    """The table of ``metrics.json`` as plain text: shares, median, gain by verification within 200 km, cost."""
    radii, rows = "".join(f"{f'<= {r} km':>11}" for r in RADII_KM), metrics["variants"]
    width = max(len(row["name"]) for row in rows) + 2
    lines = [f"{'split':<10}{'variant':<{width}}{'n':>6}{radii}{'median km':>11}  {'gain at 200 km':<24}{'ms':>7}"]
    for row in rows:
        shares = "".join(f"{row['acc'][str(r)]:>10.2f}%" for r in RADII_KM)
        median, gain = "-" if row["median_km"] is None else f"{row['median_km']:.1f}", ""
        if "gain" in row:
            low, high = row["gain_ci95"]["200"]
            gain = f"{row['gain']['200']:+.2f} [{low:+.2f}, {high:+.2f}]"
        spent = f"{1000 * row['cost']['seconds']:.1f}" if "cost" in row else ""
        lines.append(f"{row['split']:<10}{row['name']:<{width}}{row['n']:>6}{shares}{median:>11}  {gain:<24}{spent:>7}")
    return "\n".join(line.rstrip() for line in lines)
