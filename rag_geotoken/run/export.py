"""These functions write predictions as Parquet, CSV, JSON lines, GeoJSON or KML, by the file's ending."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import check_writable, write_text
from rag_geotoken.storage.parquet import write_table

if TYPE_CHECKING:
    import pyarrow as pa

NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2


def check_output(path: Path) -> None:
    """Raise GeoError when predictions cannot be written to this file, for its ending or its folder."""
    if path.suffix.lower() not in (".parquet", *_FORMATS):
        raise GeoError(f"cannot write {path.name}: choose an ending among .parquet, {', '.join(_FORMATS)}")
    check_writable(path.parent)


def write_predictions(path: Path, predictions: pa.Table) -> None:
    """Write a table of predictions; a photo without an answer keeps its line, with its error and no place."""
    if path.suffix.lower() == ".parquet":
        write_table(path, predictions)
    else:
        write_text(path, _FORMATS[path.suffix.lower()](predictions))


def _csv(table: pa.Table) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, table.column_names)
    writer.writeheader()
    for row in table.to_pylist():
        writer.writerow({name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()})
    return text.getvalue()


def _json_lines(table: pa.Table) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())


def _geojson(table: pa.Table) -> str:
    features = []
    for row in table.to_pylist():
        name, lat, lon = (row.pop(key) for key in ("id", "lat", "lon"))
        # GeoJSON is the one format that puts longitude first (RFC 7946).
        point = None if lat is None else {"type": "Point", "coordinates": [lon, lat]}
        features.append({"type": "Feature", "id": name, "geometry": point, "properties": row})
    return json.dumps({"type": "FeatureCollection", "features": features}, ensure_ascii=False) + "\n"


def _kml(table: pa.Table) -> str:
    marks = []
    for row in table.to_pylist():
        lat, lon, error = row["lat"], row["lon"], row["error"]
        place = "" if lat is None else f"<Point><coordinates>{lon},{lat}</coordinates></Point>"
        reason = f"<description>{escape(error)}</description>" if error else ""
        marks.append(f"<Placemark><name>{escape(str(row['id']))}</name>{place}{reason}</Placemark>")
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<kml xmlns="http://www.opengis.net/kml/2.2"><Document>\n'
    return head + NO_XML.sub("\ufffd", "\n".join(marks)) + "\n</Document></kml>\n"


_FORMATS: dict[str, Callable[[pa.Table], str]]
_FORMATS = {".csv": _csv, ".jsonl": _json_lines, ".geojson": _geojson, ".kml": _kml}
