"""This source, ``folder:DIR``, reads picture files, with coordinates from ``photos.csv`` or from their EXIF tags."""

from __future__ import annotations

import csv
import math
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.metadata import check_header, open_csv
from rag_geotoken.photos.pictures import exif_lat_lon, list_pictures
from rag_geotoken.photos.table import SCHEMA, parse

CSV_NAME = "photos.csv"
NEEDED, KNOWN = ("file", "lat", "lon"), ("file", "lat", "lon", "place", "author")


def read(rest: Path | str) -> pa.Table:
    """Read the photos table of ``DIR[,limit=N][,seed=S]``, sorted by path.

    Columns: id (path within the folder), image (path), lat, lon, place, author. A photo in ``photos.csv`` (file, lat,
    lon[, place, author]) takes everything from its line: empty cells mean unknown. Any other photo takes its
    coordinates from its GPS tags. Unknown values are null.

    Raises:
        GeoError: the folder is missing or holds no picture, or ``photos.csv`` is wrong, with the line's number.
    """
    settings = parse(str(rest))
    directory = Path(settings.where)
    if not directory.is_dir():
        raise GeoError(f"there is no folder {directory}")
    pictures = {Path(path).relative_to(directory).as_posix(): path for path in list_pictures(directory)}
    listed = _read_csv(directory / CSV_NAME, pictures) if (directory / CSV_NAME).exists() else {}
    photos, names = [], list(pictures)
    for name in (names[row] for row in settings.choose(len(names))):
        if name not in listed:
            lat, lon = exif_lat_lon(pictures[name]) or (None, None)
            listed[name] = {"lat": lat, "lon": lon}
        photos.append({"id": name, "image": pictures[name], **listed[name]})
    return pa.Table.from_pylist(photos, schema=SCHEMA)  # null where a column is not given


def _read_csv(path: Path, pictures: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Read lat, lon, place, author from ``photos.csv``, keyed by the picture's path within the folder."""
    listed: dict[str, dict[str, Any]] = {}
    with open_csv(path, CSV_NAME) as file:
        reader = csv.reader(file, strict=True)
        header = [name.strip() for name in next(reader, [])]
        check_header(CSV_NAME, header, NEEDED, KNOWN)
        for cells in reader:
            where = f"{CSV_NAME} line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise GeoError(f"{where}: {len(cells)} cells under {len(header)} columns")
            row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
            name = PurePosixPath(row["file"]).as_posix()
            if name not in pictures:
                raise GeoError(f"{where}: there is no picture {row['file']!r} in the folder")
            if name in listed:
                raise GeoError(f"{where}: {row['file']!r} is listed a second time")
            lat = _degrees(row["lat"], "latitude", limit=90.0, where=where)
            lon = _degrees(row["lon"], "longitude", limit=180.0, where=where)
            if (lat is None) != (lon is None):
                raise GeoError(f"{where}: latitude and longitude must both be given or both be empty")
            listed[name] = {"lat": lat, "lon": lon}
            listed[name] |= {column: row.get(column) or None for column in ("place", "author")}
    return listed


def _degrees(text: str, name: str, limit: float, where: str) -> float | None:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise GeoError(f"{where}: {name} {text!r} is not a number")
    if abs(number) > limit:
        raise GeoError(f"{where}: {name} {number} is outside -{limit:.0f}..{limit:.0f}")
    return number
