"""Ablations: every variant decides what its name says, tables are shared, and a recipe is checked before any work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import call
from numpy.typing import NDArray
from PIL import Image
from tiny import SMALL, TUNING, VARIANTS, OneLine, write_test_photos

from rag_geotoken.decision import strategies
from rag_geotoken.decision.pool import chosen_pool, extend, make_pool, only, posterior_pool, scored_pool
from rag_geotoken.decision.strategies import Given
from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.geo.sphere import haversine_km, pairwise_km
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.options import Options
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run import resumable, stages, walk
from rag_geotoken.run.ablate import Made, ablate, oracle, walk_variants
from rag_geotoken.run.road import road
from rag_geotoken.run.variants import Variant, read_variants
from rag_geotoken.run.walk import RunFolder
from rag_geotoken.storage.files import read_json, write_json
from rag_geotoken.storage.parquet import read_table
from rag_geotoken.tokens.posterior import effective_area_km2
from rag_geotoken.types import (
    BEAM,
    GPS,
    GREEDY,
    NEIGHBOR,
    RADII_KM,
    SAMPLE,
    SOURCES,
    VISUAL,
    Answers,
    Candidates,
    Neighbors,
    Photos,
    Places,
    Pool,
    Posterior,
    Predictions,
    Tables,
    Verdict,
)
from rag_geotoken.verifiers.visual import support

BROKEN = 2
TOKENIZER = S2Tokenizer(8, 2)
NAMED = {variant.name: variant for variant in VARIANTS}
Floats = NDArray[np.float64]


def read(folder: Path, name: str, kind: type[Any]) -> Any:
    return kind.from_table(read_table(folder / f"{name}.parquet"))


def answers(folder: Path, variant: str) -> Floats:
    """Places (N, 2) of the readable photos."""
    found: Answers = read(folder, f"predictions-{variant}", Answers)
    return np.delete(found.lat_lon, BROKEN, axis=0)


@pytest.fixture
def copied(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture(scope="module")
def walked(
    run_folder: Path, geolocator: Geolocator, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, Made]:
    """The run as one who comes later meets it, and variant -> stage -> table."""
    run = RunFolder(Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("walked") / "run")), geolocator)
    return run, walk_variants(run, VARIANTS)


# the demo's variants


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_decides(variant: Variant, walked: tuple[RunFolder, Made]) -> None:
    run, made = walked
    files = made[variant.name]
    assert files["predictions"] == f"predictions-{variant.name}"
    path = run.folder / f"predictions-{variant.name}.parquet"
    table, decided = read_table(path), run.result(files["predictions"], Answers)[run.readable]
    assert len(table) == 30 and len(decided.lat_lon) == 29
    assert (np.abs(decided.lat_lon[:, 0]) <= 90).all() and (np.abs(decided.lat_lon[:, 1]) <= 180).all()
    sure = decided.confidence
    assert ((sure >= 0) & (sure <= 1)).all() and (np.diff(sure, axis=1) >= -1e-9).all()
    rows = [row for i, row in enumerate(table.to_pylist()) if i != BROKEN]
    assert {row["verified"] for row in rows} == {bool(variant.options.verify)}
    assert {row["error"] for row in rows} == {None} and {row["source"] for row in rows} <= set(SOURCES)
    assert {row["source"] for row in rows} <= set(variant.options.sources)
    posterior = read(run.folder, "posterior", Posterior)
    np.testing.assert_allclose([row["area_km2"] for row in rows], effective_area_km2(posterior))


class Watched:
    """The tables of a run, and which of them are asked for."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.asked = tables, set[str]()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.tables, name)
        if name == "verdicts":
            self.asked |= {f"verdicts-{verifier}" for verifier in value}
        else:
            self.asked.add(name)
        return value


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_stage_names_the_tables_that_it_reads(variant: Variant, walked: tuple[RunFolder, Made]) -> None:
    run, made = walked
    files = made[variant.name]
    tables = run.tables(variant.options, files)
    for step in road(variant.options)[1:]:
        watched = Watched(tables)
        step.work(run.models, variant.options, watched)  # type: ignore[arg-type]
        read = {"pool" if name.startswith("pool") else name for name in step.reads}
        assert watched.asked <= read, step.name
    # Of the embeddings the decision reads which photos there are.
    assert watched.asked | {"embeddings"} == read
    # It is made again when a table that it reads changes: all of them are named.
    named = {entry["file"] for entry in read_json(run.folder / f"{files['predictions']}.json")["inputs"]}
    assert named == {f"{files[name]}.parquet" for name in step.reads}


def test_retrieval_variants_by_hand(run_folder: Path, geolocator: Geolocator) -> None:
    near: Neighbors = read(run_folder, "neighbors", Neighbors)
    np.testing.assert_array_equal(answers(run_folder, "nearest"), near.lat_lon[:, 0])
    weight = np.exp(geolocator.tuning.density_scale * near.scores.astype(float))
    kernel = np.exp(-0.5 * (pairwise_km(near.lat_lon) / geolocator.tuning.density_km) ** 2)
    best = np.einsum("bij,bj->bi", kernel, weight).argmax(axis=1)
    np.testing.assert_array_equal(answers(run_folder, "density"), near.lat_lon[np.arange(29), best])
    places: Places = read(run_folder, "places", Places)
    np.testing.assert_array_equal(answers(run_folder, "gps"), places.lat_lon[:, 0])
    matches: Places = read(run_folder, "matches", Places)
    best = matches.scores.argmax(axis=1)
    np.testing.assert_array_equal(answers(run_folder, "visual-best"), matches.lat_lon[np.arange(29), best])


def test_token_variants_choose_among_their_own_cells(run_folder: Path, geolocator: Geolocator) -> None:
    cells: Candidates = read(run_folder, "candidates", Candidates)
    lat, lon = geolocator.tokenizer.decode(cells.tokens.reshape(-1, cells.tokens.shape[-1]))
    places = np.stack([lat, lon], axis=-1).reshape(*cells.log_prob.shape, 2)
    np.testing.assert_allclose(cells.lat_lon, places)
    for variant, source in (("greedy", GREEDY), ("beam", BEAM), ("samples", SAMPLE)):
        found = answers(run_folder, f"tokens-{variant}")
        own = cells.source == source
        assert ((np.abs(places - found[:, None]).max(axis=-1) < 1e-9) & own).any(axis=1).all()
        if source != SAMPLE:
            best = np.where(own, cells.log_prob, -np.inf).argmax(axis=1)
            np.testing.assert_allclose(found, places[np.arange(29), best])
    table = read_table(run_folder / "predictions-tokens-frontier.parquet")
    assert set(table["source"].to_pylist()) == {"frontier", None}


def drawn_tables(photos: int = 60, around: tuple[float, float] | None = None) -> Tables:
    """Places of a few cells around one place a photo, all the same if given: what no two strategies see alike."""
    rng = np.random.default_rng(0)
    middle = np.column_stack([rng.uniform(-50, 60, photos), rng.uniform(-170, 170, photos)])[:, None]
    if around is not None:
        middle[:] = around
    # In most cells the first neighbor stands alone, the next two beside each other.
    lat_lon = middle + np.repeat(rng.normal(0, 0.6, (photos, 3, 2)), 3, axis=1)[:, :8]
    lat_lon += np.array([0.0, 0.05, 0.054] * 3)[:8, None]
    similar = -np.sort(-rng.uniform(0.7, 0.9, (photos, 8)))
    tables = Tables(Photos.of([b""] * photos, [str(i) for i in range(photos)]))
    tables.neighbors = Neighbors(np.zeros((photos, 8), np.int64), lat_lon, similar.astype(np.float32))
    cells = TOKENIZER.encode(*(middle + rng.normal(0, 0.8, (photos, 12, 2))).reshape(-1, 2).T)
    source = np.tile(np.array([GREEDY, *[BEAM] * 4, *[SAMPLE] * 7], np.int8), (photos, 1))
    log_prob = rng.uniform(-4, -1, source.shape).astype(np.float32)
    centers = np.stack(TOKENIZER.decode(cells), axis=-1).reshape(photos, 12, 2)
    tables.candidates = Candidates(cells.reshape(photos, 12, -1), log_prob, source, centers)
    mass = np.sort(rng.dirichlet(np.ones(12), photos).astype(np.float32))[:, ::-1]
    tables.posterior = Posterior(TOKENIZER.tokens_to_ids(tables.candidates.tokens), mass)
    near = middle + rng.normal(0, 0.7, (photos, 5, 2))
    tables.places = Places(near, -np.sort(-rng.uniform(0.2, 0.9, (photos, 5))).astype(np.float32))
    moved = middle + rng.normal(0, 0.7, (photos, 4, 2))
    tables.matches = Places(moved, rng.uniform(0, 1, (photos, 4)).astype(np.float32))
    return tables


def test_the_other_variants_are_the_strategies() -> None:
    tables = drawn_tables()
    tuning = replace(TUNING, gps_share=0.4, spread_km=60.0, visual_km=60.0, visual_spread_km=60.0)
    neighbors, candidates, places, matches = tables.neighbors, tables.candidates, tables.places, tables.matches
    extended = extend(make_pool(neighbors, candidates, TOKENIZER, tuning, places), matches, tuning)
    everything, pool = only(extended, *range(GPS + 1)), only(extended, *range(SAMPLE + 1))
    rng = np.random.default_rng(1)
    drawn = {
        name: rng.normal(0, 0.3, extended.mask.shape).astype(np.float32) for name in ("alignment", "reward", "visual")
    }
    moved = scored_pool(matches, tuning.match_scale, VISUAL)
    agreed = support(moved, matches, tuning.visual_km)

    def chosen(of: Pool, select: str = "bayes-risk", *names: str) -> Predictions:
        scores = {name: drawn[name] for name in names}
        return strategies.decide(of, Given(scores, tuning, neighbors, TOKENIZER), select)

    sampled = Candidates(*(values[:, candidates.source[0] == SAMPLE] for values in vars(candidates).values()))
    around = scored_pool(neighbors, tuning.density_scale, NEIGHBOR)
    expected = {
        "nearest": chosen(around, "log-probability"),
        "density": chosen(around, "density"),
        "gps": chosen(make_pool(None, None, TOKENIZER, tuning, places), "log-probability"),
        "tokens-samples": chosen(make_pool(None, sampled, TOKENIZER, tuning)),
        "tokens-frontier": chosen(posterior_pool(tables.posterior)),
        "pool-log-prob": chosen(pool, "log-probability"),
        "pool-medoid": chosen(pool, "medoid"),
        "pool-density": chosen(pool, "density"),
        "pool-mean-shift": chosen(pool, "mean-shift"),
        "pool-mbr-25": chosen(pool, "bayes-risk-25"),
        "pool-mbr-200": chosen(pool, "bayes-risk-200"),
        "pool": chosen(pool),
        "pool-similarity": chosen(pool, "highest", "alignment"),
        "pool-reward": chosen(pool, "highest", "reward"),
        "pool+reward": chosen(pool, "bayes-risk", "reward"),
        "pool+alignment": chosen(pool, "bayes-risk", "alignment"),
        "pool+alignment+reward": chosen(pool, "bayes-risk", "alignment", "reward"),
        "pool+alignment+snap": chosen(pool, "snap", "alignment"),
        "pool+gps": chosen(everything),
        "pool+gps+alignment": chosen(everything, "bayes-risk", "alignment"),
        "pool+gps+alignment+reward": chosen(everything, "bayes-risk", "alignment", "reward"),
        "visual-best": chosen(moved, "log-probability"),
        "visual-consensus": strategies.decide(moved, Given({"visual": agreed}, tuning)),
        "pool+gps+visual": chosen(extended, "bayes-risk", "visual"),
        "pool+gps+visual+alignment": chosen(extended, "bayes-risk", "visual", "alignment"),
    }
    assert set(NAMED) == {*expected, "tokens-greedy", "tokens-beam"}
    models: Any = SimpleNamespace(tuning=tuning, tokenizer=TOKENIZER)
    for name, wanted in expected.items():
        options = NAMED[name].options
        tables.pool = stages.pool(models, options, tables) if len(options.sources) == 1 else extended
        tables.verdicts = {verifier: Verdict(drawn[verifier], extended.mask) for verifier in options.verify}
        if options.sources == ("visual",):
            tables.verdicts = {verifier: Verdict(agreed, moved.mask) for verifier in options.verify}
        found = stages.decide(models, options, tables)
        for field in ("lat_lon", "confidence", "source"):
            np.testing.assert_allclose(getattr(found, field), getattr(wanted, field), atol=1e-9, err_msg=name)
    # No two variants do the same here, so a name cannot stand at another's decision.
    named = {wanted.lat_lon.tobytes(): name for name, wanted in expected.items()}
    assert set(named.values()) == set(expected)


def test_deciding_computes_nothing_that_the_tables_hold(
    copied: Path, run_folder: Path, geolocator: Geolocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in copied.glob("predictions*"):
        path.unlink()
    for name in ("embed", "search", "propose", "find_places", "believe", "match", "pool", "verdict"):
        monkeypatch.setattr(stages, name, lambda *_, name=name, **__: pytest.fail(f"{name} computed again"))
    opened: list[str] = []

    def counted(path: Path, columns: list[str] | None = None) -> Any:
        opened.extend([path.stem] * (columns is None))
        return read_table(path, columns)

    monkeypatch.setattr(walk, "read_table", counted)
    run = RunFolder(copied, geolocator)
    walk_variants(run, VARIANTS)
    assert len(opened) == len(set(opened)) and {"pool", "neighbors", "verdicts-alignment"} <= set(opened)
    assert {name for name in run.seconds if name not in run.reused} == {f"predictions-{name}" for name in NAMED}
    for name in NAMED:
        path = f"predictions-{name}.parquet"
        assert (copied / path).read_bytes() == (run_folder / path).read_bytes()


def test_a_lost_table_is_named(copied: Path, geolocator: Geolocator, one_line: OneLine) -> None:
    (copied / "verdicts-reward.parquet").unlink()
    with one_line(r"there is no .*verdicts-reward\.parquet: run the stage that writes it"):
        RunFolder(copied, geolocator).result("verdicts-reward", Verdict)


def test_the_oracle_is_the_best_place_that_a_variant_may_answer(walked: tuple[RunFolder, Made]) -> None:
    run, made = walked
    truth, good = run.photos.lat_lon, [i for i in range(30) if i != BROKEN]
    near: Neighbors = run.result("neighbors", Neighbors)
    best = oracle(run, NAMED["nearest"].options, made["nearest"])
    assert np.isnan(best[BROKEN])
    for b, i in enumerate(good):
        assert best[i] == pytest.approx(min(float(haversine_km(*truth[i], *place)) for place in near.lat_lon[b]))
    for name, variant in NAMED.items():
        best = oracle(run, variant.options, made[name])
        decided: Answers = run.result(made[name]["predictions"], Answers)
        km = haversine_km(*decided.true_lat_lon.T, *decided.lat_lon.T)
        assert np.isnan(km[BROKEN]) and np.isnan(best[BROKEN])
        if variant.options.select not in ("mean-shift", "snap"):  # which may leave the pool
            assert (km[good] >= best[good] - 1e-6).all()
    # Places that may not be the answer count for nothing, and only variants that compare pictures have moved ones.
    pool: Pool = run.result(made["pool"]["pool"], Pool)
    assert (pool.source[pool.mask] == GPS).any() and not (pool.source[pool.mask] == VISUAL).any()
    moved: Pool = run.result(made["pool+gps+visual"]["pool"], Pool)
    assert (moved.source[moved.mask] == VISUAL).any()
    allowed = pool.mask & np.isin(pool.source, (NEIGHBOR, GREEDY, BEAM, SAMPLE))
    away = haversine_km(truth[good, :1], truth[good, 1:], pool.lat_lon[..., 0], pool.lat_lon[..., 1])
    found = oracle(run, NAMED["pool"].options, made["pool"])[good]
    np.testing.assert_allclose(found, np.where(allowed, away, np.inf).min(axis=1))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_alone_decides_as_among_others(
    variant: Variant, walked: tuple[RunFolder, Made], geolocator: Geolocator, tmp_path: Path
) -> None:
    """Sharing tables with variants that need more of them changes no answer."""
    shutil.copy(walked[0].folder / "photos.parquet", tmp_path)
    alone = RunFolder(tmp_path, geolocator)
    one: Answers = alone.result(alone.walk(variant.options)["predictions"], Answers)
    other: Answers = walked[0].result(f"predictions-{variant.name}", Answers)
    for field in ("lat_lon", "confidence", "area_km2"):
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=1e-4, rtol=1e-4)
    good = alone.readable
    np.testing.assert_array_equal(one.source[good], other.source[good])
    assert one.errors == other.errors


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_within_a_region_no_variant_leaves_it(
    variant: Variant, run_folder: Path, geolocator: Geolocator, tmp_path: Path
) -> None:
    """Or it says the place nearest to it, where it has none inside."""
    lat, lon, km = within = (20.0, 20.0, 6000.0)
    shutil.copy(run_folder / "photos.parquet", tmp_path)
    run, options = RunFolder(tmp_path, geolocator), replace(variant.options, within=within)
    files = run.walk(options)
    decided: Answers = run.result(files["predictions"], Answers)[run.readable]
    away = haversine_km(decided.lat_lon[:, 0], decided.lat_lon[:, 1], lat, lon)
    unrestricted = chosen_pool(options, run.tables(options, files).pool)
    places = haversine_km(unrestricted.lat_lon[..., 0], unrestricted.lat_lon[..., 1], lat, lon)
    inside = ((places <= km) & unrestricted.mask).any(axis=1)
    assert inside.any() and (away[inside] <= km + 100).all()  # the middle of a cell at the border may lie beyond it


@pytest.mark.parametrize("source", ["frontier", "gps", "visual"])
def test_one_source_alone_stays_within_a_region(source: str) -> None:
    """These places are found anywhere, so the decision alone can keep to the region."""
    lat, lon, km = within = (10.0, 10.0, 60.0)
    tables, tuning = drawn_tables(around=(lat, lon)), replace(TUNING, gps_share=0.1)
    models: Any = SimpleNamespace(tuning=tuning, tokenizer=TOKENIZER)
    options = Options(sources=(source,), verify=(), select="log-probability")

    def away(given: Options) -> Floats:
        tables.pool = stages.pool(models, given, tables)
        found = stages.decide(models, given, tables)
        return haversine_km(found.lat_lon[:, 0], found.lat_lon[:, 1], lat, lon)

    pool = stages.pool(models, options, tables)
    inside = ((haversine_km(pool.lat_lon[..., 0], pool.lat_lon[..., 1], lat, lon) <= km) & pool.mask).any(axis=1)
    assert inside.any() and (away(options)[inside] > km).any()
    assert (away(replace(options, within=within))[inside] <= km).all()


# recipes


def recipe_of(*variants: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A small recipe: one split of ten photos unless more is given."""
    given = {"photos": {"test": "blue-marble:test,n=10"}, "gallery": "blue-marble:gallery,n=100", "options": SMALL}
    return {**given, "variants": list(variants), **more}


def test_lists_and_tables_are_crossed() -> None:
    sources = {"all": "neighbor+beam", "near": ["neighbor"]}
    recipe = read_variants(
        recipe_of(
            {"sources": sources, "verify": ["none", "visual+alignment"], "samples": [4, 5], "area": [True, False]},
            {"name": "by hand", "select": "medoid", "photos": ["test"], "neighbors": 9},
            options=SMALL | {"seed": 3},
        )
    )
    assert len(recipe.variants) == 2 * 2 * 2 * 2 + 1
    named = {variant.name: variant for variant in recipe.variants}
    assert list(named)[:2] == ["all none samples=4 area", "all none samples=4 no-area"]
    variant = named["near visual+alignment samples=5 no-area"]
    assert variant.splits == ()
    assert variant.options == Options(
        **SMALL | {"seed": 3, "samples": 5}, sources=("neighbor",), verify=("visual", "alignment")
    )
    by_hand = named["by hand"]
    assert by_hand.splits == ("test",) and by_hand.options == Options(
        **SMALL | {"seed": 3, "neighbors": 9}, select="medoid"
    )


def test_a_variant_knows_itself_without_verification() -> None:
    verified = Options(
        sources=("neighbor", "gps", "visual"), verify=("visual", "alignment"), select="highest", evidence=False
    )
    plain = Variant("one", verified).unverified
    assert plain == Options(sources=("neighbor", "gps"), verify=())
    assert Variant("none", plain).unverified == plain


TEN = "blue-marble:test,n=10"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key of the recipe": ({"variant": []}, "the recipe's variant does not fit: Extra inputs"),
    "unknown key of a variant": ({"variants": [{"neighborz": 3}]}, "a variant has no 'neighborz'"),
    "unknown common option": ({"options": {"neighborz": 3}}, "neighborz"),
    "same name twice": ({"variants": [{"name": "a"}, {"name": "a", "seed": 1}]}, "two variants are called a"),
    "one name for a crossing": ({"variants": [{"name": "a", "seed": [0, 1]}]}, "two variants are called a"),
    "no name": ({"variants": [{}, {}]}, "name"),
    "out of range": ({"variants": [{"neighbors": [5, 0]}]}, "neighbors 0 is out of range"),
    "not finite": ({"variants": [{"temperature": float("nan")}]}, "temperature nan is out of range"),
    "a word for a number": ({"variants": [{"beam_width": "ten"}]}, "does not fit"),
    "a number for a flag": ({"variants": [{"area": 1}]}, "does not fit"),
    "a word for a region": ({"variants": [{"within": "Rome"}]}, "give LAT,LON,KM"),
    "a number for a region": ({"variants": [{"within": 3}]}, "does not fit"),
    "a list for a region": ({"variants": [{"within": [47.0, 8.0, 300.0]}]}, "does not fit|LAT,LON,KM"),
    "an unknown strategy": ({"variants": [{"select": "guess"}]}, "select 'guess' is not known"),
    "a number for a strategy": ({"variants": [{"select": 3}]}, "does not fit|select 3"),
    "no values": ({"variants": [{"samples": []}]}, "samples|variants"),
    "a number for a name": ({"variants": [{"name": 3}]}, "name"),
    "a name that is a path": ({"variants": [{"name": "../a"}]}, "name"),
    "a shown value that is a path": ({"variants": [{"sources": {"../a": "neighbor"}}]}, "name"),
    "photos that are no list": ({"variants": [{"photos": "test"}]}, "photos"),
    "photos that are a number": ({"variants": [{"photos": 3}]}, "photos"),
    "photos of no split": ({"variants": [{"name": "a", "photos": ["unseen"]}]}, "unseen, which the recipe has not"),
    "a split that is a path": ({"photos": {"../test": TEN}}, r"\.\./test"),
    "a split in the index's place": ({"photos": {"index": TEN}}, "index"),
    "a split of no variant": ({"photos": {"test": TEN, "more": TEN}, "variants": [{"photos": ["test"], "seed": 1}]},
                              "more"),
    "an unknown best": ({"best": "b"}, "best = 'b' is none of the variants"),
    "unknown examples": ({"examples": "nice"}, "examples"),
    "a seed below zero": ({"seed": -1}, "seed"),
    "notes that are no words": ({"notes": [3]}, "notes"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_a_recipe_that_does_not_fit_is_one_line_before_any_work(
    wrong: str, weights: Path, tmp_path: Path, one_line: OneLine
) -> None:
    changes, words = BAD[wrong]
    with one_line(words):
        ablate(recipe_of({"name": "a"}) | changes, tmp_path / "out", pytest.fail, weights=weights)
    assert not (tmp_path / "out").exists()


def test_without_gallery_index_or_model_nothing_begins(weights: Path, tmp_path: Path, one_line: OneLine) -> None:
    asking = recipe_of({"verify": ["none", "mllm"]})
    with one_line("asks a multimodal model: give --mllm"):
        ablate(asking, tmp_path / "asking", pytest.fail, weights=weights)
    bare = recipe_of({"name": "a"})
    del bare["gallery"]
    with one_line("names no gallery: give --index DIR"):
        ablate(bare, tmp_path / "bare", pytest.fail, weights=weights)
    assert not list(tmp_path.rglob("*.parquet"))


# the engine


def tables_of(run: Path, stage: str) -> set[str]:
    """A stage's tables in a run's folder, without their predictions' labels."""
    return {path.stem for path in run.glob(f"{stage}*.parquet")}


def test_variants_share_every_table_that_they_have_in_common(geolocator: Geolocator, tmp_path: Path) -> None:
    write_test_photos(tmp_path, 12)
    variants = read_variants(
        recipe_of({"samples": [4, 6], "verify": ["none", "alignment", "visual+alignment"], "area": True})
    ).variants
    run = RunFolder(tmp_path, geolocator)
    made = walk_variants(run, variants)
    for stage in ("embeddings", "neighbors", "places", "posterior", "matches"):
        assert tables_of(tmp_path, stage) == {stage}
    # Pools with moved places and without are two.
    for stage, many in {"candidates": 2, "pool": 4, "verdicts-alignment": 4, "verdicts-visual": 2}.items():
        assert len(tables_of(tmp_path, stage)) == many and stage in tables_of(tmp_path, stage)
    assert tables_of(tmp_path, "predictions") == {f"predictions-{variant.name}" for variant in variants}
    assert len({files["candidates"] for files in made.values()}) == 2
    for variant in variants:
        cells: Candidates = run.result(made[variant.name]["candidates"], Candidates)
        assert (cells.source[0] == SAMPLE).sum() == variant.options.samples
    assert len(set(run.seconds)) == 5 + 12 + len(variants) and not run.reused


@pytest.fixture(scope="module")
def crossing() -> dict[str, Any]:
    """Pools with and without verification, on two splits, one variant on the first alone."""
    return recipe_of(
        {"sources": {"all": "neighbor+gps+greedy+beam+sample", "near": "neighbor+gps"}, "verify": ["none", "look"]},
        {"sources": {"all": "neighbor+gps+greedy+beam+sample+visual"}, "verify": "visual"},
        {"name": "alone", "sources": "neighbor", "verify": "alignment", "select": "density", "photos": ["test"]},
        photos={"test": "blue-marble:test,n=40", "relief": "blue-marble:relief,n=10"},
        examples="mended",
        seed=5,
    )


@pytest.fixture(scope="module")
def ablated(
    crossing: dict[str, Any], weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("ablated")
    return out, ablate(crossing, out, print, weights=weights)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_run_again_nothing_changes(
    ablated: tuple[Path, dict[str, Any]], crossing: dict[str, Any], weights: Path, tmp_path: Path
) -> None:
    out, metrics = ablated
    before = bytes_of(out)
    lines: list[object] = []
    assert ablate(crossing, out, lines.append, weights=weights) == json.loads(json.dumps(metrics))
    assert bytes_of(out) == before and {"metrics.json", "predictions.parquet", "report.html"} <= before.keys()
    made = [p for split in ("test", "relief") for p in (out / split).glob("*.parquet") if p.stem != "photos"]
    assert lines == [f"{len(made)} tables reused, as an earlier run left them"]
    # Somewhere else it comes to the same.
    again = ablate(crossing, tmp_path, print, weights=weights)
    for row, other in zip(metrics["variants"], again["variants"], strict=True):
        timeless = {name: value for name, value in row.items() if name != "cost"}
        assert timeless == {name: value for name, value in other.items() if name != "cost"}
    assert (tmp_path / "predictions.parquet").read_bytes() == before["predictions.parquet"]


def test_tables_of_a_version_that_noted_no_seconds_count_none(weights: Path, tmp_path: Path) -> None:
    recipe = recipe_of({"name": "near", "sources": "neighbor", "verify": "none"})
    first = ablate(recipe, tmp_path, print, weights=weights)
    for path in (tmp_path / "index" / "stages" / "photos.json", tmp_path / "test" / "neighbors.json"):
        manifest = read_json(path)
        del manifest["seconds"]
        write_json(path, manifest)
    (tmp_path / "report.html").unlink()
    again = ablate(recipe, tmp_path, print, weights=weights)
    assert again["stages"].keys() == first["stages"].keys() and again["stages"]["test: neighbors"] == 0
    # With an index of one's own, the one that was made here before is no part of the work.
    (tmp_path / "report.html").unlink()
    other = ablate(recipe, tmp_path, print, index=tmp_path / "index", weights=weights)
    assert not [name for name in other["stages"] if name.startswith("index")]


def test_a_region_is_found_once_for_all_blocks(
    geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "BLOCK", 3)
    write_test_photos(tmp_path, 12)
    asked, mask = list[object](), GeoIndex.mask
    monkeypatch.setattr(GeoIndex, "mask", lambda self, *w, **how: asked.append(w) or mask(self, *w, **how))
    models = geolocator.replace()
    models._regions = {}
    RunFolder(tmp_path, models).walk(Options(within=(47, 8, 3000), propose=(), gps_places=0, verify=()))
    assert len(asked) == 1


def test_a_lost_page_or_another_recipe_is_made_anew(
    ablated: tuple[Path, dict[str, Any]], crossing: dict[str, Any], weights: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(ablated[0], tmp_path / "out"))
    before = bytes_of(out)
    (out / "report.html").unlink()
    (out / "predictions.parquet").unlink()
    ablate(crossing, out, print, weights=weights)
    assert bytes_of(out) == before
    fewer = crossing | {"variants": crossing["variants"][:1], "seed": 6}
    metrics = ablate(fewer, out, print, weights=weights)
    assert {row["name"] for row in metrics["variants"]} == {"all none", "all look", "near none", "near look",
                                                            "oracle-6"}  # fmt: skip
    assert metrics["seed"] == 6 and read_json(out / "metrics.json") == json.loads(json.dumps(metrics))


def test_rows_by_hand(ablated: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = ablated
    rows = {(row["split"], row["name"]): row for row in metrics["variants"]}
    names = ["all none", "all look", "near none", "near look", "all visual"]
    assert list(rows) == [
        *(("test", name) for name in (*names, "alone", "oracle-6")),
        *(("relief", name) for name in (*names, "oracle-6")),
    ]

    def km(split: str, name: str) -> Floats:
        found: Answers = read(out / split, f"predictions-{name}", Answers)
        return haversine_km(*found.true_lat_lon.T, *found.lat_lon.T)

    for (split, name), row in rows.items():
        if name == "oracle-6":
            near: Neighbors = read(out / split, "neighbors", Neighbors)
            truth = read_table(out / split / "photos.parquet", ["lat", "lon"]).to_pandas().to_numpy()
            away = haversine_km(truth[:, :1], truth[:, 1:], *np.moveaxis(near.lat_lon, 2, 0)).min(axis=1)
            assert not {"gain", "oracle", "cost"} & row.keys()
        else:
            away = km(split, name)
            assert all(row["oracle"][r] >= row["acc"][r] for r in row["acc"])
        assert row["n"] == len(away) == (40 if split == "test" else 10)
        assert row["acc"] == {str(r): pytest.approx(100 * (away <= r).mean(), abs=1e-4) for r in RADII_KM}
        assert row["median_km"] == pytest.approx(np.median(away), abs=1e-3)
        verified = name not in ("all none", "near none", "oracle-6")
        assert ("cost" in row) == verified
        base = {"all look": "all none", "near look": "near none", "all visual": "all none"}.get(name)
        assert ("gain" in row) == (base is not None)
        if base is None:
            continue
        was = km(split, base)
        for r in RADII_KM:
            gain = 100 * ((away <= r).mean() - (was <= r).mean())
            low, high = row["gain_ci95"][str(r)]
            assert row["gain"][str(r)] == pytest.approx(gain, abs=1e-3) and low - 1e-3 <= gain <= high + 1e-3
        assert row["mended"] == ((away <= 200) & (was > 200)).sum()
        assert row["broken"] == ((away > 200) & (was <= 200)).sum()
        gap = row["oracle"]["200"] - 100 * (was <= 200).mean()
        closed = None if gap <= 0 else pytest.approx(row["gain"]["200"] / gap, abs=1e-3)
        assert row["gap_closed"] == closed
    assert rows["test", "oracle-6"]["acc"]["2500"] >= rows["test", "alone"]["acc"]["2500"]
    # Photos with the answers of the variant that is best by the sum of its shares.
    methods = {name: sum(rows["test", name]["acc"].values()) for name in (*names, "alone")}
    assert methods[metrics["best"]] == max(methods.values())
    best = out / "test" / f"predictions-{metrics['best']}.parquet"
    assert (out / "predictions.parquet").read_bytes() == best.read_bytes()


def test_cost_is_the_time_of_the_verification_alone(ablated: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = ablated
    verifying = ("matches", "verdicts-look", "verdicts-visual")
    seconds = {name: read_json(out / "test" / f"{name}.json")["seconds"] for name in verifying}
    rows = {row["name"]: row for row in metrics["variants"] if row["split"] == "test"}
    visual = seconds["matches"] + seconds["verdicts-visual"]
    assert rows["all visual"]["cost"] == {"seconds": pytest.approx(visual / 40, abs=1e-4)}
    assert rows["all look"]["cost"] == {"seconds": pytest.approx(seconds["verdicts-look"] / 40, abs=1e-4)}
    assert metrics["seconds"] == pytest.approx(sum(metrics["stages"].values()), abs=0.06)


def test_an_index_of_ones_own_is_used_and_left_as_it_is(
    index_folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(index_folder)
    recipe = recipe_of({"name": "near", "sources": "neighbor", "verify": "none"})
    del recipe["gallery"]
    ablate(recipe, tmp_path / "python", print, index=index_folder, weights=weights)
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'gallery = "nothing:there"\n[options]\nneighbors = 6\nbeam_width = 4\nsamples = 6\nopenings = 8\n'
        '[photos]\ntest = "blue-marble:test,n=99"\n'
        '[[variants]]\nname = "near"\nsources = "neighbor"\nverify = "none"\n'
    )
    command = ["ablate", mine, "--out", tmp_path / "line", "--photos", "blue-marble:test,n=10"]
    capsys.readouterr()
    assert call(*command, "--index", index_folder, "--weights", weights) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["photos", "near", "10"] for line in shown)
    assert any(line.split()[:2] == ["photos", "oracle-6"] for line in shown)
    rows = read_table(index_folder / "rows.parquet")
    lat_lon = np.stack([rows["lat"].to_numpy(), rows["lon"].to_numpy()], axis=-1)
    for out, split in (("python", "test"), ("line", "photos")):
        assert not (tmp_path / out / "index").exists()
        near: Neighbors = read(tmp_path / out / split, "neighbors", Neighbors)
        np.testing.assert_allclose(near.lat_lon, lat_lon[near.rows])
    one, other = (tmp_path / out / "predictions.parquet" for out in ("python", "line"))
    assert one.read_bytes() == other.read_bytes()
    assert bytes_of(index_folder) == before


def test_an_index_of_another_encoder_is_refused(
    index_folder: Path, weights: Path, tmp_path: Path, one_line: OneLine
) -> None:
    other = Path(shutil.copytree(index_folder, tmp_path / "other"))
    manifest = read_json(other / "manifest.json")
    (other / "manifest.json").write_text(json.dumps(manifest | {"encoder": "somebody-else"}))
    with one_line("encoder"):
        ablate(recipe_of({"name": "a"}), tmp_path / "out", pytest.fail, index=other, weights=weights)


def test_one_photo_and_one_that_is_no_picture(weights: Path, tmp_path: Path, index_folder: Path) -> None:
    """The smallest run of all has its figures, and an unreadable photo counts as wrong."""
    blocks = {"verify": ["none", "alignment"]}

    def rows_of(source: str) -> list[dict[str, Any]]:
        recipe = recipe_of(blocks, photos={"test": source})
        metrics = ablate(recipe, tmp_path / source[:4], print, index=index_folder, weights=weights)
        rows: list[dict[str, Any]] = metrics["variants"]
        return rows

    assert {row["n"] for row in rows_of("blue-marble:test,n=1")} == {1}
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "text.png").write_text("this is no picture")
    Image.new("RGB", (64, 64), "teal").save(folder / "good.png")
    (folder / "photos.csv").write_text("file,lat,lon\ntext.png,1,2\ngood.png,3,4\n")
    assert all(row["n"] == 2 and row["acc"]["2500"] <= 50 for row in rows_of(f"folder:{folder}"))
