"""The command line as a person uses it: what it writes, what it says, how it exits."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import call, fails, lines
from PIL import Image
from tiny import ROWS

from rag_geotoken.photos import blue_marble
from rag_geotoken.storage.parquet import read_table


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six gallery-like views as PNG files, one picture cut short, one that is no picture."""
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(blue_marble.cut(blue_marble.draw_views("validation", 6, 3))):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:2000])
    (folder / "text.jpg").write_text("this is no picture")
    return folder


@pytest.fixture
def tiny(index_folder: Path, weights: Path) -> tuple[object, ...]:
    """Which index and weights a command takes."""
    return ("--index", index_folder, "--weights", weights)


def test_locate_writes_every_format_and_keeps_failures(photos: Path, tmp_path: Path, tiny: tuple[object, ...]) -> None:
    run = tmp_path / "run"
    for ending in ("parquet", "csv", "jsonl", "geojson", "kml"):
        assert call("locate", photos, *tiny, "--out", tmp_path / f"o.{ending}", "--run", run) == 0
    rows = lines(tmp_path / "o.jsonl")
    assert len(rows) == 8
    failed = [row for row in rows if row["error"]]
    assert len(failed) == 2 and all(row["lat"] is None and row["lon"] is None for row in failed)
    assert all(-90 <= row["lat"] <= 90 for row in rows if not row["error"])
    with (tmp_path / "o.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    assert len(json.loads((tmp_path / "o.geojson").read_text())["features"]) == 8


def test_the_embedded_models_locate(photos: Path, tmp_path: Path) -> None:
    index, out = tmp_path / "index", tmp_path / "o.jsonl"
    assert call("index", "build", "blue-marble:gallery,n=300", "--out", index) == 0
    assert call("locate", photos, "--index", index, "--out", out, "--verify", "alignment,reward") == 0
    rows = lines(out)
    assert sum(row["error"] is None and row["verified"] for row in rows) == 6


def test_search_shows_neighbors_and_not_the_photo_itself(
    index_folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "gallery.png"
    Image.fromarray(blue_marble.cut(blue_marble.draw_views("gallery", ROWS, 0)[:1])[0]).save(picture)
    capsys.readouterr()
    assert call("index", "search", index_folder, picture, "--k", 5, "--json", "--weights", weights) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 5 and "gallery-0-000000" not in [row["id"] for row in rows]


def test_info_and_help(index_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("index", "info", index_folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == ROWS
    assert call("--help") == 0


def test_wrong_usage_exits_2(tmp_path: Path) -> None:
    assert call("locate") == 2
    assert call("demo", "--seed", "-1") == 2
    assert call("nonsense") == 2
    for option in ("--top-p=0", "--top-p=1.1", "--epsilon=1", "--temperature=nan", "--max-area=inf", "--max-area=-1"):
        assert call("locate", tmp_path, "--index", tmp_path, "--out", "o.csv", option) == 2


def test_missing_and_broken_pictures(
    tiny: tuple[object, ...], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.csv"
    assert "missing.jpg" in fails(capsys, "locate", tmp_path / "missing.jpg", *tiny, "--out", out)
    assert "text.jpg" in fails(capsys, "locate", photos / "text.jpg", *tiny, "--out", out)
    assert "cut.png" in fails(capsys, "index", "search", tiny[1], photos / "cut.png", *tiny[2:])
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(capsys, "locate", tmp_path / "empty", *tiny, "--out", out)
    assert "o.doc" in fails(capsys, "locate", photos, *tiny, "--out", tmp_path / "o.doc")
    assert not out.exists()


def test_latitude_91(tmp_path: Path, photos: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "p.csv"
    table.write_text("true_lat,true_lon,pred_lat,pred_lon\n1,2,3,4\n91,0,0,0\n")
    assert "91" in fails(capsys, "evaluate", table)
    folder = tmp_path / "gallery"
    folder.mkdir()
    (folder / "0.png").write_bytes((photos / "0.png").read_bytes())
    (folder / "photos.csv").write_text("file,lat,lon\n0.png,91,0\n")
    build = ("index", "build", f"folder:{folder}", "--out", tmp_path / "index", "--weights", weights)
    assert "91" in fails(capsys, *build)
    assert not (tmp_path / "index" / "manifest.json").exists()


def test_index_of_another_encoder_or_truncated(
    index_folder: Path, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(index_folder, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"encoder": "somebody-else"}))
    out = tmp_path / "o.csv"
    common = ("--out", out, "--weights", weights)
    assert "encoder" in fails(capsys, "locate", photos, "--index", other, *common)
    shutil.copytree(index_folder, tmp_path / "short")
    with (tmp_path / "short" / "index.faiss").open("rb+") as file:
        file.truncate(1000)
    assert "truncated" in fails(capsys, "locate", photos, "--index", tmp_path / "short", *common)
    assert "no index" in fails(capsys, "locate", photos, "--index", tmp_path, *common)
    assert not out.exists()


def test_folder_that_cannot_be_written(
    tiny: tuple[object, ...], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A file where a folder is needed stops every user, root too, whom a read-only folder would not.
    (tmp_path / "file").write_text("")
    assert "cannot write" in fails(capsys, "demo", "--out", tmp_path / "file", "--test-n", 10)
    assert "cannot write" in fails(capsys, "locate", photos, *tiny, "--out", tmp_path / "file" / "o.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_read_only_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o555)
    assert "cannot write" in fails(capsys, "demo", "--out", tmp_path / "run", "--test-n", 10)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom rag_geotoken.cli.app import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'faiss', 'numpy', 'pyarrow', 'PIL', 'scipy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.rstrip().endswith("[]")


def test_a_changed_folder_is_read_again(photos: Path, weights: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "gallery", tmp_path / "index"
    folder.mkdir()
    for i in (0, 1):
        (folder / f"{i}.png").write_bytes((photos / f"{i}.png").read_bytes())
    (folder / "photos.csv").write_text("file,lat,lon\n0.png,10,20\n1.png,30,40\n")
    assert call("index", "build", f"folder:{folder}", "--out", out, "--weights", weights) == 0
    # A corrected place, then one more picture: the same command must see both.
    (folder / "photos.csv").write_text("file,lat,lon\n0.png,11,20\n1.png,30,40\n")
    assert call("index", "build", f"folder:{folder}", "--out", out, "--weights", weights) == 0
    assert read_table(out / "rows.parquet")["lat"].to_pylist() == [11.0, 30.0]
    (folder / "2.png").write_bytes((photos / "2.png").read_bytes())
    (folder / "photos.csv").write_text("file,lat,lon\n0.png,11,20\n1.png,30,40\n2.png,50,60\n")
    assert call("index", "build", f"folder:{folder}", "--out", out, "--weights", weights) == 0
    assert read_table(out / "rows.parquet")["lat"].to_pylist() == [11.0, 30.0, 50.0]
