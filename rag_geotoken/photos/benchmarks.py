"""The sources `im2gps3k:DIR` and `yfcc4k:DIR` are the papers' test sets, a CSV and a folder of pictures each.

Sets: Vo, Jacobs, Hays, Revisiting IM2GPS in the deep learning era (ICCV 2017); CSVs: TIBHannover/GeoEstimation.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.metadata import photo_rows
from rag_geotoken.photos.table import LeftOut, parse, photos_table

# Where the pictures lie: the folder that the set's archive makes, the one of G3's code, or beside the CSV.
FOLDERS = {"im2gps3k": ("im2gps3ktest", "images", "."), "yfcc4k": ("yfcc4k", "images", ".")}


def read(name: str, rest: str) -> pa.Table:
    """Read the photos table of ``im2gps3k`` or ``yfcc4k``, ``DIR[,limit=N][,seed=S]``.

    A photo whose picture is missing keeps its row: it fails when it is loaded and stays in the denominator. A remark
    in the table's schema says how many. Raises GeoError when the folder or its CSV is missing or wrong.
    """
    settings = parse(rest)
    folder = Path(settings.where)
    path = folder / f"{name}_places365.csv"
    if not path.is_file():
        raise GeoError(f"there is no {path}: download the metadata of {name} into {folder}")
    left_out = LeftOut()
    rows = photo_rows(path, left_out, optional=["AUTHOR", "OwnerNSID"])
    rows = rows.take(settings.choose(len(rows)))
    if not len(rows):
        raise GeoError(f"{path} lists no photo with coordinates")
    ids = rows["id"].to_pylist()
    places = [folder / inside for inside in FOLDERS[name] if (folder / inside).is_dir()]
    # Looked up in listings: an id takes part in no path before it is known to be the name of a file there.
    found: dict[str, Path] = {}
    for place in reversed(places):
        found |= dict.fromkeys(os.listdir(place), place)
    missing = [photo for photo in ids if photo not in found]
    if missing:
        left_out.remarks.append(f"{len(missing):,} of {len(ids):,} pictures are missing in {places[0]}")
    author = pc.coalesce(rows["AUTHOR"], rows["OwnerNSID"])
    image = [str(found.get(photo, places[0]) / photo) for photo in ids]
    return photos_table({"id": ids, "image": image, "lat": rows["lat"], "lon": rows["lon"], "author": author}, left_out)
