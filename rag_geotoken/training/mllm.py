"""What a multimodal model's verdicts are worth: their scale, the router and the calibrations, on validation photos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision import strategies as selection
from rag_geotoken.decision.confidence import fit_calibration
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.geo import haversine_km
from rag_geotoken.mllm.request import Client
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.clock import Clock
from rag_geotoken.run.mllm_stage import Asked, Told, gain_of, read_told
from rag_geotoken.run.tables import read_embeddings, read_pool, read_truth, read_verdicts
from rag_geotoken.run.verification import Variant, ask_variant, write_tables
from rag_geotoken.training.tuning import Log, hits, inside
from rag_geotoken.types import Pool, Predictions
from rag_geotoken.verifiers.router import features, fit_router

SCALES = [0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0]
POOL = "retrieved+generated"
MODES = [Variant(POOL, f"{others}mllm-pool") for others in ("", "alignment+", "visual+", "alignment+visual+")]
FREE = Variant(POOL, "mllm-free")


def tune_mllm(run: Path, source: str, geolocator: Geolocator, client: Client, log: Log) -> Tuning:
    """A source of validation photos -> the geolocator's tuning with mllm_scale, router and calibrations chosen on them.

    The scale is the one that does best on average over the model alone, beside the alignment, beside the pictures, and
    beside both. The router learns from the model's free answers against the pool's unverified decision. Every answer is
    kept in ``run``, so a stopped tuning goes on.
    """
    write_tables(run, source, geolocator, [*MODES, FREE], Clock(run / "seconds.json"))
    photo, whole = read_embeddings(run)[1], read_pool(run)
    truth, good = read_truth(run)
    truth, plain = truth[good], {name: read_verdicts(run, whole, name) for name in ("alignment", "visual")}
    pools = {variant: variant.entries(whole) for variant in (*MODES, FREE)}
    told: dict[Variant, Told] = {}
    for variant, pool in pools.items():
        ask_variant(run, variant, geolocator, Asked(client, variant.asking), pool)
        told[variant] = read_told(run, variant.told, pool)
        log(f"{variant.told}: {int(told[variant].answered.sum())} of {len(truth)} answered")
    tuning = geolocator.tuning

    def decide(variant: Variant, scale: float) -> Predictions:
        scores = {name: plain[name] for name in variant.plain} | {"mllm": told[variant].scores}
        return selection.decide(pools[variant], scores, replace(tuning, mllm_scale=scale, calibration={}))

    values = [float(np.mean([inside(decide(variant, scale), truth) for variant in MODES])) for scale in SCALES]
    best = SCALES[int(np.argmax(values))]
    log(f"mllm_scale {best}: " + " ".join(f"{value:.4f}" for value in values))
    calibration = dict(tuning.calibration)
    for variant in MODES:
        decided = decide(variant, best)
        right = hits(decided, truth)
        name = selection.verified_by(["mllm", *variant.plain])
        calibration[name] = fit_calibration(decided.confidence, right)
        log(f"{name}: " + " ".join(f"{100 * share:.2f}" for share in right.mean(axis=0)) + " % within 1 ... 2500 km")
    router = _router(geolocator, photo, pools[FREE], told[FREE], truth)
    log("router " + " ".join(f"{weight:.3f}" for weight in router))
    return replace(tuning, mllm_scale=best, calibration=calibration, router=router)


def _router(
    geolocator: Geolocator,
    photo: NDArray[np.float32],
    pool: Pool,
    told: Told,
    truth: NDArray[np.float64],
) -> tuple[float, ...]:
    """Weights of the choice between the unverified answer and the model's own place, where it named one."""
    own = told.places[:, 0]
    decided = selection.decide(pool, {}, geolocator.tuning)
    columns = features(pool, decided, own, told.confidence[:, 0], gain_of(geolocator, photo, own, decided))
    there = np.isfinite(own).all(axis=1)
    ours, theirs = (haversine_km(*truth.T, *places.T)[there] for places in (decided.lat_lon, own))
    return fit_router(columns[there], ours, theirs)
