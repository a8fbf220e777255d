"""Small collections in the true formats: MP16-Pro's CSV and tar, the pictures made here."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

# The columns of MP16_Pro_places365.csv, in its order.
COLUMNS = (
    "IMG_ID", "AUTHOR", "LAT", "LON", "S3_Label", "S16_Label", "S365_Label", "Prob_indoor", "Prob_natural",
    "Prob_urban", "neighbourhood", "city", "county", "state", "region", "country", "country_code", "continent",
)  # fmt: skip
WHOLE = {"city": "Wien", "county": "Bezirk 1", "state": "Wien", "country": "Österreich", "neighbourhood": "a, b"}


@cache
def jpeg(seed: int, side: int = 96) -> bytes:
    """A JPEG of noise: about 7 KB at 96 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def write_csv(path: Path, rows: Iterable[Mapping[str, object]], columns: Iterable[str] = COLUMNS) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_tar(
    path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT
) -> None:
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("./images")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in pairs:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def flickr_id(i: int) -> str:
    """As in the CSV; the tar has ``_`` for ``/``."""
    return f"{i:02x}/{7 * i % 256:02x}/{5_000_000_000 + i}.jpg"


def mp16_pro(folder: Path, count: int = 24) -> Path:
    """A folder with a CSV and a tar of photos that all can be used, at latitude i, longitude -i."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [flickr_id(i) for i in range(count)]
    rows = [WHOLE | {"IMG_ID": ids[i], "AUTHOR": f"{i % 5}@N00", "LAT": i, "LON": -i} for i in range(count)]
    write_csv(folder / "MP16_Pro_places365.csv", rows)
    # Another order than the CSV's, as in truth.
    order = np.random.default_rng(0).permutation(count).tolist()
    write_tar(folder / "mp-16-images.tar", {f"./images/{ids[i].replace('/', '_')}": jpeg(i) for i in order})
    return folder
