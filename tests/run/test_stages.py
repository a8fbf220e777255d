"""Stages on disk: every table holds what the arrays say, and read back they are the arrays again."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny import OPTIONS, OneLine, write_test_photos

from rag_geotoken.decision.strategies import Given, decide
from rag_geotoken.geo.cells import cell_level, parent_ids
from rag_geotoken.options import Options
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run import resumable, stages
from rag_geotoken.run.road import road
from rag_geotoken.run.walk import RunFolder
from rag_geotoken.storage.files import read_json
from rag_geotoken.storage.parquet import read_table, write_table
from rag_geotoken.storage.weights import fingerprint
from rag_geotoken.tokens.posterior import effective_area_km2
from rag_geotoken.types import (
    RADII_KM,
    SOURCES,
    Answers,
    Candidates,
    Embeddings,
    Pool,
    Posterior,
    Tables,
    Verdict,
)
from rag_geotoken.verifiers import load_verifier

PHOTOS, BROKEN = 30, 2
EVERY = replace(OPTIONS, verify=("alignment", "look", "reward", "visual"), area=True)


@pytest.fixture
def copy(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture(scope="module")
def folder(run_folder: Path, geolocator: Geolocator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run with every verifier that is no multimodal model. Not to be changed."""
    folder = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("every") / "run"))
    run = RunFolder(folder, geolocator)
    run.walk(EVERY)
    made = {
        "pool",
        "verdicts-alignment",
        "verdicts-look",
        "verdicts-reward",
        "predictions-alignment+look+reward+visual",
    }
    assert set(run.seconds) - set(run.reused) == made  # that run's pool by this name has no moved places
    return folder


@pytest.fixture(scope="module")
def tables(folder: Path, geolocator: Geolocator) -> Tables:
    """What the stages' tables hold, of the readable photos."""
    return RunFolder(folder, geolocator).tables(EVERY, {stage.name: stage.name for stage in road(EVERY)})


def readable(folder: Path) -> list[str]:
    table = read_table(folder / "embeddings.parquet", ["id", "error"])
    names: list[str] = table.filter(table["error"].is_null())["id"].to_pylist()
    return names


def by_photo(folder: Path, table: str) -> list[list[dict[str, Any]]]:
    """A table's rows, a list for each readable photo in order."""
    ids = readable(folder)
    rows = read_table(folder / f"{table}.parquet").to_pylist()
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), key=ids.index)
    return [[row for row in rows if row["id"] == name] for name in ids]


def test_a_broken_picture_is_missing_between_and_stands_again_at_the_end(run_folder: Path, tables: Tables) -> None:
    photos, embeddings = (read_table(run_folder / f"{name}.parquet") for name in ("photos", "embeddings"))
    broken = photos["id"][BROKEN].as_py()
    errors = embeddings["error"].to_pylist()
    assert "missing.png" in errors.pop(BROKEN) and set(errors) == {None}
    whole, ids = Embeddings.from_table(embeddings), readable(run_folder)
    assert whole.vectors.shape[0] == len(whole.digests) == PHOTOS and not whole.vectors[BROKEN].any()
    assert np.flatnonzero(~whole.readable).tolist() == [BROKEN]
    assert ids == tables.photos.ids and len(ids) == len(tables.embeddings.vectors) == PHOTOS - 1 and broken not in ids
    np.testing.assert_array_equal(tables.embeddings.vectors, np.delete(whole.vectors, BROKEN, axis=0))
    for name in ("neighbors", "candidates", "posterior", "pool", "verdicts-alignment", "verdicts-reward"):
        assert set(read_table(run_folder / f"{name}.parquet", ["id"])["id"].to_pylist()) == set(ids)
    for path in run_folder.glob("predictions-*.parquet"):
        table = read_table(path)
        assert table["id"].equals(photos["id"])
        row = table.to_pylist()[BROKEN]
        assert "missing.png" in row["error"] and row["verified"] is False
        assert {row[name] for name in ("lat", "lon", "source", "confidence_25", "area_km2")} == {None}


def test_neighbors_and_candidates_come_back_as_arrays(run_folder: Path, tables: Tables, geolocator: Geolocator) -> None:
    neighbors, candidates = tables.neighbors, tables.candidates
    assert neighbors.rows.shape == (PHOTOS - 1, 6) and candidates.log_prob.shape == (PHOTOS - 1, 1 + 4 + 6)
    for b, (near, cells) in enumerate(
        zip(by_photo(run_folder, "neighbors"), by_photo(run_folder, "candidates"), strict=True)
    ):
        assert [row["rank"] for row in near] == list(range(1, 7))
        assert [row["row"] for row in near] == neighbors.rows[b].tolist()
        assert [[row["lat"], row["lon"]] for row in near] == neighbors.lat_lon[b].tolist()
        np.testing.assert_array_equal([row["score"] for row in near], neighbors.scores[b])
        assert [row["tokens"] for row in cells] == candidates.tokens[b].tolist()
        np.testing.assert_array_equal([row["log_prob"] for row in cells], candidates.log_prob[b])
        assert [row["source"] for row in cells] == [SOURCES[s] for s in candidates.source[b]]
        centers = np.column_stack(geolocator.tokenizer.decode(candidates.tokens[b]))
        np.testing.assert_allclose([[row["lat"], row["lon"]] for row in cells], centers)
        np.testing.assert_array_equal([[row["lat"], row["lon"]] for row in cells], candidates.lat_lon[b])


def test_places_and_matches_come_back_as_arrays(run_folder: Path, tables: Tables, geolocator: Geolocator) -> None:
    for name, found, count in (("places", tables.places, OPTIONS.gps_places), ("matches", tables.matches, 6)):
        assert found.scores.shape == (PHOTOS - 1, count) and found.scores.dtype == np.float32
        for b, rows in enumerate(by_photo(run_folder, name)):
            assert [row["rank"] for row in rows] == list(range(1, count + 1))
            assert [[row["lat"], row["lon"]] for row in rows] == found.lat_lon[b].tolist()
            np.testing.assert_array_equal([row["score"] for row in rows], found.scores[b])
    made = stages.find_places(geolocator, OPTIONS, tables)
    np.testing.assert_array_equal(made.lat_lon, tables.places.lat_lon)
    moved = stages.match(geolocator, OPTIONS, tables)
    np.testing.assert_allclose(moved.lat_lon, tables.matches.lat_lon, atol=1e-4)


def test_a_photos_candidates_do_not_depend_on_the_photos_around_it(
    run_folder: Path, tables: Tables, geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "BLOCK", 4)
    write_table(tmp_path / "photos.parquet", read_table(run_folder / "photos.parquet").slice(5, 11))
    run = RunFolder(tmp_path, geolocator)
    files = run.walk(OPTIONS, until="candidates")
    assert list(files) == ["photos", "embeddings", "neighbors", "candidates"]
    few, many = run.result("candidates", Candidates), tables.candidates
    np.testing.assert_array_equal(few.tokens, many[4:15].tokens)
    np.testing.assert_allclose(few.log_prob, many[4:15].log_prob, atol=1e-4)


def test_the_posterior_is_a_table_of_cells(run_folder: Path, tables: Tables, geolocator: Geolocator) -> None:
    found, back = stages.believe(geolocator, OPTIONS, tables), tables.posterior
    for b, rows in enumerate(by_photo(run_folder, "posterior")):
        cells, mass = np.array([row["cell"] for row in rows], np.uint64), [row["mass"] for row in rows]
        assert sum(mass) == pytest.approx(1, abs=1e-5) and min(mass) > 0 and mass == sorted(mass, reverse=True)
        expected = found.mass[b] > 0
        np.testing.assert_array_equal(cells, found.cells[b][expected])
        np.testing.assert_array_equal(np.array(mass, np.float32), found.mass[b][expected])
        # Disjoint: none is another's parent.
        for level in np.unique(cell_level(cells)):
            deeper = cells[cell_level(cells) > level]
            assert not np.isin(parent_ids(deeper, level), cells).any()
        np.testing.assert_array_equal(back.cells[b][: len(rows)], cells)
        np.testing.assert_array_equal(back.mass[b][: len(rows)], found.mass[b][expected])
        assert (back.mass[b][len(rows) :] == 0).all()
    np.testing.assert_allclose(effective_area_km2(back), effective_area_km2(found), rtol=1e-5)


def test_photos_of_different_numbers_of_cells_and_entries_come_back(tmp_path: Path) -> None:
    names, cells = ["a", "b", "b", "b", "c", "c"], [5 << 60, 3 << 60, 1 << 60, 7 << 60, 9 << 60, 11 << 60]
    mass = [1.0, 0.5, 0.25, 0.25, 0.75, 0.25]
    table = pa.table({"id": names, "cell": np.array(cells, np.uint64), "mass": np.array(mass, np.float32)})
    write_table(tmp_path / "posterior.parquet", table)
    found = Posterior.from_table(read_table(tmp_path / "posterior.parquet"))
    assert found.mass.tolist() == [[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.75, 0.25, 0.0]]
    assert [found.cells[1].tolist(), found.cells[2, :2].tolist()] == [cells[1:4], cells[4:]]
    assert np.isfinite(effective_area_km2(found)).all()
    places = {"lat": np.arange(6.0), "lon": np.arange(6.0) * 10, "log_weight": np.log(np.array(mass, np.float32))}
    write_table(tmp_path / "pool.parquet", pa.table({"id": names} | places | {"source": ["beam"] * 5 + ["neighbor"]}))
    pool = Pool.from_table(read_table(tmp_path / "pool.parquet"))
    assert pool.mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert pool.lat_lon[1].tolist() == [[1, 10], [2, 20], [3, 30]] and pool.lat_lon[2, 1].tolist() == [5, 50]
    assert (pool.log_weight[~pool.mask] == -np.inf).all() and SOURCES[pool.source[2, 1]] == "neighbor"
    scores = pa.array([[1.0], [2.0, 3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32()))
    write_table(tmp_path / "verdicts-reward.parquet", pa.table({"scores": scores}))
    verdict = Verdict.from_table(read_table(tmp_path / "verdicts-reward.parquet"))
    assert verdict.over(pool.mask).tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]


def test_the_pool_and_its_verdicts_come_back_as_arrays(folder: Path, tables: Tables, geolocator: Geolocator) -> None:
    pool, made = tables.pool, stages.pool(geolocator, EVERY, tables)
    for b in range(PHOTOS - 1):
        for name in ("lat_lon", "log_weight", "source"):
            np.testing.assert_array_equal(getattr(pool, name)[b][pool.mask[b]], getattr(made, name)[b][made.mask[b]])
    for verifier in EVERY.verify:
        scores = tables.verdicts[verifier].over(pool.mask)
        again = load_verifier(verifier).scores(geolocator, EVERY, tables, pool)
        np.testing.assert_allclose(scores, again.scores, atol=1e-5)
        for b, rows in enumerate(by_photo(folder, f"verdicts-{verifier}")):
            assert [row["status"] for row in rows] == ["ok"]
            assert rows[0]["scores"] == scores[b][pool.mask[b]].tolist()


def test_the_manifests_name_weights_and_settings(run_folder: Path, geolocator: Geolocator) -> None:
    assert geolocator.reward is not None
    recipes = {
        name: read_json(run_folder / f"{name}.json")["recipe"]
        for name in ("candidates", "posterior", "verdicts-alignment", "verdicts-reward", "predictions-pool")
    }
    tokens = fingerprint(geolocator.tokens)
    assert recipes["candidates"]["tokens"] == recipes["posterior"]["tokens"] == tokens
    assert recipes["verdicts-reward"]["reward"] == fingerprint(geolocator.tokens, geolocator.reward)
    assert recipes["verdicts-alignment"]["encoder"] == geolocator.alignment.identity
    assert {name: recipes["candidates"][name] for name in ("top_p", "epsilon", "within", "samples")} == {
        name: asdict(OPTIONS)[name] for name in ("top_p", "epsilon", "within", "samples")
    }
    assert recipes["predictions-pool"]["max_area_km2"] is None


# the decision


def test_a_decision_is_a_row_a_photo(copy: Path, geolocator: Geolocator) -> None:
    run, options = RunFolder(copy, geolocator), replace(OPTIONS, verify=())
    files = run.walk(options, label="mine")
    assert files["predictions"] == "predictions-mine"
    decision = decide(run.tables(options, files).pool, Given({}, geolocator.tuning))
    path = copy / "predictions-mine.parquet"
    rows, photos = read_table(path).to_pylist(), read_table(copy / "photos.parquet").to_pylist()
    good = [i for i in range(PHOTOS) if i != BROKEN]
    for i, photo in enumerate(photos):
        assert (rows[i]["id"], rows[i]["true_lat"], rows[i]["true_lon"]) == (photo["id"], photo["lat"], photo["lon"])
    for b, i in enumerate(good):
        assert [rows[i]["lat"], rows[i]["lon"]] == decision.lat_lon[b].tolist()
        assert [rows[i][f"confidence_{r}"] for r in RADII_KM] == decision.confidence[b].tolist()
        assert rows[i]["source"] == SOURCES[decision.source[b]] and rows[i]["error"] is None
        assert rows[i]["area_km2"] is None and rows[i]["verified"] is False
    found: Answers = run.result("predictions-mine", Answers)
    np.testing.assert_array_equal(found.lat_lon[good], decision.lat_lon)
    np.testing.assert_array_equal(found.confidence[good], decision.confidence)
    np.testing.assert_array_equal(found.source[good], decision.source)
    np.testing.assert_array_equal(found.true_lat_lon, run.photos.lat_lon)
    assert np.isnan(found.lat_lon[BROKEN]).all() and np.isnan(found.confidence[BROKEN]).all()
    assert np.isfinite(found.true_lat_lon).all() and found.ids == run.photos.ids and found.errors == run.errors


def test_a_decision_that_is_there_is_not_made_again(
    copy: Path, geolocator: Geolocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, decided = [], stages.decide

    def count(*given: Any) -> Answers:
        made.append(1)
        return decided(*given)

    monkeypatch.setattr(stages, "decide", count)
    for label in ("mine", "mine", "other"):
        RunFolder(copy, geolocator).walk(replace(OPTIONS, verify=()), label=label)
    assert len(made) == 2


def test_a_photo_whose_posterior_is_too_wide_gets_no_answer(copy: Path, tables: Tables, geolocator: Geolocator) -> None:
    area = effective_area_km2(tables.posterior)
    most = float(np.sort(area)[10])  # eleven photos keep their answer, one of them by a hair
    path, wide = copy / "predictions-mine.parquet", replace(OPTIONS, max_area_km2=most)
    run = RunFolder(copy, geolocator)
    pool = run.tables(wide, run.walk(wide, label="mine")).pool
    aligned = load_verifier("alignment").scores(geolocator, wide, tables, pool).scores
    decision = decide(pool, Given({"alignment": aligned}, geolocator.tuning))
    rows = read_table(path).to_pylist()
    assert len(rows) == PHOTOS
    assert "missing.png" in rows.pop(BROKEN)["error"]
    for b, row in enumerate(rows):
        assert row["area_km2"] == pytest.approx(area[b])
        if area[b] > most:
            assert row["error"] == f"abstained: the posterior is spread over more than {most:g} km2"
            empty = ("lat", "lon", "source", *(f"confidence_{r}" for r in RADII_KM))
            assert {row[name] for name in empty} == {None} and row["verified"] is False
        else:
            assert [row["lat"], row["lon"]] == decision.lat_lon[b].tolist()
            assert row["error"] is None and row["verified"] is True
    assert sum(row["error"] is None for row in rows) == 11
    # The same with another limit is another decision; without one, all have an answer and their area.
    for limit, answered in ((0.0, 0), (None, PHOTOS - 1), (1e9, PHOTOS - 1)):
        RunFolder(copy, geolocator).walk(replace(OPTIONS, area=True, max_area_km2=limit), label="mine")
        table = read_table(path)
        assert table["lat"].null_count == table["source"].null_count == PHOTOS - answered
        assert table["area_km2"].null_count == 1


def test_a_photo_that_is_too_unsure_gets_no_answer(copy: Path, geolocator: Geolocator) -> None:
    run, within = RunFolder(copy, geolocator), RADII_KM.index(200)
    run.walk(OPTIONS, label="all")
    free: Answers = run.result("predictions-all", Answers)
    least = float(np.nanmedian(free.confidence[:, within]))
    run.walk(replace(OPTIONS, least_confidence=least), label="sure")
    sure: Answers = run.result("predictions-sure", Answers)
    unsure = free.confidence[:, within] < least
    assert 0 < unsure.sum() < PHOTOS - 1
    for i, error in enumerate(sure.errors):
        if unsure[i]:
            assert error == f"abstained: the chance to be within 200 km is below {least:g}"
            assert np.isnan(sure.lat_lon[i]).all() and not sure.verified[i]
        else:
            assert error == free.errors[i]
            np.testing.assert_array_equal(sure.lat_lon[i], free.lat_lon[i])


def test_a_run_without_a_readable_picture(tmp_path: Path, geolocator: Geolocator, one_line: OneLine) -> None:
    write_test_photos(tmp_path, 3)
    table = read_table(tmp_path / "photos.parquet").slice(BROKEN)
    write_table(tmp_path / "photos.parquet", table)
    with one_line("none of the 1 pictures can be read; the first: .*missing.png"):
        RunFolder(tmp_path, geolocator).walk(OPTIONS)


@pytest.mark.parametrize("verifier", ["nobody", "reward"])
def test_a_verifier_that_is_not_there_leaves_no_table(
    verifier: str, copy: Path, geolocator: Geolocator, one_line: OneLine
) -> None:
    for path in copy.glob(f"*verdicts-{verifier}*"):
        path.unlink()
    parts = (geolocator.alignment, geolocator.tokens, geolocator.index, geolocator.tuning)
    with one_line("verify 'nobody' is not known: choose of alignment|these weights have no reward head"):
        RunFolder(copy, Geolocator(*parts)).walk(Options(**asdict(OPTIONS) | {"verify": (verifier,)}))
    assert not list(copy.glob(f"*verdicts-{verifier}*.parquet"))
