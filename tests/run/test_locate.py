"""The options of `locate`: what each changes in the answers and in the tables beside them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call, fails, lines
from PIL import Image
from tiny import OneLine

from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.options import Options, parse_option
from rag_geotoken.photos import blue_marble
from rag_geotoken.storage.parquet import read_table
from rag_geotoken.types import GREEDY, SAMPLE, Candidates, Pool

PHOTOS = 12
HERE = (47.0, 8.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve views as PNG files, and one that is no picture."""
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(blue_marble.cut(blue_marble.draw_views("validation", PHOTOS, 3))):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (folder / "text.jpg").write_text("this is no picture")
    return folder


class Command:
    """`locate` on the tiny models, with other options each time, into the same run folder."""

    def __init__(self, photos: Path, index: Path, weights: Path, folder: Path) -> None:
        self.folder, self.out, self.run = folder, folder / "o.jsonl", folder / "o.run"
        self.given = ("locate", photos, "--index", index, "--weights", weights, "--out", self.out, "--samples", 8)

    def __call__(self, *options: object) -> list[dict[str, Any]]:
        """The rows of the readable photos."""
        assert call(*self.given, *options) == 0
        rows = lines(self.out)
        assert len(rows) == PHOTOS + 1 and "text.jpg" in rows.pop()["error"]
        return rows

    def tables(self) -> dict[str, int]:
        """Every table of the run folder and which file it is: another one when it is written anew."""
        return {path.stem: path.stat().st_ino for path in self.run.glob("*.parquet")}

    @property
    def pool(self) -> Pool:
        return Pool.from_table(read_table(self.run / "pool.parquet"))

    @property
    def candidates(self) -> Candidates:
        return Candidates.from_table(read_table(self.run / "candidates.parquet"))


@pytest.fixture
def locate(photos: Path, index_folder: Path, weights: Path, tmp_path: Path) -> Command:
    return Command(photos, index_folder, weights, tmp_path)


def places(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(row["lat"], row["lon"]) for row in rows]


# --verify


def test_verifiers_are_chosen_and_nothing_before_them_is_done_again(locate: Command) -> None:
    before = ("embeddings", "neighbors", "candidates", "pool")
    found, known = {}, dict[str, int]()
    for verify in ("none", "reward", "alignment", "alignment,reward"):
        rows = locate("--verify", verify)
        tables = locate.tables()
        assert {row["verified"] for row in rows} == {verify != "none"}
        assert f"predictions-{'none' if verify == 'none' else verify.replace(',', '+')}" in tables
        assert all(tables[name] == known.get(name, tables[name]) for name in known if name != "photos")
        assert (f"verdicts-{verify}" in tables) == (verify in ("alignment", "reward"))
        found[verify], known = places(rows), known | tables
    assert set(before) <= known.keys() and "posterior" not in known
    # Another order is the same decision.
    assert places(locate("--verify", "reward,alignment")) == found["alignment,reward"]
    assert all(made == known[name] for name, made in locate.tables().items() if name.startswith("verdicts"))
    assert found["none"] != found["alignment"]


def test_alignment_verifies_unless_something_else_is_asked(locate: Command) -> None:
    assert locate() == locate("--verify", "alignment")


def test_a_verifier_that_is_not_there(locate: Command, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, *locate.given, "--verify", "alignment,sometimes")
    assert "verify 'sometimes' is not known: choose of alignment, reward" in said
    bare = shutil.copytree(weights, locate.folder / weights.name, ignore=shutil.ignore_patterns("reward*"))
    given = [bare if part == weights else part for part in locate.given]
    assert "these weights have no reward head" in fails(capsys, *given, "--verify", "reward")
    assert not locate.out.exists()
    assert call(*given, "--verify", "alignment") == 0


# --within


@pytest.mark.parametrize("km", [800, 3000])
@pytest.mark.parametrize("verify", ["none", "alignment,reward"])
def test_within_leaves_places_inside_alone(km: int, verify: str, locate: Command) -> None:
    free = locate("--verify", verify)
    rows = locate("--verify", verify, "--within", f"{HERE[0]},{HERE[1]},{km}")
    cell = 800  # a cell of the tiny model reaches no further from its center; the place's own cell always counts
    assert all(float(haversine_km(*HERE, *place)) <= max(km, cell) for place in places(rows))
    assert any(float(haversine_km(*HERE, *place)) > max(km, cell) for place in places(free))
    pool = locate.pool
    away = haversine_km(*HERE, pool.lat_lon[..., 0], pool.lat_lon[..., 1])[pool.mask]
    assert (away <= max(km, cell)).all()
    np.testing.assert_allclose(np.exp(pool.log_weight).sum(axis=1), 1, atol=1e-5)


def test_within_where_no_neighbor_and_no_cells_center_is(locate: Command) -> None:
    # A spot in the Pacific: the cell that holds it is proposed; without proposals the nearest neighbor stays.
    rows = locate("--within", "-48.9,-123.4,5")
    assert len(set(places(rows))) == 1 and {row["source"] for row in rows} <= {"greedy", "beam", "sample"}
    assert float(haversine_km(-48.9, -123.4, *places(rows)[0])) < 800
    alone = locate("--within", "-48.9,-123.4,5", "--propose", "none")
    assert {row["source"] for row in alone} == {"neighbor"}
    assert (locate.pool.mask.sum(axis=1) == 1).all()


NO_NUMBERS = ("", "47,8", "47,8,100,2", "47;8;100")
NO_PLACES = ("91,8,100", "47,181,100", "nan,8,100")
NO_DISTANCES = ("47,8,0", "47,8,-1", "47,8,nan", "47,8,inf", "47,8,20041")


@pytest.mark.parametrize("text", [*NO_NUMBERS, *NO_PLACES, *NO_DISTANCES])
def test_within_that_is_no_place_and_distance(text: str, one_line: OneLine) -> None:
    shown = text if text in NO_NUMBERS else ",".join(str(float(part)) for part in text.split(","))
    with one_line(f"^within {re.escape(shown)}: .*give"):
        Options(within=parse_option("within", text))


def test_within_is_read_as_latitude_longitude_and_kilometers(
    locate: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Options(within=parse_option("within", None)).within is None
    assert Options(within=parse_option("within", "-48.5, 170,2.5")).within == (-48.5, 170.0, 2.5)
    assert "within 8.0,91000.0,1.0: give" in fails(capsys, *locate.given, "--within", "8,91000,1")
    assert "within here: give LAT,LON,KM" in fails(capsys, *locate.given, "--within", "here")
    assert not locate.run.exists()


# --max-area


def test_photos_spread_over_more_than_the_area_get_no_answer(
    locate: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    free = locate("--max-area", 1e9)
    areas = [row["area_km2"] for row in free]
    assert all(row["error"] is None for row in free) and min(areas) > 0
    assert {row["area_km2"] for row in locate()} == {None}
    known = locate.tables()
    most = sorted(areas)[4]
    capsys.readouterr()
    rows = locate("--max-area", most)
    said = capsys.readouterr()
    assert "5 photos located" in said.out and "8 without an answer" in said.out
    assert len(said.err.splitlines()) == 8 and said.err.count("abstained") == 7
    for row, before in zip(rows, free, strict=True):
        assert row["area_km2"] == before["area_km2"] and row["id"] == before["id"]
        if row["area_km2"] > most:
            assert row["error"].startswith("abstained: the posterior is spread over more than ")
            assert row["lat"] is row["lon"] is row["source"] is row["confidence_200"] is None and not row["verified"]
        else:
            assert row == before
    after = locate.tables()
    redone = {name for name in after if after[name] != known.get(name)}
    assert redone == {"photos", "predictions-alignment"}


def test_abstained_photos_count_as_wrong(locate: Command, tmp_path: Path) -> None:
    areas = [row["area_km2"] for row in locate("--max-area", 1e9)]
    locate("--max-area", sorted(areas)[4])
    truth, result = tmp_path / "truth.csv", tmp_path / "result.json"
    rows = lines(locate.out)
    truth.write_text("id,lat,lon\n" + "".join(f"{row['id']},{row['lat'] or 0},{row['lon'] or 0}\n" for row in rows))
    assert call("evaluate", locate.run / "predictions-alignment.parquet", "--truth", truth, "--json", result) == 0
    figures = json.loads(result.read_text())
    assert (figures["n"], figures["failed"]) == (PHOTOS + 1, 8)
    assert figures["acc"]["1"] == pytest.approx(100 * 5 / 13, abs=0.01)


# --propose, --top-p, --epsilon, --seed


@pytest.mark.parametrize("options", [("--top-p", 0.01), ("--epsilon", 0.99)])
def test_samples_cut_down_to_the_likeliest_token_are_greedy(options: tuple[object, ...], locate: Command) -> None:
    locate(*options)
    cells = locate.candidates
    greedy, samples = (cells.tokens[:, cells.source[0] == kind] for kind in (GREEDY, SAMPLE))
    assert samples.shape[1] == 8 and (samples == greedy).all()
    locate()
    cells = locate.candidates
    assert (cells.tokens[:, cells.source[0] == SAMPLE] != greedy).any()


def test_the_seed_changes_the_samples_and_nothing_else(locate: Command) -> None:
    found = []
    for seed in (0, 1, 0):
        locate("--seed", seed)
        found.append(locate.candidates)
    sampled = found[0].source[0] == SAMPLE
    assert (found[0].tokens[:, sampled] != found[1].tokens[:, sampled]).any()
    np.testing.assert_array_equal(found[0].tokens[:, ~sampled], found[1].tokens[:, ~sampled])
    np.testing.assert_array_equal(found[0].tokens, found[2].tokens)


def test_without_proposals_and_verification_neighbors_are_left(locate: Command) -> None:
    rows = locate("--propose", "none", "--gps-places", 0, "--verify", "none")
    assert {row["source"] for row in rows} == {"neighbor"} and not any(row["verified"] for row in rows)
    assert not {"candidates", "places"} & set(locate.tables())
    places_of = read_table(locate.run / "neighbors.parquet", ["lat", "lon"]).to_pylist()
    assert all({"lat": row["lat"], "lon": row["lon"]} in places_of for row in rows)


def test_an_unknown_way_to_propose(locate: Command, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, *locate.given, "--propose", "beam,guess")
    assert "propose 'guess' is not known: choose of greedy, beam, sample" in said


def test_asked_again_it_repeats_nothing(locate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--verify", "alignment,reward", "--max-area", 1e7)
    first = locate(*options)
    alignment = [f"encoders.alignment.GeoAlignment.{name}" for name in ("load", "embed", "embed_places")]
    for name in ("models.Models.memory", "index.geo_index.GeoIndex.search", *alignment, "run.stages.decide"):
        monkeypatch.setattr(f"rag_geotoken.{name}", lambda *_, **__: pytest.fail("computed again"))
    locate.out.unlink()
    assert locate(*options) == first
