"""The ablation: every variant decides, from tables alone, what its name says."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TUNING, OneLine
from numpy.typing import NDArray
from rag_geotoken.run.ablation import VARIANTS, Run, decide_all, distances, oracle
from rag_geotoken.run.tables import (
    read_candidates,
    read_matches,
    read_neighbors,
    read_places,
    read_pool,
    read_posterior,
    read_predictions,
    read_verdicts,
)

from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.decision import strategies as selection
from rag_geotoken.decision.pool import extend, make_pool, moved_pool, neighbor_pool, posterior_pool, without
from rag_geotoken.files import read_json
from rag_geotoken.geo import haversine_km, pairwise_km
from rag_geotoken.options import VERIFIERS
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.posterior import effective_area_km2
from rag_geotoken.run import ablation
from rag_geotoken.tables import read_table
from rag_geotoken.types import (
    BEAM,
    GPS,
    GREEDY,
    SAMPLE,
    SOURCES,
    VISUAL,
    Candidates,
    Neighbors,
    Places,
    Pool,
    Posterior,
    Predictions,
)
from rag_geotoken.verifiers.agreement import support

BROKEN = 2
TOKENIZER = S2Tokenizer(8, 2)
Floats = NDArray[np.float64]


def answers(folder: Path, variant: str) -> Floats:
    """Places (N, 2) of the readable photos."""
    return np.delete(read_predictions(folder / f"predictions-{variant}.parquet")[1], BROKEN, axis=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_decides(variant: str, run_folder: Path) -> None:
    path = run_folder / f"predictions-{variant}.parquet"
    table = read_table(path)
    _, places, sure = (np.delete(part, BROKEN, axis=0) for part in read_predictions(path))
    assert len(table) == 30 and len(places) == 29
    assert (np.abs(places[:, 0]) <= 90).all() and (np.abs(places[:, 1]) <= 180).all()
    assert ((sure >= 0) & (sure <= 1)).all() and (np.diff(sure, axis=1) >= -1e-9).all()
    inputs, _ = VARIANTS[variant]
    rows = [row for i, row in enumerate(table.to_pylist()) if i != BROKEN]
    assert {row["verified"] for row in rows} == {any(name.startswith("verdicts") for name in inputs)}
    assert {row["error"] for row in rows} == {None} and {row["source"] for row in rows} <= set(SOURCES)
    np.testing.assert_allclose([row["area_km2"] for row in rows], effective_area_km2(read_posterior(run_folder)))
    # A decision is made again when a table that it reads changes: all of them are named.
    named = {entry["file"] for entry in read_json(path.with_suffix(".json"))["inputs"]}
    assert named == {f"{name}.parquet" for name in ("photos", "embeddings", "posterior", *inputs)}


class Noted(dict[str, Any]):
    """Notes which of its values are asked for."""

    def __init__(self, values: dict[str, Any], asked: set[str]) -> None:
        super().__init__(values)
        self.asked = asked

    def __getitem__(self, name: str) -> Any:
        self.asked.add(f"verdicts-{name}")
        return super().__getitem__(name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_names_the_tables_that_it_reads(variant: str, run_folder: Path, geolocator: Geolocator) -> None:
    asked: set[str] = set()
    pool = read_pool(run_folder)
    scores = {name: read_verdicts(run_folder, pool, name) for name in VERIFIERS}
    tables = {
        "neighbors": read_neighbors(run_folder),
        "places": read_places(run_folder),
        "everything": pool,
        "extended": pool,
        "matches": read_matches(run_folder),
        "candidates": read_candidates(run_folder),
        "posterior": read_posterior(run_folder),
        "pool": pool,
        "scores": Noted(scores, asked),
    }

    class Asked:
        def __getattr__(self, name: str) -> Any:
            asked.add({"neighbors": "neighbours", "everything": "pool", "extended": "pool"}.get(name, name))
            return tables[name]

    inputs, decision = VARIANTS[variant]
    decision(Asked(), geolocator)  # type: ignore[arg-type]
    assert asked - {"scores"} == set(inputs)


def test_retrieval_variants_by_hand(run_folder: Path, geolocator: Geolocator) -> None:
    near = read_neighbors(run_folder)
    np.testing.assert_array_equal(answers(run_folder, "nearest"), near.lat_lon[:, 0])
    weight = np.exp(geolocator.tuning.density_scale * near.scores.astype(float))
    kernel = np.exp(-0.5 * (pairwise_km(near.lat_lon) / geolocator.tuning.density_km) ** 2)
    best = np.einsum("bij,bj->bi", kernel, weight).argmax(axis=1)
    np.testing.assert_array_equal(answers(run_folder, "density"), near.lat_lon[np.arange(29), best])


def test_token_variants_choose_among_their_own_cells(run_folder: Path, geolocator: Geolocator) -> None:
    cells = read_candidates(run_folder)
    lat, lon = geolocator.tokenizer.decode(cells.tokens.reshape(-1, cells.tokens.shape[-1]))
    places = np.stack([lat, lon], axis=-1).reshape(*cells.log_prob.shape, 2)
    for variant, source in (("greedy", GREEDY), ("beam", BEAM), ("samples", SAMPLE)):
        found = answers(run_folder, f"tokens-{variant}")
        own = cells.source == source
        assert ((np.abs(places - found[:, None]).max(axis=-1) < 1e-9) & own).any(axis=1).all()
        if source != SAMPLE:
            best = np.where(own, cells.log_prob, -np.inf).argmax(axis=1)
            np.testing.assert_allclose(found, places[np.arange(29), best])
    table = read_table(run_folder / "predictions-tokens-frontier.parquet")
    assert set(table["source"].to_pylist()) == {"frontier", None}


def drawn_run(photos: int = 60) -> Run:
    """Places of a few cells around one place a photo: what no two strategies see alike."""
    rng = np.random.default_rng(0)
    middle = np.column_stack([rng.uniform(-50, 60, photos), rng.uniform(-170, 170, photos)])[:, None]
    # In most cells the first neighbour stands alone, the next two beside each other.
    lat_lon = middle + np.repeat(rng.normal(0, 0.6, (photos, 3, 2)), 3, axis=1)[:, :8]
    lat_lon += np.array([0.0, 0.05, 0.054] * 3)[:8, None]
    similar = -np.sort(-rng.uniform(0.7, 0.9, (photos, 8)))
    neighbors = Neighbors(np.zeros((photos, 8), np.int64), lat_lon, similar.astype(np.float32))
    cells = TOKENIZER.encode(*(middle + rng.normal(0, 0.8, (photos, 12, 2))).reshape(-1, 2).T)
    source = np.tile(np.array([GREEDY, *[BEAM] * 4, *[SAMPLE] * 7], np.int8), (photos, 1))
    log_prob = rng.uniform(-4, -1, source.shape).astype(np.float32)
    candidates = Candidates(cells.reshape(photos, 12, -1), log_prob, source)
    mass = np.sort(rng.dirichlet(np.ones(12), photos).astype(np.float32))[:, ::-1]
    pool = make_pool(neighbors, candidates, TOKENIZER, TUNING)
    scores = {name: rng.normal(0, 0.3, pool.mask.shape).astype(np.float32) for name in VERIFIERS}
    posterior = Posterior(TOKENIZER.tokens_to_ids(candidates.tokens), mass)
    near = middle + rng.normal(0, 0.7, (photos, 5, 2))
    places = Places(near, -np.sort(-rng.uniform(0.2, 0.9, (photos, 5))).astype(np.float32))
    everything = make_pool(neighbors, candidates, TOKENIZER, replace(TUNING, gps_share=0.4), places)
    matches = Places(middle + rng.normal(0, 0.7, (photos, 4, 2)), rng.uniform(0, 1, (photos, 4)).astype(np.float32))
    extended = extend(everything, matches, TUNING)
    # The places' own entries and the moved ones come last, so the others' scores are the same.
    scores = {
        name: np.concatenate([given, rng.normal(0, 0.3, (photos, 9)).astype(np.float32)], axis=1)
        for name, given in scores.items()
    }
    everything = without(extended, VISUAL)
    pool = without(everything, GPS)
    return Run(neighbors, candidates, places, posterior, pool, everything, extended, matches, scores)


def test_the_other_variants_are_the_strategies() -> None:
    run, tuning = drawn_run(), replace(TUNING, spread_km=60.0)
    neighbors, candidates, places, posterior, pool, everything, extended, matches, scores = vars(run).values()

    def own(_: None, cells: Candidates | None, found: Places | None = None) -> Pool:
        return make_pool(None, cells, TOKENIZER, replace(tuning, gps_share=0.5), found)

    def verified(*names: str, over: Pool = pool) -> Predictions:
        return selection.decide(over, {name: scores[name] for name in names}, tuning)

    moved = moved_pool(matches, tuning)
    around, cells = neighbor_pool(neighbors, tuning.density_scale), posterior_pool(posterior)
    expected = {
        "nearest": selection.nearest(neighbors, tuning),
        "density": selection.density(around, tuning),
        "tokens-samples": selection.minimum_bayes_risk(own(None, candidates_of(candidates, SAMPLE)), tuning),
        "tokens-frontier": selection.minimum_bayes_risk(cells, tuning),
        "pool-log-prob": selection.log_probability(pool, tuning),
        "pool-medoid": selection.medoid(pool, tuning),
        "pool-density": selection.density(pool, tuning),
        "pool-mean-shift": selection.mean_shift(pool, tuning),
        "pool-mbr-25": selection.minimum_bayes_risk(pool, tuning, 25),
        "pool-mbr-200": selection.minimum_bayes_risk(pool, tuning, 200),
        "pool": verified(),
        "pool-similarity": selection.highest(pool, scores["alignment"], tuning),
        "pool-reward": selection.highest(pool, scores["reward"], tuning),
        "pool+reward": verified("reward"),
        "pool+alignment": verified("alignment"),
        "pool+alignment+reward": verified("alignment", "reward"),
        "pool+alignment+snap": selection.snap(verified("alignment"), neighbors, TOKENIZER),
        "gps": selection.highest(own(None, None, places), places.scores, tuning),
        "pool+gps": verified(over=everything),
        "pool+gps+alignment": verified("alignment", over=everything),
        "pool+gps+alignment+reward": verified("alignment", "reward", over=everything),
        "visual-best": selection.highest(moved, matches.scores, tuning),
        "visual-consensus": selection.decide(moved, {"visual": support(moved, matches, tuning.visual_km)}, tuning),
        "pool+gps+visual": verified("visual", over=extended),
        "pool+gps+visual+alignment": verified("visual", "alignment", over=extended),
    }
    assert set(VARIANTS) == {*expected, "tokens-greedy", "tokens-beam"}
    locator: Any = SimpleNamespace(tuning=tuning, tokenizer=TOKENIZER, pool=own)
    for name, wanted in expected.items():
        found = VARIANTS[name][1](run, locator)
        for field in ("lat_lon", "confidence", "source"):
            np.testing.assert_allclose(getattr(found, field), getattr(wanted, field), atol=1e-9, err_msg=name)
    # No two variants do the same here, so a name cannot stand at another's decision.
    assert len({wanted.lat_lon.tobytes() for wanted in expected.values()}) == len(expected)


def candidates_of(candidates: Candidates, source: int) -> Candidates:
    keep = candidates.source[0] == source
    return Candidates(candidates.tokens[:, keep], candidates.log_prob[:, keep], candidates.source[:, keep])


def test_deciding_computes_nothing_that_the_tables_hold(
    run_folder: Path, geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("predictions*")))
    for name in ("encode", "search", "places", "memory", "propose", "posterior", "verify", "states"):
        monkeypatch.setattr(Geolocator, name, lambda *_, name=name, **__: pytest.fail(f"{name} computed again"))
    read: list[str] = []
    for name in (
        "read_pool",
        "read_posterior",
        "read_neighbors",
        "read_candidates",
        "read_places",
        "read_matches",
        "read_verdicts",
    ):
        real = getattr(ablation, name)
        monkeypatch.setattr(ablation, name, lambda *given, real=real: read.append(real.__name__) or real(*given))  # type: ignore[func-returns-value]
    decide_all(folder, geolocator)
    once = ["read_candidates", "read_matches", "read_neighbors", "read_places", "read_pool", "read_posterior"]
    assert sorted(read) == [*once, *["read_verdicts"] * len(VERIFIERS)]
    for variant in VARIANTS:
        name = f"predictions-{variant}.parquet"
        assert (folder / name).read_bytes() == (run_folder / name).read_bytes()


def test_a_lost_table_is_named(run_folder: Path, geolocator: Geolocator, tmp_path: Path, one_line: OneLine) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (folder / "verdicts-reward.parquet").unlink()
    with one_line(r"there is no .*verdicts-reward\.parquet: run the stage that writes it"):
        decide_all(folder, geolocator)


def test_distances_and_the_oracle(run_folder: Path) -> None:
    truth, _, _ = read_predictions(run_folder / "predictions-nearest.parquet")
    near = read_neighbors(run_folder)
    best = oracle(run_folder, near.lat_lon)
    good = [i for i in range(30) if i != BROKEN]
    assert np.isnan(best[BROKEN])
    for b, i in enumerate(good):
        assert best[i] == pytest.approx(min(float(haversine_km(*truth[i], *place)) for place in near.lat_lon[b]))
    for variant in VARIANTS:
        km, places = distances(run_folder, variant), answers(run_folder, variant)
        assert np.isnan(km[BROKEN])
        np.testing.assert_allclose(km[good], haversine_km(*truth[good].T, *places.T))
    assert (distances(run_folder, "nearest")[good] >= best[good] - 1e-9).all()
