"""Tests of data sets read through `datasets`, local ones in all forms: the same bytes, subsets, clear errors."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniatures import jpeg
from tiny import OneLine

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.photos import hub
from rag_geotoken.photos.inputs import read_photos
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.photos.sources import read_source
from rag_geotoken.photos.table import SCHEMA, read_left_out
from rag_geotoken.photos.tar import read_member
from rag_geotoken.run.build_index import make_index

datasets = pytest.importorskip("datasets")
COUNT = 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache" / "rag-geotoken" / "hub"


def rows(count: int = COUNT, **columns: Any) -> dict[str, Any]:
    numbers = range(count)
    pictures = [{"bytes": jpeg(i), "path": None} for i in numbers]
    return {"image": pictures, "lat": [float(i) for i in numbers], "lon": [-float(i) for i in numbers], **columns}


def write(path: Path, table: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    return path


def data_of(table: pa.Table) -> list[bytes]:
    return [read_member(reference, 10**6) for reference in table["image"].to_pylist()]


def in_form(form: str, folder: Path) -> Path:
    """Write the same photos in one of the forms in which users have them."""
    if form == "parquet file":
        return write(folder / "a.parquet", rows())
    if form == "folder of parquet files":
        for i, part in enumerate((slice(5), slice(5, COUNT))):
            write(folder / f"train-{i}.parquet", {name: column[part] for name, column in rows().items()})
        return folder
    if form == "folder of pictures":
        for i in range(COUNT):
            (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
        with (folder / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "lat", "lon"), *((f"{i:02d}.jpg", i, -i) for i in range(COUNT))])
        return folder
    degrees = datasets.Value("float32")
    features = datasets.Features({"image": datasets.Image(), "lat": degrees, "lon": degrees})
    dataset = datasets.Dataset.from_dict(rows(), features=features)
    (datasets.DatasetDict({"test": dataset}) if form == "saved splits" else dataset).save_to_disk(folder)
    return folder


@pytest.mark.parametrize(
    "form", ["parquet file", "folder of parquet files", "folder of pictures", "saved", "saved splits"]
)
def test_every_form_gives_the_same_photos_byte_for_byte(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    table = read_source(f"hub:{in_form(form, folder)}")
    assert table.schema.equals(SCHEMA) and read_left_out(table).line() == ""
    assert table["id"].to_pylist() == [f"{i:08d}" for i in range(COUNT)]
    assert table["lat"].to_pylist() == list(range(COUNT)) and table["lon"].to_pylist() == [-i for i in range(COUNT)]
    assert data_of(table) == [jpeg(i) for i in range(COUNT)]
    assert load_pictures(table["image"].to_pylist(), 8)[1] == [None] * COUNT


def test_columns_under_their_usual_names(tmp_path: Path) -> None:
    names = {"IMG": [jpeg(i) for i in range(3)], "Latitude": ["1.5", "2", "3"], "LNG": [4, 5, 6]}
    more = {"ID": [7, 8, 9], "place": ["東京都", "", "nan"], "OwnerNSID": ["a@N", None, "c@N"]}
    table = read_source(f"hub:{write(tmp_path / 'a.parquet', names | more)}")
    assert data_of(table) == names["IMG"]
    kept = table.drop_columns("image").to_pydict()
    assert kept == {
        "id": ["7", "8", "9"], "lat": [1.5, 2.0, 3.0], "lon": [4.0, 5.0, 6.0], "place": ["東京都", None, None],
        "author": ["a@N", None, "c@N"],
    }  # fmt: skip


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    table = rows(8, id=["a", "b", "c", "d", "e", "f", "a", "h"])
    table["lat"] = [0.0, 91.0, float("nan"), None, 4.0, 5.0, 6.0, 7.0]
    table["image"][4] = {"bytes": None, "path": None}
    table["image"][5] = {"bytes": b"", "path": None}
    photos = read_source(f"hub:{write(tmp_path / 'a.parquet', table)}")
    assert photos["id"].to_pylist() == ["a", "h"]
    assert read_left_out(photos).reasons == {
        "without usable coordinates": {"photos": 3, "first": ["b", "c", "d"]},
        "without a picture": {"photos": 2, "first": ["e", "f"]},
        "listed before": {"photos": 1, "first": ["a"]},
    }


def test_a_set_without_coordinates_can_be_located_and_says_so(tmp_path: Path) -> None:
    table = read_source(f"hub:{write(tmp_path / 'a.parquet', {'image': [jpeg(1)], 'label': [3]})}")
    assert table["lat"].null_count == table["lon"].null_count == 1
    assert read_left_out(table).line() == "no coordinates: none of the columns image, label is called lat and lon"


def test_the_copy_is_made_once_and_again_when_the_data_change(tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    path = write(tmp_path / "a.parquet", rows(3))
    first = read_source(f"hub:{path}")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_stream", None)
        assert read_source(f"hub:{path}").equals(first)
    write(path, rows(4))
    second = read_source(f"hub:{path}")
    assert len(second) == 4 and len(list(cache.iterdir())) == 2
    # A copy without its tar or its table is made again.
    for name in ("photos.tar", "photos.parquet"):
        for kept in cache.glob(f"*/{name}"):
            kept.unlink()
        assert read_source(f"hub:{path}").equals(second) and data_of(second) == [jpeg(i) for i in range(4)]
    # Somewhere else, under another path.
    shutil.move(cache.parent, tmp_path / "elsewhere" / "rag-geotoken")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(hub, "_stream", None)
    assert data_of(read_source(f"hub:{path}")) == [jpeg(i) for i in range(4)]


def test_subsets(tmp_path: Path) -> None:
    table = rows()
    table["lat"][1] = 99.0  # the first usable ones are meant
    path = write(tmp_path / "a.parquet", table | {"id": [str(i) for i in range(COUNT)]})
    assert read_source(f"hub:{path},limit=3")["id"].to_pylist() == ["0", "2", "3"]
    some = read_source(f"hub:{path},limit=5,seed=1")
    again = read_source(f"hub:{path},seed=1,limit=5")
    assert len(some) == 5 and some.equals(again) and "1" not in some["id"].to_pylist()
    assert data_of(some) == [jpeg(int(i)) for i in some["id"].to_pylist()]
    assert read_source(f"hub:{path},limit=5,seed=2")["id"].to_pylist() != some["id"].to_pylist()


def test_a_limit_of_locate_copies_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.parquet", rows())
    assert read_photos([f"hub:{path}"], 2)["id"].to_pylist() == ["00000000", "00000001"]
    assert f"hub:{path}: 2 photos copied into " in capsys.readouterr().err


def test_splits(tmp_path: Path, one_line: OneLine) -> None:
    folder = tmp_path / "data"
    write(folder / "test-0.parquet", rows(2))
    write(folder / "validation-0.parquet", rows(3))
    assert len(read_source(f"hub:{folder},split=test")) == 2
    with one_line("has no split 'train': choose split= one of (validation|test), (validation|test)"):
        read_source(f"hub:{folder}")
    write(folder / "train-0.parquet", rows(4))
    assert len(read_source(f"hub:{folder}")) == 4
    with one_line("has no split 'dev'"):
        read_source(f"hub:{folder},split=dev")


def test_a_path_in_the_data_leads_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    secret, mine, link = tmp_path / "secret.bin", folder / "mine.bin", folder / "link.bin"
    secret.write_bytes(jpeg(1))
    mine.write_bytes(jpeg(2))
    link.symlink_to(secret)
    paths = ["../secret.bin", str(secret), f"file://{secret}", str(link), str(folder / "none.bin"), str(folder)]
    paths += ["https://example.org/a.jpg", "hf://datasets/a/b/c.jpg", str(mine)]
    table = rows(len(paths))
    table["image"] = [{"bytes": None, "path": path} for path in paths]
    write(folder / "a.parquet", table)
    photos = read_source(f"hub:{folder},split=train")
    assert data_of(photos) == [jpeg(2)]
    assert read_left_out(photos).reasons["without a picture"]["photos"] == len(paths) - 1


def test_a_path_of_the_hub_is_read_from_the_hub(tmp_path: Path) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    known = fsspec.get_filesystem_class("hf")
    fsspec.register_implementation("hf", type("Hub", (MemoryFileSystem,), {"protocol": "hf"}), clobber=True)
    try:
        with fsspec.open("hf://datasets/a/b/1.jpg", "wb") as file:
            file.write(jpeg(1))
        for number, folder, data in ((1, Path("a/b"), jpeg(1)), (2, Path("a/b"), None), (1, tmp_path, None)):
            assert hub._bytes({"bytes": None, "path": f"hf://datasets/a/b/{number}.jpg"}, folder) == data
    finally:
        fsspec.register_implementation("hf", known, clobber=True)


def test_a_data_set_that_is_not_there_offline(cache: Path, one_line: OneLine) -> None:
    with one_line("data set nobody/nothing cannot be opened .*: check the name and the network, or give a local copy"):
        read_source("hub:nobody/nothing")
    assert not cache.exists()


def test_what_is_no_data_set_of_photos_is_named(tmp_path: Path, cache: Path, one_line: OneLine) -> None:
    (tmp_path / "empty").mkdir()
    with one_line("empty cannot be opened"):
        read_source(f"hub:{tmp_path / 'empty'}")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with one_line("cannot be (opened|read to its end)"):
        read_source(f"hub:{tmp_path / 'a.parquet'}")
    with one_line("has no column image, img, picture: it has lat, lon"):
        read_source(f"hub:{write(tmp_path / 'b.parquet', {'lat': [1], 'lon': [2]})}")
    with one_line("gives no photo: left out: 2 without usable coordinates"):
        read_source(f"hub:{write(tmp_path / 'c.parquet', rows(2) | {'lat': [None, None]})}")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_file_cut_off_in_the_middle_leaves_nothing_behind(tmp_path: Path, cache: Path, one_line: OneLine) -> None:
    folder = tmp_path / "data"
    write(folder / "train-0.parquet", rows(3))
    broken = bytearray(write(folder / "train-1.parquet", rows(3)).read_bytes())
    broken[100:9000] = bytes(8900)
    (folder / "train-1.parquet").write_bytes(broken)
    with one_line("cannot be read to its end"):
        read_source(f"hub:{folder}")
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert len(read_source(f"hub:{folder},limit=3")) == 3


def test_an_index_of_it(tmp_path: Path, weights: Path, alignment: GeoAlignment, capsys: Any) -> None:
    table = rows()
    table["image"][3] = {"bytes": jpeg(3)[:2000], "path": None}
    table["lat"][4] = None
    source = f"hub:{write(tmp_path / 'a.parquet', table)}"
    manifest = make_index(tmp_path / "index", source, alignment)
    assert (manifest["rows"], manifest["left_out"]) == (COUNT - 2, 1)
    left_out = json.loads((tmp_path / "index" / "stages" / "left_out.json").read_text())
    assert left_out["reasons"]["without usable coordinates"] == {"photos": 1, "first": ["00000004"]}
    assert f"{source}: left out: 1 without usable coordinates" in capsys.readouterr().err
