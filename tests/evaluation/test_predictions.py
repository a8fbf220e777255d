"""Scoring prediction files: GeoCLIP's known figures, and one clear line for every file that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_geotoken.errors import GeoError
from rag_geotoken.evaluation.predictions import evaluate_csv, format_evaluation

GEOCLIP = Path(__file__).parents[1] / "data" / "geoclip_im2gps3k_predictions.csv"
HEADER = "true_lat,true_lon,pred_lat,pred_lon\n"


def _write(folder: Path, text: str, name: str = "predictions.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _two_decimals(result: dict) -> str:
    return "/".join(f"{value:.2f}" for value in result["acc"].values())


def test_geoclip_on_im2gps3k_by_haversine() -> None:
    result = evaluate_csv(GEOCLIP)
    assert (result["n"], result["failed"]) == (2997, 0)
    assert _two_decimals(result) == "13.01/32.10/47.91/66.57/82.42"
    assert result["distance"] == "haversine, R = 6371 km"
    assert "13.01/32.10/47.91/66.57/82.42" in format_evaluation(result)
    json.dumps(result, allow_nan=False)


def test_geoclip_on_im2gps3k_by_geodesic() -> None:
    result = evaluate_csv(GEOCLIP, geodesic=True)
    assert _two_decimals(result) == "13.08/32.10/47.91/66.57/82.45"
    assert "WGS84" in result["distance"]


def test_no_answer_counts_as_wrong(tmp_path: Path) -> None:
    path = _write(tmp_path, HEADER + "10,20,10,20\n10,20,,\n10,20,nan,NaN\n10,20,10,\n\n10,20,None,20\n")
    result = evaluate_csv(path)
    assert (result["n"], result["failed"]) == (5, 4)
    assert set(result["acc"].values()) == {20.0}
    assert result["median_km"] is None
    assert result["geoscore"] == 1000.0
    assert "4 of them without an answer" in format_evaluation(result)


def test_other_columns_order_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "windows.csv"
    text = 'note, pred_lon ,true_lat,pred_lat,true_lon\r\n"a, ""b""\nc",21,10,10,20\r\n'
    path.write_bytes(text.encode("utf-8-sig"))
    result = evaluate_csv(path)
    assert result["n"] == 1 and result["acc"]["200"] == 100 and result["acc"]["25"] == 0  # 109.5 km
    assert result["median_km"] == pytest.approx(109.505, abs=1e-3)


def test_parquet_as_the_pipeline_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    columns = {"id": ["a", "b"], "true_lat": [10.0, 10.0], "true_lon": [20.0, 20.0], "lat": [10.0, None]}
    pq.write_table(pa.table({**columns, "lon": [20.0, float("nan")], "source": ["beam", ""]}), path)
    assert evaluate_csv(path)["acc"]["1"] == 50
    pq.write_table(pa.table({**columns, "pred_lat": [10.0, 10.0], "pred_lon": [20.0, 20.0]}), path)
    assert evaluate_csv(path)["acc"]["1"] == 100  # pred_lat, pred_lon before lat, lon
    pq.write_table(pa.table({**columns, "lon": ["x", "y"]}), path)
    with pytest.raises(GeoError, match=r"predictions\.parquet, row 1: lon 'x' is not a number"):
        evaluate_csv(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(GeoError, match="not a whole Parquet file"):
        evaluate_csv(path)


def test_truth_of_its_own_file(tmp_path: Path) -> None:
    truth = _write(tmp_path, "id,lat,lon\na,10,20\nb,10,20\nc,10,20\n", "truth.csv")
    path = _write(tmp_path, "id,pred_lat,pred_lon\nz,0,0\nc,10,20\na,50,20\n")
    result = evaluate_csv(path, truth=truth)
    assert (result["n"], result["failed"], result["unknown"]) == (3, 1, 1)
    assert result["acc"]["1"] == pytest.approx(100 / 3, abs=1e-3)
    assert "1 predictions left out" in format_evaluation(result)
    with pytest.raises(GeoError, match="no column true_lat and true_lon"):
        evaluate_csv(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,pred_lat,pred_lon\na,1,1\na,2,2\n", r"predictions\.csv, line 3: the id 'a' is there twice"),
        ("id,pred_lat,pred_lon\n,1,1\n", r"predictions\.csv, line 2: no id"),
        ("id,pred_lat,pred_lon\nq,1,1\n", "no id in common"),
        ("name,pred_lat,pred_lon\na,1,1\n", r"predictions\.csv has no column id"),
    ],
)
def test_joining_goes_wrong_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    truth = _write(tmp_path, "id,lat,lon\na,10,20\n", "truth.csv")
    with pytest.raises(GeoError, match=message):
        evaluate_csv(_write(tmp_path, text), truth=truth)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (HEADER, "has a header and no rows"),
        ("\n\n", "has a header and no rows"),
        ("true_lat,true_lon,pred_lat\n1,2,3\n", "no column pred_lon or lat and lon .it has true_lat, true_lon, pred_"),
        ("true_lat,lon,pred_lat,pred_lon\n1,2,3,4\n", "no column true_lon"),
        ("true_lat,true_lon,true_lat,pred_lat,pred_lon\n1,2,3,4,5\n", "'true_lat' is there twice"),
        (HEADER + "1,2,3,4\n,2,3,4\n", "line 3: no true latitude"),
        (HEADER + "1,2,3,4\n\n1,nan,3,4\n", "line 4: no true latitude"),
        (HEADER + "91,2,3,4\n", "line 2: true_lat 91 is outside -90..90"),
        (HEADER + "1,2,3,4\n1,2,-91,4\n", "line 3: pred_lat -91 is outside -90..90"),
        (HEADER + "1,2,3,181\n", "line 2: pred_lon 181 is outside -180..180"),
        (HEADER + "1,2,inf,4\n", "line 2: pred_lat inf"),
        (HEADER + "1,2,3,north\n", "line 2: pred_lon 'north' is not a number"),
        (HEADER + "1,2,3\n", "line 2: 3 fields where the header has 4"),
        (HEADER + '1,2,3,"4\n', "line 2: not CSV"),
    ],
)
def test_bad_file_is_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(GeoError, match=message) as caught:
        evaluate_csv(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_not_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "photo.csv"
    path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(256)))
    with pytest.raises(GeoError, match="not UTF-8 text"):
        evaluate_csv(path)
    path.write_bytes(HEADER.encode() + b"1,2,3,4\n" * 5000 + b"\xff\n")
    with pytest.raises(GeoError, match="not UTF-8 text"):
        evaluate_csv(path)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(GeoError, match="is not there"):
        evaluate_csv(tmp_path / "none.csv")
    with pytest.raises(GeoError, match="is a folder"):
        evaluate_csv(tmp_path)
