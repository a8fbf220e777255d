"""These sources, ``im2gps3k:DIR`` and ``yfcc4k:DIR``, read two common test sets, each a CSV and a folder of pictures.

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
    """Read the photos table of the test set ``name`` from ``DIR[,limit=N][,seed=S]``.

    Columns: id, image, lat, lon, place, author. A photo whose picture is missing keeps its row: it fails when it is
    loaded and stays in the denominator. A remark in the table's metadata says how many. Raises GeoError when the folder
    or its CSV is missing or wrong.
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
    directories = [folder / inside for inside in FOLDERS[name] if (folder / inside).is_dir()]
    # An id becomes part of a path only after it is found in a listing, so that none leads out of the folder.
    directory_of: dict[str, Path] = {}
    for directory in reversed(directories):
        directory_of |= dict.fromkeys(os.listdir(directory), directory)
    if missing := sum(photo not in directory_of for photo in ids):
        left_out.remarks.append(f"{missing:,} of {len(ids):,} pictures are missing in {directories[0]}")
    author = pc.coalesce(rows["AUTHOR"], rows["OwnerNSID"])
    image = [str(directory_of.get(photo, directories[0]) / photo) for photo in ids]
    return photos_table({"id": ids, "image": image, "lat": rows["lat"], "lon": rows["lon"], "author": author}, left_out)
