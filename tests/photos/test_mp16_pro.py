"""Tests of MP16-Pro on disk: text, rows left out and why, subsets, the tar in pieces or cut off, and an index of it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from miniatures import COLUMNS, WHOLE, flickr_id, jpeg, mp16_pro, pixels_of, write_csv, write_tar
from tiny import OneLine

from rag_geotoken.cli.app import main
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.photos import metadata
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.photos.sources import limited, read_source, source_module
from rag_geotoken.photos.table import SCHEMA, LeftOut, read_left_out
from rag_geotoken.run.build_index import make_index
from rag_geotoken.run.walk import write_photos
from rag_geotoken.storage.parquet import read_table

COUNT = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return mp16_pro(tmp_path / "mp16", COUNT)


def one(tmp_path: Path, **cells: object) -> dict[str, Any] | None:
    """The photo of a CSV of one row; None where it is left out (a second photo is always there)."""
    rows = [{"IMG_ID": "a/b/c.jpg", "LAT": 1.5, "LON": 2.5} | cells, {"IMG_ID": "other.jpg", "LAT": 0, "LON": 0}]
    write_csv(tmp_path / "MP16_Pro_filtered.csv", [WHOLE | row for row in rows])
    write_tar(tmp_path / "mp-16-images.tar", {"x/y/a_b_c.jpg": jpeg(1), "x/y/other.jpg": jpeg(2)})
    photos = read_source(f"mp16-pro:{tmp_path}").to_pylist()
    return next((photo for photo in photos if photo["id"] == "a_b_c.jpg"), None)


def test_the_whole_set_in_the_order_of_the_tar(folder: Path) -> None:
    table = read_source(f"mp16-pro:{folder}")
    assert table.schema.equals(SCHEMA) and read_left_out(table) == LeftOut()
    with tarfile.open(folder / "mp-16-images.tar") as tar:
        names = [member.name.split("/")[2] for member in tar if member.isreg()]
    assert table["id"].to_pylist() == names and len(names) == COUNT
    numbers = [int(name[-14:-4]) - 5_000_000_000 for name in names]
    assert table["lat"].to_pylist() == numbers and table["lon"].to_pylist() == [-i for i in numbers]
    assert table["author"].to_pylist() == [f"{i % 5}@N00" for i in numbers]
    assert set(table["place"].to_pylist()) == {"A street view photo taken in Wien, Wien, Österreich"}
    pixels, errors = load_pictures(table["image"].to_pylist(), 96)
    assert set(errors) == {None}
    np.testing.assert_array_equal(pixels, [pixels_of(jpeg(i)) for i in numbers])


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ({}, "Wien, Wien, Österreich"),
        ({"city": ""}, "Wien, Österreich"),
        ({"state": "nan"}, "Wien, Österreich"),
        ({"city": "None", "state": " NaN "}, "Österreich"),
        ({"city": "東京都", "state": "", "country": "日本"}, "東京都, 日本"),
        ({"city": 'Say "Ay",\nBee', "country": "  C "}, 'Say "Ay",\nBee, Wien, C'),
        ({"city": "Nan", "state": "Nan"}, "Nan, Nan, Österreich"),
        ({"county": "", "neighbourhood": "", "region": "nan"}, "Wien, Wien, Österreich"),
    ],
)
def test_missing_parts_of_the_text_are_left_out_of_it(tmp_path: Path, cells: dict[str, str], text: str) -> None:
    photo = one(tmp_path, **cells)
    assert photo and photo["place"] == f"A street view photo taken in {text}"


@pytest.mark.parametrize(
    "cells", [{"LAT": "90"}, {"LAT": "-90", "LON": "180.0"}, {"LAT": " 1e1 ", "LON": "-.5"}, {"LAT": "+5."}]
)
def test_coordinates_that_are_read(tmp_path: Path, cells: dict[str, str]) -> None:
    photo = one(tmp_path, **cells)
    assert photo
    assert (photo["lat"], photo["lon"]) == (float(cells.get("LAT", 1.5)), float(cells.get("LON", 2.5)))


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"country": ""}, "without a country"),
        ({"country": "nan"}, "without a country"),
        ({"IMG_ID": ""}, "without an id"),
        ({"IMG_ID": "a/b/d.jpg"}, "without a picture in the tar"),
        ({"IMG_ID": "other.jpg", "country": "Wales"}, "listed before"),
        *(
            ({"LAT": text}, "without usable coordinates")
            for text in ("", "nan", "inf", "90.1", "north", "1,5", "1e999")
        ),
        *(({"LON": text}, "without usable coordinates") for text in ("", "-180.5", "0x10", "1_0", "--1")),
    ],
)
def test_what_is_left_out_is_counted_and_named(tmp_path: Path, cells: dict[str, str], reason: str) -> None:
    photo = one(tmp_path, **cells)
    left_out = read_left_out(read_source(f"mp16-pro:{tmp_path}"))
    name = cells.get("IMG_ID", "a_b_c.jpg").replace("/", "_") or None
    assert photo is None and left_out == LeftOut({reason: {"photos": 1, "first": [name]}})
    assert left_out.line() == f"left out: 1 {reason}"


def test_a_row_counts_for_one_reason_and_ten_are_named(folder: Path) -> None:
    rows = [{"IMG_ID": f"x/{i}.jpg", "LAT": "north", "LON": 0, "country": "X" if i % 2 else ""} for i in range(40)]
    whole = WHOLE | {"IMG_ID": flickr_id(3), "LAT": 1, "LON": 1}
    write_csv(folder / "MP16_Pro_places365.csv", [*rows, whole])
    table = read_source(f"mp16-pro:{folder}")
    assert len(table) == 1
    assert read_left_out(table).reasons == {
        "without a country": {"photos": 20, "first": [f"x_{i}.jpg" for i in range(0, 20, 2)]},
        "without usable coordinates": {"photos": 20, "first": [f"x_{i}.jpg" for i in range(1, 20, 2)]},
    }


def test_of_two_rows_of_one_id_the_first_usable_counts(tmp_path: Path) -> None:
    rows = [WHOLE | {"IMG_ID": name, "LAT": lat, "LON": 0} for name, lat in
            [("a_b.jpg", "bad"), ("a/b.jpg", 5), ("a/b.jpg", 6), ("a_b.jpg", 7)]]  # fmt: skip
    write_csv(tmp_path / "MP16_Pro_places365.csv", rows)
    write_tar(tmp_path / "mp-16-images.tar", {"./images/a_b.jpg": jpeg(1)})
    table = read_source(f"mp16-pro:{tmp_path}")
    assert table["lat"].to_pylist() == [5.0]
    assert read_left_out(table).reasons["listed before"]["photos"] == 2


def test_photos_of_5_kb_or_less_are_left_out(tmp_path: Path) -> None:
    sizes = {"a.jpg": 5119, "b.jpg": 5120, "c.jpg": 5121, "d.jpg": 0}
    write_csv(tmp_path / "MP16_Pro_places365.csv", [WHOLE | {"IMG_ID": n, "LAT": 1, "LON": 1} for n in sizes])
    write_tar(tmp_path / "mp-16-images.tar", {f"./images/{n}": b"x" * size for n, size in sizes.items()})
    table = read_source(f"mp16-pro:{tmp_path}")
    assert table["id"].to_pylist() == ["c.jpg"]
    assert read_left_out(table).reasons == {"of 5 KB or less": {"photos": 3, "first": ["a.jpg", "b.jpg", "d.jpg"]}}


def test_a_truncated_picture_costs_one_row(tmp_path: Path) -> None:
    ids = ["a.jpg", "b.jpg", "c.jpg"]
    write_csv(tmp_path / "MP16_Pro_places365.csv", [WHOLE | {"IMG_ID": n, "LAT": 1, "LON": 1} for n in ids])
    pictures = {"./images/a.jpg": jpeg(1), "./images/b.jpg": jpeg(2, 144)[:6000], "./images/c.jpg": jpeg(3)}
    write_tar(tmp_path / "mp-16-images.tar", pictures)
    table = read_source(f"mp16-pro:{tmp_path}")
    pixels, errors = load_pictures(table["image"].to_pylist(), 8)
    assert [error is None for error in errors] == [True, False, True] and not pixels[1].any()
    assert "the picture is broken or cut short" in str(errors[1]) and len(str(errors[1]).splitlines()) == 1


def test_a_tar_cut_off_in_the_middle_gives_what_is_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids, tar = read_source(f"mp16-pro:{folder}")["id"].to_pylist(), folder / "mp-16-images.tar"
    with tarfile.open(tar) as file:
        member = [member for member in file if member.isreg()][10]
    tar.write_bytes(tar.read_bytes()[: member.offset_data + 3000])
    write_photos(folder / "run", f"mp16-pro:{folder}")
    table = read_table(folder / "run" / "photos.parquet")
    assert table["id"].to_pylist() == ids[:10]
    assert load_pictures(table["image"].to_pylist(), 8)[1] == [None] * 10
    left_out = json.loads((folder / "run" / "left_out.json").read_text())
    remark = f"the tar is cut off or broken at byte {member.offset:,}, 10 members are whole"
    assert left_out["remarks"] == [remark] and left_out["photos"] == 10
    lost = [name for i in range(COUNT) if (name := flickr_id(i).replace("/", "_")) not in ids[:10]]
    assert left_out["reasons"] == {"without a picture in the tar": {"photos": 14, "first": lost[:10]}}
    line = f"mp16-pro:{folder}: left out: 14 without a picture in the tar; {remark}"
    assert line in capsys.readouterr().err.splitlines()


def test_the_pieces_of_the_hub_need_not_be_joined(folder: Path) -> None:
    whole = read_source(f"mp16-pro:{folder}").drop_columns("image").to_pylist()
    data = (folder / "mp-16-images.tar").read_bytes()
    (folder / "mp-16-images.tar").unlink()
    (folder / "metadata").mkdir()
    (folder / "MP16_Pro_places365.csv").rename(folder / "metadata" / "MP16_Pro_places365.csv")
    step = len(data) // 3 + 1
    for i in range(3):
        (folder / f"mp-16-images{i:02d}").write_bytes(data[i * step : (i + 1) * step])
    table = read_source(f"mp16-pro:{folder}")
    across = read_left_out(table).reasons["across two pieces of the tar"]
    assert 1 <= across["photos"] <= 2 and len(table) == COUNT - across["photos"]
    kept = [row for row in whole if row["id"] not in across["first"]]
    assert table.drop_columns("image").to_pylist() == kept
    pixels, errors = load_pictures(table["image"].to_pylist(), 96)
    assert set(errors) == {None}
    np.testing.assert_array_equal(pixels, [pixels_of(jpeg(int(row["lat"]))) for row in kept])
    # Downloaded in part: a gap ends it.
    (folder / "mp-16-images01").rename(folder / "later")
    table = read_source(f"mp16-pro:{folder}")
    assert 0 < len(table) <= COUNT // 3 + 1 and "the tar is cut off" in read_left_out(table).remarks[0]


def test_subsets(folder: Path) -> None:
    whole = read_source(f"mp16-pro:{folder}").to_pylist()
    assert read_source(f"mp16-pro:{folder},limit=5").to_pylist() == whole[:5]
    assert read_source(f"mp16-pro:{folder},limit=500").to_pylist() == whole
    some = read_source(f"mp16-pro:{folder},limit=8,seed=1").to_pylist()
    assert len(some) == 8 and some == [row for row in whole if row in some] != whole[:8]
    assert read_source(f"mp16-pro:{folder},seed=1,limit=8").to_pylist() == some
    assert read_source(f"mp16-pro:{folder},limit=8,seed=2").to_pylist() != some
    assert read_source(limited(f"mp16-pro:{folder},limit=8", 3)).to_pylist() == whole[:3]
    assert limited("folder:x", None) == "folder:x" and source_module("hub:x/y") and not source_module("huba:x")


def test_other_columns_and_lines_of_the_csv(folder: Path) -> None:
    columns = ["LON", "more", *(c for c in COLUMNS if c not in ("LON", "city", "AUTHOR"))]
    rows = [WHOLE | {"IMG_ID": flickr_id(i), "LAT": i, "LON": i, "more": "ü"} for i in range(3)]
    path = folder / "MP16_Pro_places365.csv"
    write_csv(path, rows, columns)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"1,2,3\r\n\r\n")
    table = read_source(f"mp16-pro:{folder}")
    assert sorted(table["lat"].to_pylist()) == [0, 1, 2] and table["author"].null_count == 3
    assert set(table["place"].to_pylist()) == {"A street view photo taken in Wien, Österreich"}
    assert read_left_out(table).reasons == {"in broken lines": {"photos": 1, "first": []}}


def test_line_ends_in_quotes_across_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "BLOCK_BYTES", 2000)
    rows = [WHOLE | {"IMG_ID": flickr_id(i), "LAT": i, "LON": i, "city": "a\n" * 50 + str(i)} for i in range(COUNT)]
    write_csv(folder / "MP16_Pro_places365.csv", rows)
    table = read_source(f"mp16-pro:{folder}")
    assert sorted(table["lat"].to_pylist()) == list(range(COUNT)) and read_left_out(table) == LeftOut()


def test_what_is_not_there_is_named(tmp_path: Path, one_line: OneLine) -> None:
    with one_line("there is no folder .*none"):
        read_source(f"mp16-pro:{tmp_path / 'none'}")
    with one_line("holds neither MP16_Pro_places365.csv nor MP16_Pro_filtered.csv: download"):
        read_source(f"mp16-pro:{tmp_path}")
    path = tmp_path / "MP16_Pro_places365.csv"
    path.write_text("IMG_ID,LAT,LON\n")
    with one_line("holds neither mp-16-images.tar nor its pieces mp-16-images00"):
        read_source(f"mp16-pro:{tmp_path}")
    tar = tmp_path / "mp-16-images.tar"
    tar.write_bytes(b"no tar" * 1000)
    with one_line("has no column country: its first line must name IMG_ID, LAT, LON, country"):
        read_source(f"mp16-pro:{tmp_path}")
    write_csv(path, [WHOLE | {"IMG_ID": "a.jpg", "LAT": 1, "LON": 1}])
    with one_line("mp-16-images.tar is not a tar file"):
        read_source(f"mp16-pro:{tmp_path}")
    write_tar(tar, {"./images/b.jpg": jpeg(1)})
    with one_line("holds no photo of MP16_Pro_places365.csv: are they of one data set"):
        read_source(f"mp16-pro:{tmp_path}")
    path.write_bytes(path.read_bytes().replace("Ö".encode(), b"\xd6"))
    with one_line("is not a CSV file in UTF-8"):
        read_source(f"mp16-pro:{tmp_path}")
    path.write_text("IMG_ID,LAT,LON,country,LAT\n")
    with one_line("names a column twice: IMG_ID, LAT, LON, country, LAT"):
        read_source(f"mp16-pro:{tmp_path}")
    path.write_text("")
    with one_line("has no column IMG_ID, LAT, LON, country"):
        read_source(f"mp16-pro:{tmp_path}")


@pytest.mark.parametrize("settings", ["limit=0", "limit=-1", "limit=1e3", "limit=", "limit=٣", "limit=3,seed=x"])
def test_bad_settings_are_named(folder: Path, settings: str, one_line: OneLine) -> None:
    with one_line("(limit|seed)=.* is not understood: write"):
        read_source(f"mp16-pro:{folder},{settings}")
    with one_line("seed=1 chooses a random subset: say how many with limit=N"):
        read_source(f"mp16-pro:{folder},seed=1")


def test_a_folder_with_commas_and_signs_in_its_name(tmp_path: Path) -> None:
    folder = mp16_pro(tmp_path / "São, #1+2,limit=7,x", 3)
    table = read_source(f"mp16-pro:{folder},limit=2")
    assert len(table) == 2 and load_pictures(table["image"].to_pylist(), 8)[1] == [None, None]


def test_an_index_of_it(folder: Path, weights: Path, alignment: GeoAlignment, tmp_path: Path) -> None:
    broken = folder / "mp-16-images.tar"
    data = bytearray(broken.read_bytes())
    first = read_source(f"mp16-pro:{folder}")["image"][0].as_py()
    offset = int(first.rpartition("#")[2].partition("+")[0])
    data[offset : offset + 400] = bytes(400)  # the first photo of the tar
    broken.write_bytes(data)
    manifest = make_index(tmp_path / "index", f"mp16-pro:{folder},limit=10", alignment)
    assert (manifest["rows"], manifest["left_out"]) == (9, 1)
    rows = GeoIndex.load(tmp_path / "index").rows.to_pylist()
    whole = read_source(f"mp16-pro:{folder},limit=10").to_pylist()
    assert [{k: v for k, v in row.items() if k != "digest"} for row in rows] == whole[1:]


def test_limits_on_the_command_line(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> None:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert not end.value.code, capsys.readouterr().err

    recipe, index = tmp_path / "mine.toml", tmp_path / "index"
    recipe.write_text(f'source = "mp16-pro:{folder},limit=20"\n', encoding="utf-8")
    call("index", "build", recipe, "--out", index, "--limit", 12, "--weights", weights)
    assert GeoIndex.load(index).manifest["rows"] == 12
    options = ("--propose", "none", "--verify", "none", "--neighbors", 3, "--weights", weights, "--limit", 2)
    call("locate", f"mp16-pro:{folder}", "--index", index, "--out", tmp_path / "o.jsonl", *options)
    whole = read_source(f"mp16-pro:{folder}")["id"].to_pylist()
    assert [json.loads(line)["id"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == whole[:2]
