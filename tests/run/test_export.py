"""Predictions in every format: read back with other readers, failures kept, whole or not at all."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pytest
from tiny import OneLine

from rag_geotoken.run.export import check_output, write_predictions
from rag_geotoken.storage.parquet import read_table

ENDINGS = (".parquet", ".csv", ".jsonl", ".geojson", ".kml")
KML = "{http://www.opengis.net/kml/2.2}"
NASTY = "a <b> & \"c\",\n'd' é東"


@pytest.fixture
def predictions() -> pa.Table:
    """An answer, a failure and an id full of characters that formats treat in their own way."""
    return pa.table(
        {
            "id": ["one.png", "two.png", NASTY],
            "lat": [12.25, None, -45.5],
            "lon": [-170.5, None, 0.0],
            "source": ["beam", None, "neighbor"],
            "confidence_25": [0.5, None, 0.25],
            "verified": [True, False, True],
            "error": [None, "two.png: broken <or> cut short", None],
        }
    )


def test_parquet_and_json_lines_keep_every_value(predictions: pa.Table, tmp_path: Path) -> None:
    write_predictions(tmp_path / "out.parquet", predictions)
    assert read_table(tmp_path / "out.parquet").equals(predictions)
    write_predictions(tmp_path / "out.jsonl", predictions)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == predictions.to_pylist()


def test_csv(predictions: pa.Table, tmp_path: Path) -> None:
    write_predictions(tmp_path / "out.csv", predictions)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == predictions.column_names
    assert [row["id"] for row in rows] == predictions["id"].to_pylist()
    assert [(row["lat"], row["lon"]) for row in rows] == [("12.25", "-170.5"), ("", ""), ("-45.5", "0.0")]
    assert [row["error"] for row in rows] == ["", "two.png: broken <or> cut short", ""]


def test_geojson_has_longitude_first(predictions: pa.Table, tmp_path: Path) -> None:
    write_predictions(tmp_path / "out.geojson", predictions)
    collection = json.loads((tmp_path / "out.geojson").read_text(encoding="utf-8"))
    assert collection["type"] == "FeatureCollection"
    first, failed, last = collection["features"]
    assert {feature["type"] for feature in collection["features"]} == {"Feature"}
    assert first["id"] == "one.png" and first["geometry"] == {"type": "Point", "coordinates": [-170.5, 12.25]}
    assert first["properties"]["confidence_25"] == 0.5 and last["id"] == NASTY
    assert failed["geometry"] is None and failed["properties"]["error"] == "two.png: broken <or> cut short"
    assert not {"id", "lat", "lon"} & set(first["properties"])


def test_kml_has_longitude_first(predictions: pa.Table, tmp_path: Path) -> None:
    write_predictions(tmp_path / "out.kml", predictions)
    marks = ElementTree.parse(tmp_path / "out.kml").getroot().findall(f"{KML}Document/{KML}Placemark")
    assert [mark.findtext(f"{KML}name") for mark in marks] == ["one.png", "two.png", NASTY]
    points = [mark.findtext(f"{KML}Point/{KML}coordinates") for mark in marks]
    assert points == ["-170.5,12.25", None, "0.0,-45.5"]
    assert marks[1].findtext(f"{KML}description") == "two.png: broken <or> cut short"
    assert marks[0].find(f"{KML}description") is None


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_name_with_control_characters_breaks_no_format(ending: str, predictions: pa.Table, tmp_path: Path) -> None:
    ids = pa.array(["a\x01\x1b[31mb.png", "\x7f", "\ufffe"])
    path = tmp_path / f"out{ending}"
    write_predictions(path, predictions.set_column(0, "id", ids))
    if ending == ".kml":
        assert len(ElementTree.parse(path).getroot().findall(f".//{KML}Placemark")) == 3


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_predictions_are_a_file_without_rows(ending: str, predictions: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / f"out{ending}"
    write_predictions(path, predictions.slice(0, 0))
    if ending == ".csv":
        assert path.read_text().strip() == ",".join(predictions.column_names)


def test_an_ending_in_capitals_will_do(predictions: pa.Table, tmp_path: Path) -> None:
    write_predictions(tmp_path / "OUT.CSV", predictions)
    assert (tmp_path / "OUT.CSV").read_text().startswith("id,lat,lon,")


@pytest.mark.parametrize("name", ["out", "out.xlsx", "out.csv.gz", ".csv"])
def test_another_ending_is_refused(name: str, tmp_path: Path, one_line: OneLine) -> None:
    with one_line("choose an ending among .parquet, .csv, .jsonl, .geojson, .kml"):
        check_output(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_cannot_be_written_is_named(
    ending: str, predictions: pa.Table, tmp_path: Path, one_line: OneLine
) -> None:
    (tmp_path / "file").write_text("")
    with one_line(f"cannot write .*out{ending}"):
        write_predictions(tmp_path / "file" / f"out{ending}", predictions)


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_appear_whole_or_not_at_all(
    ending: str, predictions: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"out{ending}"
    path.write_text("as it was")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, predictions)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_text() == "as it was"
