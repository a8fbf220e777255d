"""This source, ``mp16-pro:DIR``, reads the gallery MP16-Pro as downloaded: photos in a tar, metadata in a CSV.

Format and rules: Jia et al., G3 (NeurIPS 2024), and the data set Jia-py/MP16-Pro on the hub.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.metadata import photo_rows
from rag_geotoken.photos.table import LeftOut, parse, photos_table
from rag_geotoken.photos.tar import references, tar_files, tar_index

TAR = "mp-16-images"
CSV_NAMES = ("MP16_Pro_places365.csv", "MP16_Pro_filtered.csv")
PARTS = ("city", "state", "country")
SMALLEST = 5 * 1024  # bytes; a picture of this size or below says only that the photo is gone


def read(rest: str) -> pa.Table:
    """Read the photos table of ``DIR[,limit=N][,seed=S]``: id, image, lat, lon, place, author, in the tar's order.

    ``DIR`` holds ``mp-16-images.tar``, or its pieces ``mp-16-images00``, ``01``, ... as they are downloaded, and one of
    the two CSVs, which may also lie in ``metadata/``; of both, the fuller one is read. ``place`` is G3's text of city,
    state and country. Photos without country, usable coordinates or a picture above 5 KB are left out, and counted in
    the table's metadata. Raises GeoError when a file is missing or no photo is left.
    """
    settings = parse(rest)
    folder = Path(settings.where)
    if not folder.is_dir():
        raise GeoError(f"there is no folder {folder}")
    paths = [directory / name for name in CSV_NAMES for directory in (folder, folder / "metadata")]
    metadata = next((path for path in paths if path.is_file()), None)
    if metadata is None:
        raise GeoError(f"{folder} holds neither {' nor '.join(CSV_NAMES)}: download one of them into it")
    files = tar_files(folder, TAR)
    if not files:
        raise GeoError(f"{folder} holds neither {TAR}.tar nor its pieces {TAR}00 and on: download the photos into it")

    left_out = LeftOut()
    rows = photo_rows(metadata, left_out, needed=["country"], optional=["city", "state", "AUTHOR"])
    rows = _with_pictures(rows, tar_index(files), left_out)
    if not len(rows):
        raise GeoError(f"{files[0].name} in {folder} holds no photo of {metadata.name}: are they of one data set?")
    # In the order of the tar a disk reads from front to back, and the first N photos lie side by side.
    order = np.lexsort((rows["offset"].to_numpy(), rows["file"].to_numpy()))
    rows = rows.take(order[settings.choose(len(rows))])
    names = pc.binary_join_element_wise(*(rows[part] for part in PARTS), ", ", null_handling="skip")
    place = pc.binary_join_element_wise("A street view photo taken in ", names, "")
    columns = {"image": references(files, rows), "author": rows["AUTHOR"], "place": place}
    return photos_table(columns | {name: rows[name] for name in ("id", "lat", "lon")}, left_out)


def _with_pictures(rows: pa.Table, index: pa.Table, left_out: LeftOut) -> pa.Table:
    """Keep the rows whose picture is whole in the tar; add its file, offset and size."""
    cut_off = json.loads(index.schema.metadata[b"tar"])["cut_off"]
    if cut_off is not None:
        left_out.remarks.append(f"the tar is cut off or broken at byte {cut_off:,}, {len(index):,} members are whole")
    positions = pc.index_in(rows["id"], value_set=index["name"])
    rows = left_out.drop(rows, pc.is_null(positions), "without a picture in the tar")
    members = index.take(positions.drop_null())
    for name in ("file", "offset", "size"):
        rows = rows.append_column(name, members[name])
    rows = left_out.drop(rows, pc.less_equal(rows["size"], SMALLEST), "of 5 KB or less")
    return left_out.drop(rows, pc.less(rows["file"], 0), "across two pieces of the tar")
