"""These functions score a CSV or Parquet file of predictions against the truth."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.evaluation import metrics
from rag_geotoken.geo import sphere
from rag_geotoken.geo.sphere import Floats
from rag_geotoken.types import RADII_KM

TRUTH = (("true_lat", "true_lon"),)
ANSWER = (("pred_lat", "pred_lon"), ("lat", "lon"))
NO_NUMBER = frozenset({"", "nan", "none", "null", "na", "n/a"})


def evaluate_csv(
    path: str | Path, geodesic: bool = False, *, truth: str | Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return the figures of a predictions file, over ALL its photos.

    The file is CSV (UTF-8, with a header) or Parquet (``.parquet``) with true_lat, true_lon and either pred_lat,
    pred_lon or lat, lon; other columns are ignored. A photo whose prediction is empty, NaN or incomplete counts as
    wrong and in "failed".

    Args:
        path: The predictions.
        geodesic: Distance on WGS84 instead of the great circle of a sphere of 6371 km.
        truth: A file with id and lat, lon (or true_lat, true_lon): the photos to score, joined on the id. It wins over
            true coordinates in the predictions; a photo that the predictions lack is a failure, and predictions for
            photos it does not name are left out and counted in "unknown".
        seed: Of the bootstrap.

    Returns:
        n, failed, acc (percent by radius), median_km (None when most photos have no answer), ci95, geoscore, distance
        (which kind), and unknown where a truth file was given.

    Raises:
        GeoError: A file cannot be read, lacks a column or has a cell that is no coordinate; the message names the line.
    """
    answers, unknown = _read(Path(path)), {}
    if truth is None:
        true_lat_lon = _truth(answers, TRUTH)
        lat, lon = _coordinates(answers, ANSWER)
    else:
        photos = _read(Path(truth))
        true_lat_lon = _truth(photos, (*TRUTH, ("lat", "lon")))
        rows, unknown["unknown"] = _join(photos, answers)
        # One row more, without an answer, for the photos that the predictions lack (row -1).
        lat, lon = (np.append(values, np.nan)[rows] for values in _coordinates(answers, ANSWER))
    km = (sphere.geodesic_km if geodesic else sphere.haversine_km)(*true_lat_lon, lat, lon)
    figures = metrics.summary(km, metrics.bootstrap(km, seed).accuracy[0])
    return {
        "n": figures.pop("n"),
        "failed": int(np.isnan(km).sum()),
        **unknown,
        **figures,
        "geoscore": round(metrics.geoscore(km), 4),
        "distance": "geodesic, WGS84" if geodesic else f"haversine, R = {sphere.EARTH_RADIUS_KM:g} km",
    }


def format_evaluation(result: dict[str, Any]) -> str:
    """Format the result of :func:`evaluate_csv` as a few lines to read."""
    radii = [str(r) for r in RADII_KM]
    median = "none (most photos have no answer)" if result["median_km"] is None else f"{result['median_km']:,.1f} km"
    rows = [
        ("within", [f"{r} km" for r in radii]),
        ("percent", [f"{result['acc'][r]:.2f}" for r in radii]),
        ("95 % from", [f"{result['ci95'][r][0]:.2f}" for r in radii]),
        ("to", [f"{result['ci95'][r][1]:.2f}" for r in radii]),
    ]
    lines = [
        f"{result['n']:,} photos, {result['failed']:,} of them without an answer (counted as wrong)",
        f"distance: {result['distance']}",
        *(f"{label:<10}" + "".join(f"{cell:>10}" for cell in cells) for label, cells in rows),
        f"within {'/'.join(radii)} km: {'/'.join(rows[1][1])} %",
        f"median {median}   GeoScore {result['geoscore']:,.0f} of 5,000",
    ]
    if result.get("unknown"):
        lines.insert(1, f"{result['unknown']:,} predictions left out: the truth does not name their ids")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Table:
    """This class holds columns of cells as read, their file and the line of each row in it."""

    path: Path
    columns: dict[str, list[Any]]
    lines: list[int]
    unit: str

    def error(self, row: int, reason: str) -> GeoError:
        return GeoError(f"{self.path}, {self.unit} {self.lines[row]}: {reason}")


def _read(path: Path) -> _Table:
    if path.is_dir():
        raise GeoError(f"{path} is a folder: give a CSV or Parquet file")
    try:
        if path.stat().st_size == 0:
            raise GeoError(f"{path} is empty: give a file with a header and one row a photo")
        table = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except FileNotFoundError:
        raise GeoError(f"{path} is not there: check the name") from None
    except OSError as error:
        raise GeoError(f"{path} cannot be read: {error.strerror or error}") from None
    if not table.lines:
        raise GeoError(f"{path} has a header and no rows: give one row a photo")
    return table


def _read_csv(path: Path) -> _Table:
    lines: list[int] = []
    rows: list[list[str]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            for row in reader:
                if row and len(row) != len(header):
                    fields = f"{len(row)} fields where the header has {len(header)}"
                    raise GeoError(f"{path}, line {reader.line_num}: {fields}")
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
        except UnicodeDecodeError:
            raise GeoError(f"{path} is not UTF-8 text: give a CSV file, or a Parquet file named .parquet") from None
        except csv.Error as error:
            raise GeoError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise GeoError(f"{path}: the column {repeated[0]!r} is there twice: drop or rename one")
    return _Table(path, {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines, "line")


def _read_parquet(path: Path) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {"id", *(name for pair in (*TRUTH, *ANSWER) for name in pair)}
    try:
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in names if name in known])
    except pa.ArrowException as error:
        raise GeoError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return _Table(path, columns, list(range(1, table.num_rows + 1)), "row")


def _coordinates(table: _Table, choices: tuple[tuple[str, str], ...]) -> tuple[Floats, Floats]:
    """Return the first pair of columns that the table has, both NaN where either cell is empty."""
    for names in choices:
        if all(name in table.columns for name in names):
            lat, lon = _degrees(table, names[0], 90), _degrees(table, names[1], 180)
            empty = np.isnan(lat) | np.isnan(lon)
            return np.where(empty, np.nan, lat), np.where(empty, np.nan, lon)
    missing = " or ".join(" and ".join(name for name in names if name not in table.columns) for names in choices)
    present = ", ".join(list(table.columns)[:12]) or "none"
    raise GeoError(f"{table.path} has no column {missing} (it has {present[:200]}): name the columns so")


def _degrees(table: _Table, name: str, limit: int) -> Floats:
    values = np.empty(len(table.lines))
    for row, cell in enumerate(table.columns[name]):
        try:
            values[row] = cell
        except (TypeError, ValueError):
            if cell is not None and str(cell).strip().lower() not in NO_NUMBER:
                raise table.error(row, f"{name} {str(cell)[:40]!r} is not a number") from None
            values[row] = np.nan
    outside = np.flatnonzero(np.abs(values) > limit)
    if outside.size:
        first = int(outside[0])
        raise table.error(first, f"{name} {values[first]:g} is outside -{limit}..{limit} degrees")
    return values


def _truth(table: _Table, choices: tuple[tuple[str, str], ...]) -> tuple[Floats, Floats]:
    lat, lon = _coordinates(table, choices)
    missing = np.flatnonzero(np.isnan(lat))
    if missing.size:
        raise table.error(int(missing[0]), "no true latitude and longitude: fill them in or drop the row")
    return lat, lon


def _join(photos: _Table, answers: _Table) -> tuple[NDArray[np.int64], int]:
    """Return for each photo the row of its answer, -1 without one, and how many answers are for other photos."""
    photo_rows, answer_rows = _by_id(photos), _by_id(answers)
    rows = np.array([answer_rows.get(key, -1) for key in photo_rows], np.int64)
    unknown = len(answer_rows.keys() - photo_rows.keys())
    if unknown == len(answer_rows):
        raise GeoError(f"{photos.path} and {answers.path} have no id in common: check the id columns")
    return rows, unknown


def _by_id(table: _Table) -> dict[str, int]:
    if "id" not in table.columns:
        raise GeoError(f"{table.path} has no column id to join on: add it")
    rows: dict[str, int] = {}
    for row, cell in enumerate(table.columns["id"]):
        key = "" if cell is None else str(cell).strip()
        if not key:
            raise table.error(row, "no id: fill it in or drop the row")
        if key in rows:
            raise table.error(row, f"the id {key[:60]!r} is there twice: drop one")
        rows[key] = row
    return rows
