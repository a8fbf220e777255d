"""The ablation of verification: candidates retrieved, generated or both, crossed with who verifies them.

Everything before ``verify`` is computed once, and every verifier reads the same tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.decision import strategies as selection
from rag_geotoken.decision.pool import only
from rag_geotoken.errors import GeoError
from rag_geotoken.files import check_writable, write_json
from rag_geotoken.geo import haversine_km
from rag_geotoken.metrics import RADII_KM, bootstrap, summary
from rag_geotoken.mllm import open_client
from rag_geotoken.options import Options, check_verifier
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run import retrieval, stages
from rag_geotoken.run.ablation import oracle
from rag_geotoken.run.clock import Clock
from rag_geotoken.run.demo import example, make_index
from rag_geotoken.run.mllm_stage import Asked, Asking, ask_model, decide_told, read_told
from rag_geotoken.run.tables import read_embeddings, read_matches, read_pool, read_predictions, read_verdicts
from rag_geotoken.tables import read_table, versions
from rag_geotoken.types import BEAM, GPS, GREEDY, NEIGHBOUR, SAMPLE, VISUAL, Pool
from rag_geotoken.weights import EARTH

# What a pool is made of. The token model reads the neighbours either way; here they are no candidates.
POOLS = {
    "retrieved+generated": (NEIGHBOUR, GPS, GREEDY, BEAM, SAMPLE),
    "retrieved": (NEIGHBOUR, GPS),
    "generated": (GREEDY, BEAM, SAMPLE),
}
MENDED_KM = 200  # a photo is mended where its answer comes within so many km, broken where it leaves them
SHOWN = 4  # photos of each kind in the report
NOTES = [
    "Every gain is paired: the same photos and pool, with and without verification; its 95 % interval by bootstrap.",
    "Of the gap: the share of what lies between the unverified answer and the pool's best candidate, within 200 km.",
    f"Mended: photos whose answer came within {MENDED_KM} km by verification. Broken: photos whose answer left them.",
]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One cell of the crossing: a pool of ``POOLS``, and who verifies it, such as ``visual+mllm-pool:plain``.

    ``mllm-MODE`` asks a multimodal model; ``:plain`` without the evidence in words, ``:pictures`` with neighbours'
    pictures. Raises GeoError for what is none of it.
    """

    pool: str
    verify: str

    def __post_init__(self) -> None:
        """Every part of the name is checked."""
        if self.pool not in POOLS:
            raise GeoError(f"there is no pool {self.pool!r}: choose of {', '.join(POOLS)}")
        for name in self.plain:
            check_verifier(name)
        if "visual" in self.plain and NEIGHBOUR not in POOLS[self.pool]:
            raise GeoError(f"visual compares retrieved pictures, and the pool {self.pool} has none")
        mode, *how = (self.asked or "mllm-pool").removeprefix("mllm-").split(":")
        if mode == "diversify" or not set(how) <= {"plain", "pictures"}:
            raise GeoError(f"{self.asked}: write mllm-pool, mllm-free or mllm-zero-shot, behind it :plain or :pictures")
        Asking(mode)

    @cached_property
    def plain(self) -> list[str]:
        """The verifiers that are no model asked in words."""
        return [name for name in self.verify.split("+") if name != "none" and not name.startswith("mllm-")]

    @cached_property
    def asked(self) -> str | None:
        """How the multimodal model is asked, or None."""
        return next((name for name in self.verify.split("+") if name.startswith("mllm-")), None)

    @property
    def asking(self) -> Asking:
        """The same as settings."""
        mode, *how = (self.asked or "").removeprefix("mllm-").split(":")
        return Asking(mode, evidence="plain" not in how, pictures="pictures" in how)

    @property
    def name(self) -> str:
        """Of its tables."""
        return f"{self.pool}-{self.verify}".replace("+", "-").replace(":", "-")

    @property
    def told(self) -> str:
        """Name of the model's verdicts: they follow from what it is shown, not from who verifies beside it."""
        return f"{self.asked}-{self.pool}{'-visual' * ('visual' in self.plain)}".replace("+", "-").replace(":", "-")

    def entries(self, whole: Pool) -> Pool:
        """The part of the whole pool that it decides on."""
        return only(whole, *POOLS[self.pool], *[VISUAL] * ("visual" in self.plain))


def ablate(
    recipe: dict[str, Any],
    out: Path,
    model: tuple[str, str | None, int | None],
    resume: bool,
    log: Log,
    weights: Path = EARTH,
) -> dict[str, Any]:
    """Run a recipe into ``out`` -> what ``metrics.json`` holds; report.html shows it.

    model: the multimodal one, as :func:`.open_client` takes it. resume: ask it again where it failed. Raises
    GeoError for a recipe that does not fit or a model that does not answer, before any work.
    """
    gallery, photos, variants = _read(recipe)
    check_writable(out)
    client = open_client(*model) if any(variant.asked for variant in variants) else None
    clock = Clock(out / "seconds.json")
    alignment = GeoAlignment.from_pretrained(weights)
    clock(out / "index" / "manifest.json", partial(make_index, out / "index", gallery, alignment))
    geolocator = Geolocator.from_pretrained(out / "index", weights)
    run = out / "run"
    write_tables(run, photos, geolocator, variants, clock)
    photo, whole = read_embeddings(run)[1], read_pool(run)
    km: dict[Variant, NDArray[np.float64]] = {}
    for variant in variants:
        pool, mask = variant.entries(whole), None
        scores = {name: read_verdicts(run, whole, name) for name in variant.plain}
        inputs = ["pool", *(f"verdicts-{name}" for name in variant.plain)]
        if client and variant.asked:
            asked = Asked(client, variant.asking, resume)
            clock(run / f"verdicts-{variant.told}.json", partial(ask_variant, run, variant, geolocator, asked, pool))
            told = read_told(run, variant.told, pool)
            decide = partial(decide_told, geolocator, photo, pool, scores, told, variant.asking.mode)
            mask = told.answered
            inputs.append(f"verdicts-{variant.told}")
        else:
            decide = partial(selection.decide, pool, scores, geolocator.tuning)
        path = stages.write_decision(run, variant.name, geolocator, inputs, decide, verified=mask)
        truth, answers, _ = read_predictions(path)
        km[variant] = haversine_km(*truth.T, *answers.T)
    if clock.reused:
        log(f"reused, as an earlier run left it: {', '.join(clock.reused)}")
    metrics = _metrics(run, km, whole, clock.seconds) | {
        "photos": photos,
        "seed": 0,  # of the bootstrap
        "model": client.model if client else None,
        "reused": clock.reused,
        "versions": versions() | {"weights": alignment.identity},
    }
    write_json(out / "metrics.json", metrics)
    _report(out, metrics, km, geolocator)
    return metrics


def _read(recipe: dict[str, Any]) -> tuple[str, str, list[Variant]]:
    """Gallery, photos and variants of a recipe. Raises GeoError for one that does not fit."""
    kinds = {"gallery": str, "photos": str, "pools": list, "verify": list}
    if recipe.keys() != kinds.keys() or any(type(recipe[name]) is not kind for name, kind in kinds.items()):
        raise GeoError("a recipe of verification has gallery, photos (sources), pools and verify (lists), nothing else")
    crossed = [
        Variant(pool, verify)
        for pool in recipe["pools"]
        for verify in recipe["verify"]
        if "visual" not in str(verify) or NEIGHBOUR in POOLS.get(pool, ())
    ]
    if not crossed or "none" not in recipe["verify"]:
        raise GeoError('the recipe compares with no verification: put "none" into verify, and a pool into pools')
    return recipe["gallery"], recipe["photos"], crossed


def write_tables(run: Path, photos: str, geolocator: Geolocator, variants: Sequence[Variant], clock: Clock) -> None:
    """All that verification reads, and the verdicts of all but the multimodal model."""
    options = Options(verify=("visual",))
    retrieval.write_photos(run, photos)
    steps: dict[str, Callable[[], object]] = {
        "embeddings": partial(retrieval.encode, run, geolocator.alignment),
        "neighbours": partial(
            retrieval.search, run, geolocator.index, options.neighbors, geolocator.tuning.search_weights
        ),
        "candidates": partial(stages.propose, run, geolocator, options),
        "places": partial(stages.places, run, geolocator, options),
        "matches": partial(stages.matches, run, geolocator),
        "pool": partial(stages.pool, run, geolocator, options),
    }
    for name in dict.fromkeys(name for variant in variants for name in variant.plain):
        steps[f"verdicts-{name}"] = partial(stages.verify, run, geolocator, name)
    for name, work in steps.items():
        clock(run / f"{name}.json", work)


def ask_variant(run: Path, variant: Variant, geolocator: Geolocator, asked: Asked, pool: Pool) -> None:
    """The multimodal model's verdicts on a variant's pool; it is told of matches where pictures are compared."""
    ask_model(run, variant.told, geolocator, asked, pool, read_matches(run) if "visual" in variant.plain else None)


def _metrics(
    run: Path, km: dict[Variant, NDArray[np.float64]], whole: Pool, seconds: dict[str, float]
) -> dict[str, Any]:
    """A row a variant: accuracy, paired gain over the same pool without verification, cost, photos mended or broken."""
    drawn = bootstrap(np.stack(list(km.values())), seed=0)
    ids, order = read_table(run / "photos.parquet", ["id"])["id"].to_pylist(), list(km)
    rows = []
    for i, (variant, away) in enumerate(km.items()):
        base = order.index(Variant(variant.pool, "none"))
        before = km[order[base]]
        row = summary(variant.verify, variant.pool, away, interval=drawn.accuracy[i])
        row["gain"] = {str(r): round(100 * float((away <= r).mean() - (before <= r).mean()), 4) for r in RADII_KM}
        row["gain_ci95"] = _bounds(drawn.difference[i, base])
        right, was = away <= MENDED_KM, before <= MENDED_KM
        row["mended"] = [ids[j] for j in np.flatnonzero(right & ~was)]
        row["broken"] = [ids[j] for j in np.flatnonzero(~right & was)]
        entries = variant.entries(whole)
        best = oracle(run, entries.lat_lon, entries.mask)
        row["oracle"] = {str(r): round(100 * float((best <= r).mean()), 4) for r in RADII_KM}
        gap = float((best <= MENDED_KM).mean() - was.mean())
        row["gap_closed"] = round(row["gain"][str(MENDED_KM)] / 100 / gap, 4) if gap > 0 else None
        row["cost"] = _cost(run, variant, seconds)
        rows.append(row)
    return {"variants": rows, "stages": seconds, "seconds": round(sum(seconds.values()), 1), "n": len(ids)}


def _report(out: Path, metrics: dict[str, Any], km: dict[Variant, NDArray[np.float64]], geolocator: Geolocator) -> None:
    """The page: every variant, its gain and cost, and photos that the best one mended and broke."""
    from rag_geotoken.report import write_report

    rows = list(zip(km, metrics["variants"], strict=True))
    best, row = max(rows, key=lambda pair: sum(pair[1]["acc"].values()))
    run = out / "run"
    ids = read_table(run / "photos.parquet", ["id"])["id"].to_pylist()
    shown = [(name, kind) for kind in ("mended", "broken") for name in row[kind][:SHOWN]]
    photos = read_table(run / "photos.parquet", ["lat", "lon"])
    write_report(
        out / "report.html",
        metrics=metrics,
        errors={"lat": photos["lat"].to_numpy(), "lon": photos["lon"].to_numpy(), "km": km[best], "name": row["name"]},
        examples=[example(run, ids.index(name), geolocator.index, best.name, kind) for name, kind in shown],
        notes=NOTES,
    )


def _cost(run: Path, variant: Variant, seconds: dict[str, float]) -> dict[str, float]:
    """What a variant's verification takes a photo: seconds, and of the model requests and tokens."""
    count = len(read_table(run / "photos.parquet", ["id"]))
    names = [f"verdicts-{name}" for name in variant.plain] + ["matches"] * ("visual" in variant.plain)
    cost = {}
    if variant.asked:
        names.append(f"verdicts-{variant.told}")
        table = read_table(run / f"{names[-1]}.parquet", ["status", "requests", "prompt_tokens", "output_tokens"])
        cost = {name: round(float(np.sum(table[name].to_numpy())) / count, 3) for name in table.column_names[1:]}
        cost["failed"] = sum(status != "ok" for status in table["status"].to_pylist())
    return {"seconds": round(sum(seconds.get(name, 0.0) for name in names) / count, 5), **cost}


def _bounds(pairs: NDArray[np.float64]) -> dict[str, list[float]]:
    return {str(r): [round(float(b), 4) for b in pair] for r, pair in zip(RADII_KM, pairs, strict=True)}


def verification_text(metrics: dict[str, Any]) -> str:
    """The table of ``metrics.json`` as plain text: shares, the gain within 200 km with its interval, and the cost."""
    radii = "".join(f"{f'<= {r} km':>11}" for r in RADII_KM)
    lines = [f"{'pool':<20}{'verify':<28}{radii}  {'gain at 200 km':<24}{'of gap':>7}{'tokens':>8}{'ms':>7}"]
    for row in metrics["variants"]:
        shares = "".join(f"{row['acc'][str(r)]:>10.2f}%" for r in RADII_KM)
        low, high = row["gain_ci95"]["200"]
        gain = f"{row['gain']['200']:+.2f} [{low:+.2f}, {high:+.2f}]"
        closed = "" if row["gap_closed"] is None else f"{100 * row['gap_closed']:.0f} %"
        cost = row["cost"]
        spent = f"{cost.get('output_tokens', 0):>8.1f}{1000 * cost['seconds']:>7.1f}"
        lines.append(f"{row['split']:<20}{row['name']:<28}{shares}  {gain:<24}{closed:>7}{spent}")
    return "\n".join(lines)
