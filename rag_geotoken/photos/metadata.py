"""These functions read the CSV files of photo collections as columns of text and turn them into checked values."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.table import LeftOut

# How missing text is written by pandas, Python and databases. "Nan" stays: it is a province of Thailand.
MISSING = ("", "nan", "NaN", "NAN", "None", "none", "null", "NULL", "<NA>", "N/A")
BLOCK_BYTES = 8 << 20
NUMBER = r"^[+-]?(\d{1,15}\.?\d{0,20}|\.\d{1,20})([eE][+-]?\d{1,3})?$"


@contextmanager
def open_csv(path: Path, name: str) -> Iterator[TextIO]:
    """Open a CSV file in UTF-8; errors of reading and parsing it become a GeoError that calls it ``name``."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (UnicodeDecodeError, csv.Error) as error:
        raise GeoError(f"{name} is not a CSV file in UTF-8: {error}") from error
    except OSError as error:
        raise GeoError(f"cannot read {path}: {error.strerror}") from error


def check_header(name: str, header: list[str], needed: Sequence[str], known: Sequence[str]) -> None:
    """Raise GeoError where the header of a CSV file lacks a needed column or names a column twice."""
    if missing := [column for column in needed if column not in header]:
        raise GeoError(f"{name} has no column {', '.join(missing)}: its first line must name {', '.join(known)}")
    if len(set(header)) < len(header):
        raise GeoError(f"{name} names a column twice: {', '.join(header)}")


def _read_csv(path: Path, left_out: LeftOut, needed: Sequence[str], optional: Sequence[str]) -> pa.Table:
    """Read some columns as stripped text, null where missing; broken lines are left out."""
    with open_csv(path, str(path)) as file:
        check_header(str(path), next(csv.reader(file), []), needed, known=needed)
    columns = [*needed, *optional]

    def skip(row: Any) -> str:
        left_out.add("in broken lines", 1)
        return "skip"

    try:
        table = arrow_csv.read_csv(
            path,
            # Quoted text may hold line ends; no line is longer than a block.
            read_options=arrow_csv.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=columns,
                include_missing_columns=True,
                column_types=dict.fromkeys(columns, pa.string()),
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise GeoError(f"{path} is not a CSV file in UTF-8: {str(error).splitlines()[0]}") from None
    texts = {name: pc.utf8_trim_whitespace(table[name]) for name in columns}
    missing = pa.array(MISSING)
    return pa.table({name: pc.if_else(pc.is_in(text, missing), None, text) for name, text in texts.items()})


def _degrees(text: pa.ChunkedArray, limit: float) -> pa.ChunkedArray:
    """Convert text to degrees (float64); null where it is not a number or outside -limit..limit."""
    number = pc.cast(pc.if_else(pc.match_substring_regex(text, NUMBER), text, None), pa.float64())
    return pc.if_else(pc.less_equal(pc.abs(number), limit), number, None)


def photo_rows(path: Path, left_out: LeftOut, needed: Sequence[str] = (), optional: Sequence[str] = ()) -> pa.Table:
    """Read the usable rows of a CSV file: id, lat and lon in degrees, and the other columns as text.

    The id is IMG_ID with ``_`` for ``/``, as the pictures are named. Counted in ``left_out``: broken lines, rows
    without id, without a value in a needed column, without coordinates on Earth, and repeated ids. An optional column
    that the file lacks is null throughout. Raises GeoError for a file that is missing, is not UTF-8 or lacks a needed
    column.
    """
    table = _read_csv(path, left_out, needed=("IMG_ID", "LAT", "LON", *needed), optional=optional)
    columns = {"id": pc.replace_substring(table["IMG_ID"], "/", "_")}
    columns |= {"lat": _degrees(table["LAT"], 90.0), "lon": _degrees(table["LON"], 180.0)}
    table = pa.table(columns | {name: table[name] for name in (*needed, *optional)})
    table = left_out.drop(table, pc.is_null(table["id"]), "without an id")
    for name in needed:
        table = left_out.drop(table, pc.is_null(table[name]), f"without a {name}")
    outside = pc.or_(pc.is_null(table["lat"]), pc.is_null(table["lon"]))
    table = left_out.drop(table, outside, "without usable coordinates")
    first = pc.index_in(table["id"], value_set=table["id"])
    return left_out.drop(table, first.to_numpy() != np.arange(len(table)), "listed before")
