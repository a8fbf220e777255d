"""These functions turn what a user names (pictures, folders, CSV files, sources) into one photos table."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pyarrow as pa

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.pictures import list_pictures
from rag_geotoken.photos.sources import limited, read_source, source_module
from rag_geotoken.photos.table import SCHEMA, read_left_out


def read_photos(photos: list[str], limit: int | None = None) -> pa.Table:
    """Read pictures, folders, CSV files with a column ``image`` and sources as one photos table, each photo once.

    Coordinates of a source are kept as the ground truth; those in EXIF are not read. ``limit`` takes the first photos
    of all inputs together. Raises GeoError for an empty folder, a missing file or a CSV without the column.
    """
    tables, paths = [], list[str]()
    for photo in photos:
        if source_module(photo):
            tables.append(read_source(limited(photo, limit)))
            if line := read_left_out(tables[-1]).line():
                print(f"{photo}: {line}", file=sys.stderr)
        elif photo.lower().endswith(".csv"):
            paths += _csv_images(Path(photo))
        else:
            paths += list_pictures(photo)
    unique = list(dict.fromkeys(paths))
    for path in unique:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise GeoError(f"the file name {path!r} is not UTF-8: rename the file") from None
    if unique:
        tables.append(pa.Table.from_pylist([{"id": path, "image": path} for path in unique], SCHEMA))
    return pa.concat_tables(tables).slice(0, limit)


def _csv_images(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "image" not in (reader.fieldnames or []):
                raise GeoError(f"{path} has no column 'image': name the pictures' paths in one")
            return [str(path.parent / row["image"]) for row in reader if row["image"]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GeoError(f"cannot read {path}: {error}") from None
