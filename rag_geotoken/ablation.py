"""The ablation: every variant decided from the same tables, so nothing before the decision is computed twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rag_geotoken import selection, stages
from rag_geotoken.geo import haversine_km
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.tables import read_table
from rag_geotoken.types import BEAM, GREEDY, SAMPLE, Candidates, Neighbors, Pool, Predictions

# Variant -> the tables its decision reads.
VARIANTS = {
    "nearest": ["neighbours"],
    "density": ["neighbours"],
    "tokens-greedy": ["candidates"],
    "tokens-beam": ["candidates"],
    "tokens-samples": ["candidates"],
    "pool": ["pool"],
    "pool+alignment": ["pool", "verdicts"],
}


def decide_all(folder: Path, geolocator: Geolocator) -> None:
    """Write ``predictions-VARIANT.parquet`` for every variant of a run whose stages are done."""
    entries = stages.read_pool(folder)
    neighbors, candidates = stages.read_neighbors(folder), stages.read_candidates(folder)
    scores = stages.read_verdicts(folder, entries)
    for name, decision in decisions(geolocator, neighbors, candidates, entries, scores).items():
        stages.write_decision(folder, name, geolocator, VARIANTS[name], decision)


def decisions(
    geolocator: Geolocator,
    neighbors: Neighbors,
    candidates: Candidates,
    entries: Pool,
    scores: NDArray[np.float32],
) -> dict[str, Predictions]:
    """Every variant's decision; a single method is a pool of its own kind alone."""
    tuning = geolocator.tuning

    def alone(source: int) -> Pool:
        keep = candidates.source[0] == source
        part = Candidates(candidates.tokens[:, keep], candidates.log_prob[:, keep], candidates.source[:, keep])
        return geolocator.pool(None, part)

    return {
        "nearest": selection.nearest(neighbors, tuning),
        "density": selection.density(neighbors, tuning),
        "tokens-greedy": selection.log_probability(alone(GREEDY), tuning),
        "tokens-beam": selection.log_probability(alone(BEAM), tuning),
        "tokens-samples": selection.minimum_bayes_risk(alone(SAMPLE), tuning),
        "pool": selection.decide(entries, None, tuning),
        "pool+alignment": selection.decide(entries, scores, tuning),
    }


def oracle(folder: Path) -> NDArray[np.float64]:
    """Distance of the best of each photo's neighbours, NaN for a photo that could not be read. Not a method."""
    photos = read_table(folder / "photos.parquet", ["lat", "lon"])
    good = read_table(folder / "embeddings.parquet", ["error"])["error"].is_null().to_numpy()
    truth = np.column_stack([photos["lat"].to_numpy(), photos["lon"].to_numpy()])[good]
    found = stages.read_neighbors(folder).lat_lon
    km = np.full(len(photos), np.nan)
    km[good] = haversine_km(truth[:, :1], truth[:, 1:], found[..., 0], found[..., 1]).min(axis=1)
    return km
