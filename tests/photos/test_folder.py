"""Tests of the folder source: coordinates from photos.csv or from EXIF, wrong lines named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from tiny import OneLine

from rag_geotoken.photos import folder
from rag_geotoken.photos.pictures import load_pictures

COLUMNS = ["id", "image", "lat", "lon", "place", "author"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """a.png without coordinates, sub/b.jpg at 10.5 N 20 W."""
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (10.0, 30.0, 0.0), 3: "W", 4: (20.0, 0.0, 0.0)}
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "sub" / "b.jpg", exif=exif)
    return tmp_path


def rows(directory: Path) -> list[tuple[object, ...]]:
    table = folder.read(directory)
    assert table.column_names == COLUMNS and [str(field.type) for field in table.schema] == [
        "string", "string", "double", "double", "string", "string",
    ]  # fmt: skip
    return [tuple(row[name] for name in COLUMNS if name != "image") for row in table.to_pylist()]


def csv(directory: Path, text: str, encoding: str = "utf-8") -> None:
    (directory / "photos.csv").write_bytes(text.encode(encoding))


def test_coordinates_come_from_exif(photos: Path) -> None:
    assert rows(photos) == [("a.png", None, None, None, None), ("sub/b.jpg", 10.5, -20.0, None, None)]
    pixels, errors = load_pictures(folder.read(photos)["image"].to_pylist(), 4)
    assert errors == [None, None]
    assert (pixels[0] == [255, 0, 0]).all() and pixels[1, 0, 0, 2] > 200
    # Without any coordinates the columns keep their types.
    (photos / "sub" / "b.jpg").unlink()
    assert rows(photos) == [("a.png", None, None, None, None)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_coordinates_come_from_the_csv(photos: Path, encoding: str, end: str) -> None:
    lines = ["lon,author,file,lat,place,more", '2.3,ann,./a.png,-48.8,"São, Paulo",x', "", "", ",,sub/b.jpg,,,"]
    csv(photos, end.join(lines), encoding)
    assert rows(photos) == [("a.png", -48.8, 2.3, "São, Paulo", "ann"), ("sub/b.jpg", None, None, None, None)]


def test_a_photo_the_csv_leaves_out_is_read_from_exif(photos: Path) -> None:
    csv(photos, "file,lat,lon\na.png,1,2\n")
    assert rows(photos) == [("a.png", 1.0, 2.0, None, None), ("sub/b.jpg", 10.5, -20.0, None, None)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png,91,0", "latitude 91.0 is outside -90..90"),
        ("a.png,-90.5,0", "latitude -90.5 is outside -90..90"),
        ("a.png,0,180.01", "longitude 180.01 is outside -180..180"),
        ("a.png,north,0", "latitude 'north' is not a number"),
        ("a.png,nan,0", "latitude 'nan' is not a number"),
        ("a.png,0,inf", "longitude 'inf' is not a number"),
        ("a.png,1,", "latitude and longitude must both be given or both be empty"),
        ("a.png,1", "2 cells under 3 columns"),
        ("a.png,1,2,3", "4 cells under 3 columns"),
        ("c.png,1,2", "there is no picture 'c.png' in the folder"),
        ("../a.png,1,2", "there is no picture '../a.png' in the folder"),
        ("sub/b.jpg,3,4", "'sub/b.jpg' is listed a second time"),
    ],
)
def test_a_wrong_line_is_named(photos: Path, line: str, message: str, one_line: OneLine) -> None:
    csv(photos, f"file,lat,lon\nsub/b.jpg,1,2\n\n{line}\n")
    with one_line(f"^photos.csv line 4: {re.escape(message)}$"):
        folder.read(photos)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "photos.csv has no column file, lat, lon: its first line must name file, lat, lon, place, author"),
        ("file,latitude,lon\n", "photos.csv has no column lat:"),
        ("file,lat,lon,lat\n", "photos.csv names a column twice"),
        ('file,lat,lon\n"a.png,1,2\n', "photos.csv is not a CSV file in UTF-8"),
        ("file,lat,lon,place\na.png,1,2,São\n", "photos.csv is not a CSV file in UTF-8"),
    ],
)
def test_a_wrong_csv_is_named(photos: Path, text: str, message: str, one_line: OneLine) -> None:
    csv(photos, text, "latin-1")
    with one_line(f"^{message}"):
        folder.read(photos)


def test_an_empty_or_missing_folder(tmp_path: Path, one_line: OneLine) -> None:
    with one_line("holds no picture"):
        folder.read(tmp_path)
    with one_line("there is no folder"):
        folder.read(tmp_path / "none")


def test_subsets(tmp_path: Path) -> None:
    for i in range(9):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    csv(tmp_path, "file,lat,lon\n8.png,1,2\n0.png,3,4\n")
    whole = folder.read(tmp_path).to_pylist()
    assert folder.read(f"{tmp_path},limit=4").to_pylist() == whole[:4] and whole[0]["lat"] == 3
    some = folder.read(f"{tmp_path},limit=4,seed=1").to_pylist()
    assert some == [row for row in whole if row in some] != whole[:4] and len(some) == 4
