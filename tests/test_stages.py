"""Stages on disk: every table holds what the arrays say, and read back they are the arrays again."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import OPTIONS, OneLine, write_test_photos
from rag_geotoken.run.tables import (
    read_candidates,
    read_embeddings,
    read_matches,
    read_neighbors,
    read_places,
    read_pool,
    read_posterior,
    read_predictions,
    read_verdicts,
)

from rag_geotoken.cells import cell_level, parent_ids
from rag_geotoken.decision.strategies import decide
from rag_geotoken.files import read_json
from rag_geotoken.options import VERIFIERS
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.posterior import effective_area_km2
from rag_geotoken.run import retrieval, stages
from rag_geotoken.tables import read_table, write_table
from rag_geotoken.types import RADII_KM, SOURCES, Predictions
from rag_geotoken.weights import fingerprint

PHOTOS, BROKEN = 30, 2


@pytest.fixture
def copy(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def by_photo(folder: Path, table: str) -> list[list[dict[str, Any]]]:
    """A table's rows, a list for each readable photo in order."""
    ids, _, _ = read_embeddings(folder)
    rows = read_table(folder / f"{table}.parquet").to_pylist()
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), key=ids.index)
    return [[row for row in rows if row["id"] == name] for name in ids]


def test_a_broken_picture_is_missing_between_and_stands_again_at_the_end(run_folder: Path) -> None:
    photos, embeddings = (read_table(run_folder / f"{name}.parquet") for name in ("photos", "embeddings"))
    broken = photos["id"][BROKEN].as_py()
    errors = embeddings["error"].to_pylist()
    assert "missing.png" in errors.pop(BROKEN) and set(errors) == {None}
    ids, vectors, digests = read_embeddings(run_folder)
    assert len(ids) == len(vectors) == len(digests) == PHOTOS - 1 and broken not in ids
    for name in ("neighbours", "candidates", "posterior", "pool", "verdicts-alignment", "verdicts-reward"):
        assert set(read_table(run_folder / f"{name}.parquet", ["id"])["id"].to_pylist()) == set(ids)
    for path in run_folder.glob("predictions-*.parquet"):
        table = read_table(path)
        assert table["id"].equals(photos["id"])
        row = table.to_pylist()[BROKEN]
        assert "missing.png" in row["error"] and row["verified"] is False
        assert {row[name] for name in ("lat", "lon", "source", "confidence_25", "area_km2")} == {None}


def test_neighbours_and_candidates_come_back_as_arrays(run_folder: Path, geolocator: Geolocator) -> None:
    neighbors, candidates = read_neighbors(run_folder), read_candidates(run_folder)
    assert neighbors.rows.shape == (PHOTOS - 1, 6) and candidates.log_prob.shape == (PHOTOS - 1, 1 + 4 + 6)
    for b, (near, cells) in enumerate(
        zip(by_photo(run_folder, "neighbours"), by_photo(run_folder, "candidates"), strict=True)
    ):
        assert [row["rank"] for row in near] == list(range(1, 7))
        assert [row["row"] for row in near] == neighbors.rows[b].tolist()
        assert [[row["lat"], row["lon"]] for row in near] == neighbors.lat_lon[b].tolist()
        np.testing.assert_array_equal([row["score"] for row in near], neighbors.scores[b])
        assert [row["tokens"] for row in cells] == candidates.tokens[b].tolist()
        np.testing.assert_array_equal([row["log_prob"] for row in cells], candidates.log_prob[b])
        assert [row["source"] for row in cells] == [SOURCES[s] for s in candidates.source[b]]
        centres = np.column_stack(geolocator.tokenizer.decode(candidates.tokens[b]))
        np.testing.assert_allclose([[row["lat"], row["lon"]] for row in cells], centres)


def test_a_photos_candidates_do_not_depend_on_the_photos_around_it(
    run_folder: Path, geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "BLOCK", 4)
    write_table(tmp_path / "photos.parquet", read_table(run_folder / "photos.parquet").slice(5, 11))
    retrieval.encode(tmp_path, geolocator.alignment)
    retrieval.search(tmp_path, geolocator.index, OPTIONS.neighbors, geolocator.tuning.search_weights)
    stages.propose(tmp_path, geolocator, OPTIONS)
    few, many = read_candidates(tmp_path), read_candidates(run_folder)
    np.testing.assert_array_equal(few.tokens, many[4:15].tokens)
    np.testing.assert_allclose(few.log_prob, many[4:15].log_prob, atol=1e-4)


def test_the_posterior_is_a_table_of_cells(run_folder: Path, geolocator: Geolocator) -> None:
    _, photo, _ = read_embeddings(run_folder)
    found = geolocator.posterior(photo, read_neighbors(run_folder), OPTIONS)
    back = read_posterior(run_folder)
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
    found = read_posterior(tmp_path)
    assert found.mass.tolist() == [[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.75, 0.25, 0.0]]
    assert [found.cells[1].tolist(), found.cells[2, :2].tolist()] == [cells[1:4], cells[4:]]
    assert np.isfinite(effective_area_km2(found)).all()
    places = {"lat": np.arange(6.0), "lon": np.arange(6.0) * 10, "log_weight": np.log(np.array(mass, np.float32))}
    write_table(tmp_path / "pool.parquet", pa.table({"id": names} | places | {"source": ["beam"] * 5 + ["neighbour"]}))
    pool = read_pool(tmp_path)
    assert pool.mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert pool.lat_lon[1].tolist() == [[1, 10], [2, 20], [3, 30]] and pool.lat_lon[2, 1].tolist() == [5, 50]
    assert (pool.log_weight[~pool.mask] == -np.inf).all() and SOURCES[pool.source[2, 1]] == "neighbour"
    scores = pa.array([[1.0], [2.0, 3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32()))
    write_table(tmp_path / "verdicts-reward.parquet", pa.table({"scores": scores}))
    assert read_verdicts(tmp_path, pool, "reward").tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]


def test_the_pool_and_its_verdicts_come_back_as_arrays(run_folder: Path, geolocator: Geolocator) -> None:
    _, photo, _ = read_embeddings(run_folder)
    neighbors, pool = read_neighbors(run_folder), read_pool(run_folder)
    matches = read_matches(run_folder)
    made = geolocator.pool(neighbors, read_candidates(run_folder), read_places(run_folder), matches=matches)
    for b in range(PHOTOS - 1):
        for name in ("lat_lon", "log_weight", "source"):
            np.testing.assert_array_equal(getattr(pool, name)[b][pool.mask[b]], getattr(made, name)[b][made.mask[b]])
    for verifier in VERIFIERS:
        scores = read_verdicts(run_folder, pool, verifier)
        np.testing.assert_allclose(scores, geolocator.verify(verifier, photo, neighbors, pool, matches), atol=1e-5)
        for b, rows in enumerate(by_photo(run_folder, f"verdicts-{verifier}")):
            assert [(row["verifier"], row["status"]) for row in rows] == [(verifier, "ok")]
            assert rows[0]["scores"] == scores[b][pool.mask[b]].tolist()


def test_the_manifests_name_weights_and_settings(run_folder: Path, geolocator: Geolocator) -> None:
    assert geolocator.reward is not None
    recipes = {
        name: read_json(run_folder / f"{name}.json")["recipe"]
        for name in ("candidates", "posterior", "verdicts-alignment", "verdicts-reward", "predictions-pool")
    }
    tokens = fingerprint(geolocator.tokens)
    assert recipes["candidates"]["weights"] == recipes["posterior"]["weights"] == tokens
    assert recipes["verdicts-reward"]["weights"] == fingerprint(geolocator.tokens, geolocator.reward)
    assert recipes["verdicts-alignment"]["weights"] == geolocator.alignment.identity
    assert {name: recipes["candidates"][name] for name in ("top_p", "epsilon", "within", "samples")} == {
        name: asdict(OPTIONS)[name] for name in ("top_p", "epsilon", "within", "samples")
    }
    assert recipes["predictions-pool"]["max_area_km2"] is None


# write_decision


def test_a_decision_is_a_row_a_photo(copy: Path, geolocator: Geolocator) -> None:
    pool = read_pool(copy)
    decision = decide(pool, {}, geolocator.tuning)
    path = stages.write_decision(copy, "mine", geolocator, ["pool"], lambda: decision)
    assert path.name == "predictions-mine.parquet"
    rows, photos = read_table(path).to_pylist(), read_table(copy / "photos.parquet").to_pylist()
    good = [i for i in range(PHOTOS) if i != BROKEN]
    for i, photo in enumerate(photos):
        assert (rows[i]["id"], rows[i]["true_lat"], rows[i]["true_lon"]) == (photo["id"], photo["lat"], photo["lon"])
    for b, i in enumerate(good):
        assert [rows[i]["lat"], rows[i]["lon"]] == decision.lat_lon[b].tolist()
        assert [rows[i][f"confidence_{r}"] for r in RADII_KM] == decision.confidence[b].tolist()
        assert rows[i]["source"] == SOURCES[decision.source[b]] and rows[i]["error"] is None
        assert rows[i]["area_km2"] is None and rows[i]["verified"] is False
    truth, answers, sure = read_predictions(path)
    np.testing.assert_array_equal(answers[good], decision.lat_lon)
    assert np.isnan(answers[BROKEN]).all() and np.isnan(sure[BROKEN]).all() and np.isfinite(truth).all()


def test_a_decision_that_is_there_is_not_made_again(copy: Path, geolocator: Geolocator) -> None:
    made, pool = [], read_pool(copy)

    def decided() -> Predictions:
        made.append(1)
        return decide(pool, {}, geolocator.tuning)

    for variant in ("mine", "mine", "other"):
        stages.write_decision(copy, variant, geolocator, ["pool"], decided)
    assert len(made) == 2


def test_a_photo_whose_posterior_is_too_wide_gets_no_answer(copy: Path, geolocator: Geolocator) -> None:
    pool = read_pool(copy)
    scores = {"alignment": read_verdicts(copy, pool, "alignment")}
    decision = decide(pool, scores, geolocator.tuning)
    area = effective_area_km2(read_posterior(copy))
    most = float(np.sort(area)[10])  # eleven photos keep their answer, one of them by a hair
    inputs = ["pool", "posterior", "verdicts-alignment"]
    path = stages.write_decision(copy, "mine", geolocator, inputs, lambda: decision, area, most)
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
        table = read_table(stages.write_decision(copy, "mine", geolocator, inputs, lambda: decision, area, limit))
        assert table["lat"].null_count == table["source"].null_count == PHOTOS - answered
        assert table["area_km2"].null_count == 1


def test_a_run_without_a_readable_picture(tmp_path: Path, geolocator: Geolocator, one_line: OneLine) -> None:
    write_test_photos(tmp_path, 3)
    table = read_table(tmp_path / "photos.parquet").slice(BROKEN)
    write_table(tmp_path / "photos.parquet", table)
    retrieval.encode(tmp_path, geolocator.alignment)
    with one_line("none of the 1 pictures can be read; the first: .*missing.png"):
        retrieval.search(tmp_path, geolocator.index, 6, geolocator.tuning.search_weights)


@pytest.mark.parametrize("verifier", ["nobody", "reward"])
def test_a_verifier_that_is_not_there_leaves_no_table(
    verifier: str, copy: Path, geolocator: Geolocator, one_line: OneLine
) -> None:
    for path in copy.glob(f"*verdicts-{verifier}*"):
        path.unlink()
    parts = (geolocator.alignment, geolocator.tokens, geolocator.index, geolocator.tuning)
    with one_line("nothing verifies by the name 'nobody'|these weights have no reward head"):
        stages.verify(copy, Geolocator(*parts), verifier)
    assert not list(copy.glob(f"*verdicts-{verifier}*.parquet"))
