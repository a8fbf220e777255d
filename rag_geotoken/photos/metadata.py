"""Metadata of photo collections are CSV files nobody has vetted: read as text, then turned into values."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.table import LeftOut

# How missing text is written by pandas, Python and databases. "Nan" stays: it is a province of Thailand.
MISSING = ("", "nan", "NaN", "NAN", "None", "none", "null", "NULL", "<NA>", "N/A")
BLOCK_BYTES = 8 << 20
NUMBER = r"^[+-]?(\d{1,15}\.?\d{0,20}|\.\d{1,20})([eE][+-]?\d{1,3})?$"


def read_csv(path: Path, left_out: LeftOut, needed: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """Read some columns of a CSV file as text, null where empty or "nan". Broken lines are left out.

    An optional column that the file lacks is null throughout. Raises GeoError for a file that is missing, is not UTF-8
    or lacks a needed column.
    """
    from pyarrow import csv as arrow_csv

    header = _header(path)
    missing = [name for name in needed if name not in header]
    if missing:
        raise GeoError(f"{path} has no column {', '.join(missing)}: its first line must name {', '.join(needed)}")
    columns = [*needed, *(name for name in optional if name in header)]

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
                include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise GeoError(f"{path} is not a CSV file in UTF-8: {str(error).splitlines()[0]}") from None
    texts = {name: clean(table[name]) for name in columns}
    texts |= {name: pa.chunked_array([pa.nulls(len(table), pa.string())]) for name in optional if name not in texts}
    return pa.table(texts)


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise GeoError(f"{path} is not a CSV file in UTF-8: {error}") from None
    except OSError as error:
        raise GeoError(f"cannot read {path}: {error.strerror}") from None
    if len(set(header)) < len(header):
        raise GeoError(f"{path} names a column twice: {', '.join(header)}")
    return header


def clean(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strip text (N,) of space around it; null where it is missing or only says so."""
    text = pc.utf8_trim_whitespace(text)
    return pc.if_else(pc.is_in(text, value_set=pa.array(MISSING)), pa.scalar(None, pa.string()), text)


def degrees(text: pa.ChunkedArray, limit: float) -> pa.ChunkedArray:
    """Parse text (N,) as degrees (N,) float64; null where it is no number or outside -limit..limit."""
    is_number = pc.match_substring_regex(text, NUMBER)
    number = pc.cast(pc.if_else(is_number, text, pa.scalar(None, pa.string())), pa.float64())
    return pc.if_else(pc.less_equal(pc.abs(number), limit), number, pa.scalar(None, pa.float64()))


def photo_rows(path: Path, left_out: LeftOut, needed: Sequence[str] = (), optional: Sequence[str] = ()) -> pa.Table:
    """Return a CSV's usable rows: id, lat, lon in degrees, and the other columns as text.

    The id is IMG_ID with ``_`` for ``/``, as the pictures are named. What is not usable is counted: broken lines, rows
    without id, without a value in a needed column, without coordinates on Earth, and ids that were there before.
    """
    table = read_csv(path, left_out, ("IMG_ID", "LAT", "LON", *needed), optional)
    columns = {"id": pc.replace_substring(table["IMG_ID"], "/", "_")}
    columns |= {"lat": degrees(table["LAT"], 90.0), "lon": degrees(table["LON"], 180.0)}
    columns |= {name: table[name] for name in (*needed, *optional)}
    table = pa.table(columns)
    table = left_out.drop(table, pc.is_null(table["id"]), "without an id")
    for name in needed:
        table = left_out.drop(table, pc.is_null(table[name]), f"without a {name}")
    outside = pc.or_(pc.is_null(table["lat"]), pc.is_null(table["lon"]))
    table = left_out.drop(table, outside, "without usable coordinates")
    codes = table["id"].combine_chunks().dictionary_encode().indices.to_numpy()
    again = np.ones(len(table), bool)
    again[np.unique(codes, return_index=True)[1]] = False
    return left_out.drop(table, again, "listed before")
