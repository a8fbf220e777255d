"""The ablation: every variant decided from the same tables, so nothing before the decision is computed twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision import strategies as selection
from rag_geotoken.decision.pool import moved_pool, neighbor_pool, posterior_pool, without
from rag_geotoken.geo import haversine_km
from rag_geotoken.options import VERIFIERS
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.posterior import Posterior, effective_area_km2
from rag_geotoken.run import stages
from rag_geotoken.run.mllm_stage import Asked, ask_model, decide_told, read_told
from rag_geotoken.run.tables import (
    read_candidates,
    read_embeddings,
    read_matches,
    read_neighbors,
    read_places,
    read_pool,
    read_posterior,
    read_predictions,
    read_truth,
    read_verdicts,
)
from rag_geotoken.types import (
    BEAM,
    GPS,
    GREEDY,
    SAMPLE,
    VISUAL,
    Candidates,
    Matches,
    Neighbors,
    Places,
    Pool,
    Predictions,
)
from rag_geotoken.verifiers.agreement import support

NEIGHBORS, CELLS, POSTERIOR, POOL = ["neighbours"], ["candidates"], ["posterior"], ["pool"]
ALIGNED, REWARDED = [*POOL, "verdicts-alignment"], [*POOL, "verdicts-reward"]
BOTH = [*ALIGNED, "verdicts-reward"]
SEEN = [*POOL, "verdicts-visual"]


@dataclass(frozen=True)
class Run:
    """The tables of a run that decisions are made from."""

    neighbors: Neighbors
    candidates: Candidates
    places: Places
    posterior: Posterior
    pool: Pool  # neighbours and generated cells
    everything: Pool  # and the places found by GPS embedding
    extended: Pool  # and those to which neighbours' pictures move the photo
    matches: Matches
    scores: dict[str, NDArray[np.float32]]


Decision = Callable[[Run, Geolocator], Predictions]


def _cells_of(source: int, run: Run, geolocator: Geolocator) -> Pool:
    """The candidates of one kind as a pool of their own."""
    keep = run.candidates.source[0] == source
    cells = run.candidates
    return geolocator.pool(None, Candidates(cells.tokens[:, keep], cells.log_prob[:, keep], cells.source[:, keep]))


def _verified(*names: str) -> Decision:
    return lambda run, locator: selection.decide(run.pool, {n: run.scores[n] for n in names}, locator.tuning)


def _everything(*names: str) -> Decision:
    return lambda run, locator: selection.decide(run.everything, {n: run.scores[n] for n in names}, locator.tuning)


def _extended(*names: str) -> Decision:
    return lambda run, locator: selection.decide(run.extended, {n: run.scores[n] for n in names}, locator.tuning)


def _best_match(run: Run, locator: Geolocator) -> Predictions:
    return selection.highest(moved_pool(run.matches, locator.tuning), run.matches.scores, locator.tuning)


def _consensus(run: Run, locator: Geolocator) -> Predictions:
    moved, tuning = moved_pool(run.matches, locator.tuning), locator.tuning
    return selection.decide(moved, {"visual": support(moved, run.matches, tuning.visual_km)}, tuning)


def _by_gps(run: Run, locator: Geolocator) -> Predictions:
    found = locator.pool(None, None, run.places)
    return selection.highest(found, run.places.scores, locator.tuning)


def _density(run: Run, locator: Geolocator) -> Predictions:
    return selection.density(neighbor_pool(run.neighbors, locator.tuning.density_scale), locator.tuning)


def _snapped(run: Run, locator: Geolocator) -> Predictions:
    return selection.snap(_verified("alignment")(run, locator), run.neighbors, locator.tokenizer)


# Variant -> the tables its decision reads, and the decision.
VARIANTS: dict[str, tuple[list[str], Decision]] = {
    "nearest": (NEIGHBORS, lambda run, to: selection.nearest(run.neighbors, to.tuning)),
    "density": (NEIGHBORS, _density),
    "gps": (["places"], _by_gps),
    "tokens-greedy": (CELLS, lambda run, to: selection.log_probability(_cells_of(GREEDY, run, to), to.tuning)),
    "tokens-beam": (CELLS, lambda run, to: selection.log_probability(_cells_of(BEAM, run, to), to.tuning)),
    "tokens-samples": (CELLS, lambda run, to: selection.minimum_bayes_risk(_cells_of(SAMPLE, run, to), to.tuning)),
    "tokens-frontier": (
        POSTERIOR,
        lambda run, to: selection.minimum_bayes_risk(posterior_pool(run.posterior), to.tuning),
    ),
    "pool-log-prob": (POOL, lambda run, to: selection.log_probability(run.pool, to.tuning)),
    "pool-medoid": (POOL, lambda run, to: selection.medoid(run.pool, to.tuning)),
    "pool-density": (POOL, lambda run, to: selection.density(run.pool, to.tuning)),
    "pool-mean-shift": (POOL, lambda run, to: selection.mean_shift(run.pool, to.tuning)),
    "pool-mbr-25": (POOL, lambda run, to: selection.minimum_bayes_risk(run.pool, to.tuning, 25)),
    "pool-mbr-200": (POOL, lambda run, to: selection.minimum_bayes_risk(run.pool, to.tuning, 200)),
    "pool": (POOL, _verified()),
    "pool+gps": (POOL, _everything()),
    "pool-similarity": (ALIGNED, lambda run, to: selection.highest(run.pool, run.scores["alignment"], to.tuning)),
    "pool-reward": (REWARDED, lambda run, to: selection.highest(run.pool, run.scores["reward"], to.tuning)),
    "pool+reward": (REWARDED, _verified("reward")),
    "pool+alignment": (ALIGNED, _verified("alignment")),
    "pool+alignment+reward": (BOTH, _verified("alignment", "reward")),
    "pool+alignment+snap": ([*ALIGNED, "neighbours"], _snapped),
    "pool+gps+alignment": (ALIGNED, _everything("alignment")),
    "pool+gps+alignment+reward": (BOTH, _everything("alignment", "reward")),
    "visual-best": (["matches"], _best_match),
    "visual-consensus": (["matches"], _consensus),
    "pool+gps+visual": (SEEN, _extended("visual")),
    "pool+gps+visual+alignment": ([*SEEN, "verdicts-alignment"], _extended("visual", "alignment")),
}


# Variant -> how a multimodal model was asked in it, and who verifies beside it.
ASKED: dict[str, tuple[str, tuple[str, ...]]] = {
    "pool+gps+mllm": ("mllm", ()),
    "pool+gps+visual+mllm": ("mllm-visual", ("visual",)),
    "pool+gps+visual+alignment+mllm": ("mllm-visual", ("visual", "alignment")),
}


def ask_all(folder: Path, geolocator: Geolocator, asked: Asked) -> None:
    """A multimodal model's verdicts that ``ASKED`` needs, without and with compared pictures."""
    pool = read_pool(folder)
    ask_model(folder, "mllm", geolocator, asked, without(pool, VISUAL))
    ask_model(folder, "mllm-visual", geolocator, asked, pool, read_matches(folder))


def variants_of(folder: Path) -> list[str]:
    """The variants that are decided for a run: those that ask a multimodal model where it was asked."""
    return [*VARIANTS, *(name for name, (told, _) in ASKED.items() if (folder / f"verdicts-{told}.parquet").is_file())]


def decide_all(folder: Path, geolocator: Geolocator) -> None:
    """Write ``predictions-VARIANT.parquet`` for every variant of a run whose stages are done."""
    pool, posterior = read_pool(folder), read_posterior(folder)
    scores = {verifier: read_verdicts(folder, pool, verifier) for verifier in VERIFIERS}
    places = read_places(folder)
    everything = without(pool, VISUAL)
    pools = without(everything, GPS), everything, pool
    run = Run(read_neighbors(folder), read_candidates(folder), places, posterior, *pools, read_matches(folder), scores)
    area = effective_area_km2(posterior)
    for name, (inputs, decision) in VARIANTS.items():
        decide = partial(decision, run, geolocator)
        stages.write_decision(folder, name, geolocator, [*inputs, "posterior"], decide, area)
    photo = read_embeddings(folder)[1]
    for name in variants_of(folder)[len(VARIANTS) :]:
        verdicts, others = ASKED[name]
        pool = run.extended if "visual" in others else run.everything
        told = read_told(folder, verdicts, pool)
        beside = {other: scores[other] for other in others}
        decide = partial(decide_told, geolocator, photo, pool, beside, told, "pool")
        inputs = [*POOL, *(f"verdicts-{other}" for other in (*others, verdicts)), "posterior"]
        stages.write_decision(folder, name, geolocator, inputs, decide, area, verified=told.answered)


def oracle(folder: Path, lat_lon: NDArray[np.float64], mask: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Distance (N,) of the best of each readable photo's places (B, C, 2), NaN for the other photos. Not a method.

    mask (B, C): which of them there are, all unless given.
    """
    truth, good = read_truth(folder)
    away = haversine_km(truth[good, :1], truth[good, 1:], lat_lon[..., 0], lat_lon[..., 1])
    km = np.full(len(good), np.nan)
    km[good] = (away if mask is None else np.where(mask, away, np.inf)).min(axis=1)
    return km


def distances(folder: Path, variant: str) -> NDArray[np.float64]:
    """Distance (N,) of a variant's answers, NaN where there is none."""
    truth, answers, _ = read_predictions(folder / f"predictions-{variant}.parquet")
    return haversine_km(*truth.T, *answers.T)
