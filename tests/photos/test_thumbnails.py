"""These tests check the small pictures in an index: without metadata, in the order of its rows."""

from __future__ import annotations

import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import OneLine
from typer.testing import CliRunner

from rag_geotoken.cli.app import app
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.index.build import Plan
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.photos.blue_marble import cut, draw_views
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.photos.thumbnails import BYTES, OFFSETS
from rag_geotoken.run.build_index import make_index
from rag_geotoken.storage.files import file_sha256, read_json, write_json

COUNT = 40


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of pictures with a comment in EXIF; one has no place, one is not a picture."""
    folder = tmp_path_factory.mktemp("gallery")
    for i, pixels in enumerate(cut(draw_views("train", COUNT, 4), "bmng", 96)):
        exif = Image.Exif()
        exif[0x9286] = "a secret of the camera"
        Image.fromarray(pixels).crop((0, 0, 96, 64)).save(folder / f"{i:02}.jpg", quality=95, exif=exif)
    lines = [f"{i:02}.jpg,{i - 20},{3 * i}" for i in range(COUNT)]
    lines[3] = "03.jpg,,"
    (folder / "photos.csv").write_text("\n".join(["file,lat,lon", *lines]))
    (folder / "05.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module", params=["Flat", "IVF2,Flat"])
def folder(
    request: pytest.FixtureRequest, gallery: Path, alignment: GeoAlignment, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("index")
    make_index(out, f"folder:{gallery}", alignment, Plan(request.param), thumbnails=64)
    return out


def test_pictures_come_from_the_index(folder: Path, gallery: Path, alignment: GeoAlignment) -> None:
    index = GeoIndex.load(folder, alignment.heads)
    rows = np.array([[0, 7, 37], [7, 2, 11]])
    pictures = index.pictures(rows, 32)
    names = index.rows["id"].to_pylist()
    assert len(names) == COUNT - 2 and pictures.shape == (2, 3, 32, 32, 3)
    for row, picture in zip(rows.ravel().tolist(), pictures.reshape(-1, 32, 32, 3), strict=True):
        expected = load_pictures([str(gallery / names[row])], 32)[0][0]
        assert np.abs(picture.astype(int) - expected).mean() < 6
    data = (folder / BYTES).read_bytes()
    assert b"secret" not in data and b"Exif" not in data and b"EXIF" not in data
    with Image.open(BytesIO(index.picture_files(np.array([4]))[0])) as picture:
        assert (picture.format, picture.size) == ("WEBP", (64, 43))


def test_the_manifest_has_their_digests(folder: Path, tmp_path: Path, one_line: OneLine) -> None:
    manifest = read_json(folder / "manifest.json")
    assert manifest["thumbnails"] == 64 and {BYTES, OFFSETS} <= manifest["sha256"].keys()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / BYTES).write_bytes((folder / BYTES).read_bytes()[:-1])
    with one_line(f"{BYTES} in .* is truncated or changed"):
        GeoIndex.load(copy)
    assert "kept here, 64 px" in CliRunner().invoke(app, ["index", "info", str(folder)]).output


def test_offsets_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, one_line: OneLine) -> None:
    """They are refused even when their digest is in the manifest."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    offsets = np.load(copy / OFFSETS)
    offsets[3], offsets[4] = offsets[4], offsets[3]
    np.save(copy / OFFSETS, offsets)
    manifest = read_json(copy / "manifest.json")
    manifest["sha256"][OFFSETS] = file_sha256(copy / OFFSETS)
    write_json(copy / "manifest.json", manifest)
    with one_line("thumbnails in .* do not fit the index"):
        GeoIndex.load(copy)


def test_an_index_without_them_reads_the_source(
    folder: Path, gallery: Path, alignment: GeoAlignment, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    factory = read_json(folder / "manifest.json")["factory"]
    manifest = make_index(copy, f"folder:{gallery}", alignment, Plan(factory))
    assert "thumbnails" not in manifest and not (copy / BYTES).exists() and not (copy / OFFSETS).exists()
    index = GeoIndex.load(copy, alignment.heads)
    expected = load_pictures([str(gallery / index.rows["id"][6].as_py())], 32)[0][0]
    np.testing.assert_array_equal(index.pictures(np.array(6), 32), expected)
    assert "in their source" in CliRunner().invoke(app, ["index", "info", str(copy)]).output


def test_a_build_goes_on_and_ends_in_the_same_bytes(
    folder: Path, gallery: Path, alignment: GeoAlignment, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in ("manifest.json", BYTES, "stages/thumbnails.json"):
        (copy / name).unlink()
    factory = read_json(folder / "manifest.json")["factory"]
    make_index(copy, f"folder:{gallery}", alignment, Plan(factory), thumbnails=64)
    for name in (BYTES, OFFSETS):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
