"""These functions tune how much a multimodal model's verdicts count, on validation photos."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision import strategies
from rag_geotoken.decision.confidence import fit_calibration
from rag_geotoken.decision.pool import chosen_pool
from rag_geotoken.decision.strategies import Given
from rag_geotoken.decision.tuning import Tuning, load_tuning
from rag_geotoken.evaluation.metrics import hits, inside
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.mllm.session import MllmSession
from rag_geotoken.models import Models
from rag_geotoken.options import Options, verified_by
from rag_geotoken.run.walk import RunFolder, write_photos
from rag_geotoken.storage.files import write_json
from rag_geotoken.training.loop import Log
from rag_geotoken.training.setup import Setup
from rag_geotoken.types import MllmVerdict, Pool, Predictions
from rag_geotoken.verifiers.mllm import gain_of
from rag_geotoken.verifiers.router import features, fit_router

SCALES = [0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0]
MODES = [Options(verify=(*beside, "mllm")) for beside in ((), ("alignment",), ("visual",), ("alignment", "visual"))]
FREE = Options(verify=("mllm",), mllm_mode="free")
SHARED = Options(verify=("alignment", "visual"))  # what all of them are decided from


def train(setup: Setup, *, where: str | None = None, model: str | None = None, concurrent: int | None = None) -> None:
    """Tune how much a multimodal model's verdicts count, and write it into tuning.json in a recipe's folder.

    where, model, concurrent: as :func:`.open_client` takes them; None is the verifier trained beside the models. The
    photos' tables and the model's answers are kept in ``OUT-mllm``.
    """
    session = MllmSession.open(where or str(setup.beside("verifier")), model, concurrent)
    models = setup.models(load_tuning(setup.out), mllm=session)
    tuned = tune_mllm(setup.beside("mllm"), setup.settings["source"], models, setup.log)
    write_json(setup.out / "tuning.json", asdict(tuned))


def tune_mllm(folder: Path, source: str, models: Models, log: Log) -> Tuning:
    """Return the models' tuning with mllm_scale, router and calibrations chosen on a source of validation photos.

    The scale is the one that does best on average over the model alone, beside the alignment, beside the pictures, and
    beside both. The router learns from the model's free answers against the pool's unverified decision. Every answer is
    kept in ``folder``, so a stopped tuning goes on.
    """
    write_photos(folder, source)
    run = RunFolder(folder, models)
    tuning, pools, scores = models.tuning, list[Pool](), list[dict[str, NDArray[np.float32]]]()
    for options in (*MODES, FREE):
        tables = run.tables(options, run.walk(options, SHARED, until=f"verdicts-mllm-{options.mllm_mode}"))
        pools.append(chosen_pool(options, tables.pool))
        verdict = cast(MllmVerdict, tables.verdicts["mllm"])
        masks = {name: tables.pool.mask for name in options.verify} | {"mllm": pools[-1].mask}
        scores.append({name: tables.verdicts[name].over(mask) for name, mask in masks.items()})
        answered = int(verdict.answered.sum())
        log(f"{'+'.join(options.verify)} {options.mllm_mode}: {answered} of {len(verdict.status)} answered")
    truth = tables.photos.lat_lon

    def decide(mode: int, scale: float) -> Predictions:
        return strategies.decide(pools[mode], Given(scores[mode], replace(tuning, mllm_scale=scale, calibration={})))

    values = [float(np.mean([inside(decide(i, scale), truth) for i in range(len(MODES))])) for scale in SCALES]
    best = SCALES[int(np.argmax(values))]
    log(f"mllm_scale {best}: " + " ".join(f"{value:.4f}" for value in values))
    calibration = dict(tuning.calibration)
    for i, options in enumerate(MODES):
        decided = decide(i, best)
        right = hits(decided, truth)
        name = verified_by(options.verify)
        calibration[name] = fit_calibration(decided.confidence, right)
        log(f"{name}: " + " ".join(f"{100 * share:.2f}" for share in right.mean(axis=0)) + " % within 1 ... 2500 km")
    # The router chooses between the unverified decision and the model's own place, where it named one.
    own = verdict.lat_lon[:, 0]
    decided = strategies.decide(pools[-1], Given({}, tuning))
    gain = gain_of(models, tables.embeddings, own, decided)
    columns = features(pools[-1], decided, own, verdict.confidence[:, 0], gain)
    named = np.isfinite(own).all(axis=1)
    decided_km, own_km = (haversine_km(*truth.T, *places.T)[named] for places in (decided.lat_lon, own))
    router = fit_router(columns[named], decided_km, own_km)
    log("router " + " ".join(f"{weight:.3f}" for weight in router))
    return replace(tuning, mllm_scale=best, calibration=calibration, router=router)
