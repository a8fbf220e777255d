"""Tests of Im2GPS3k and YFCC4k on disk: folders of pictures, authors, and a missing picture, which keeps its row."""

from __future__ import annotations

from pathlib import Path

import pytest
from miniatures import jpeg, write_csv
from tiny import OneLine

from rag_geotoken.options import Options
from rag_geotoken.photos.inputs import read_photos
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.photos.sources import read_source
from rag_geotoken.photos.table import SCHEMA, read_left_out
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.locate import locate_photos
from rag_geotoken.storage.parquet import read_table

IM2GPS3K = (
    "IMG_ID", "AUTHOR", "LAT", "LON", "S3_Label", "S16_Label", "S365_Label", "Prob_indoor", "Prob_natural",
    "Prob_urban",
)  # fmt: skip
IDS = [f"10412{i}_7410c654ba_19_193556{i}@N00.jpg" for i in range(6)]


def im2gps3k(folder: Path, inside: str = "im2gps3ktest", missing: int | None = None) -> Path:
    """Six photos at latitude i, longitude -i, by three authors."""
    (folder / inside).mkdir(parents=True, exist_ok=True)
    rows = [{"IMG_ID": IDS[i], "AUTHOR": f"{i // 2}@N00", "LAT": i, "LON": -i, "S3_Label": 2} for i in range(6)]
    write_csv(folder / "im2gps3k_places365.csv", rows, IM2GPS3K)
    for i in range(6):
        if i != missing:
            (folder / inside / IDS[i]).write_bytes(jpeg(i))
    return folder


@pytest.mark.parametrize("inside", ["im2gps3ktest", "images", "."])
def test_pictures_lie_where_the_archive_or_g3_or_the_user_puts_them(tmp_path: Path, inside: str) -> None:
    table = read_source(f"im2gps3k:{im2gps3k(tmp_path, inside)}")
    assert table.schema.equals(SCHEMA) and read_left_out(table).line() == ""
    assert table["id"].to_pylist() == IDS
    assert table["lat"].to_pylist() == [0, 1, 2, 3, 4, 5] and table["lon"].to_pylist() == [0, -1, -2, -3, -4, -5]
    assert table["author"].to_pylist() == ["0@N00", "0@N00", "1@N00", "1@N00", "2@N00", "2@N00"]
    assert table["place"].null_count == 6
    assert set(load_pictures(table["image"].to_pylist(), 8)[1]) == {None}


@pytest.mark.parametrize("column", ["OwnerNSID", "AUTHOR"])
def test_yfcc4k_names_its_authors_in_either_way(tmp_path: Path, column: str) -> None:
    rows = [{"IMG_ID": "10201275523.jpg", column: "7@N02", "LAT": 1, "LON": 2}]
    write_csv(tmp_path / "yfcc4k_places365.csv", rows, ["", "IMG_ID", column, "LAT", "LON"])
    (tmp_path / "yfcc4k").mkdir()
    (tmp_path / "yfcc4k" / "10201275523.jpg").write_bytes(jpeg(1))
    table = read_source(f"yfcc4k:{tmp_path}")
    assert table["author"].to_pylist() == ["7@N02"]
    assert load_pictures(table["image"].to_pylist(), 8)[1] == [None]


def test_a_missing_picture_keeps_its_row_to_the_end(
    tmp_path: Path, geolocator: Geolocator, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"im2gps3k:{im2gps3k(tmp_path, missing=4)}"
    out, options = tmp_path / "out.parquet", Options(neighbors=3, propose=(), verify=())
    done, failed = locate_photos(read_photos([source]), geolocator, options, out, tmp_path / "run")
    assert done == 5 and len(failed) == 1 and "there is no such file" in failed[0] and IDS[4] in failed[0]
    line = f"{source}: 1 of 6 pictures are missing in {tmp_path / 'im2gps3ktest'}"
    assert line in capsys.readouterr().err.splitlines()
    rows = read_table(out).to_pylist()
    assert [row["true_lat"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["error"] is None for row in rows] == [True] * 4 + [False, True]


def test_subsets_and_limits_of_several_sources(tmp_path: Path) -> None:
    folder = im2gps3k(tmp_path)
    whole = read_source(f"im2gps3k:{folder}").to_pylist()
    assert read_source(f"im2gps3k:{folder},limit=4").to_pylist() == whole[:4]
    some = read_source(f"im2gps3k:{folder},limit=4,seed=2").to_pylist()
    assert len(some) == 4 and some == [row for row in whole if row in some]
    pictures = str(folder / "im2gps3ktest")
    paths = sorted(f"{pictures}/{name}" for name in IDS)
    assert read_photos([f"im2gps3k:{folder}", pictures])["id"].to_pylist() == IDS + paths
    assert read_photos([f"im2gps3k:{folder}", pictures], 8)["id"].to_pylist() == IDS + paths[:2]
    assert read_photos([f"im2gps3k:{folder}"], 2)["id"].to_pylist() == IDS[:2]


def test_rows_that_cannot_be_scored_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = im2gps3k(tmp_path)
    with (folder / "im2gps3k_places365.csv").open("a") as file:
        file.write(f"x.jpg,a,,5,,,,,,\n{IDS[0]},a,1,1,,,,,,\nonly,three,cells\n")
    table = read_source(f"im2gps3k:{folder}")
    assert table["id"].to_pylist() == IDS
    line = read_left_out(table).line()
    assert line == "left out: 1 in broken lines, 1 without usable coordinates, 1 listed before"


def test_an_id_leads_nowhere_else(tmp_path: Path) -> None:
    """No id reaches a file outside the folder of pictures: slashes are underscores, as in the archives."""
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    (tmp_path / "set" / "images").mkdir(parents=True)
    rows = [{"IMG_ID": name, "LAT": 1, "LON": 1} for name in ("../../secret.jpg", str(tmp_path / "secret.jpg"), "..")]
    write_csv(tmp_path / "set" / "yfcc4k_places365.csv", rows, ["IMG_ID", "LAT", "LON"])
    table = read_source(f"yfcc4k:{tmp_path / 'set'}")
    assert None not in load_pictures(table["image"].to_pylist(), 8)[1]
    assert {Path(image).parent.resolve() for image in table["image"].to_pylist()} == {tmp_path / "set" / "images"}


def test_what_is_not_there_is_named(tmp_path: Path, one_line: OneLine) -> None:
    with one_line("there is no .*im2gps3k_places365.csv: download the metadata of im2gps3k into"):
        read_source(f"im2gps3k:{tmp_path}")
    write_csv(tmp_path / "im2gps3k_places365.csv", [], ["IMG_ID", "LAT", "LON"])
    with one_line("lists no photo with coordinates"):
        read_source(f"im2gps3k:{tmp_path}")
    write_csv(tmp_path / "im2gps3k_places365.csv", [], ["IMG_ID", "LAT", "LNG"])
    with one_line("has no column LON"):
        read_source(f"im2gps3k:{tmp_path}")
