"""This source, ``hub:NAME``, reads a data set of a hub, or a local one, as a stream of the library `datasets`.

A stream is read from its start only, and a picture in a Parquet file only with its whole row group, but later stages
read single pictures, several times. So the photos are copied once, byte for byte, into a tar in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.metadata import MISSING
from rag_geotoken.photos.pictures import BYTE_CAP
from rag_geotoken.photos.table import SCHEMA, LeftOut, Settings, parse, photos_table, read_left_out
from rag_geotoken.photos.tar import references
from rag_geotoken.storage.files import cache_folder, write_whole
from rag_geotoken.storage.parquet import read_table, write_table
from rag_geotoken.storage.progress import progress_bar

# Usual names of the columns in data sets, in any case; the first that exists is read.
NAMES = {
    "image": ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp"),
    "lat": ("lat", "latitude", "gps_lat"),
    "lon": ("lon", "lng", "long", "longitude", "gps_lon"),
    "id": ("id", "img_id", "image_id", "photo_id", "key", "__key__"),
    "place": ("place",),
    "author": ("author", "ownernsid", "owner", "user_id"),
}
SHUFFLED = 1000  # rows of the shuffle buffer, in memory with their pictures


def read(rest: str) -> pa.Table:
    """Read the photos table of ``NAME[,config=C][,split=S][,revision=R][,limit=N][,seed=S]``.

    Columns: id, image, lat, lon, place, author. ``NAME`` is a data set of the hub, or a local path: a folder of Parquet
    files or pictures, the output of `save_to_disk`, or one Parquet file. ``limit`` takes the first usable photos. With
    ``seed`` the files are shuffled, and so are 1,000 rows at a time: a random subset, nearly uniform, without reading
    all. A data set of the hub is copied once for its name and revision; the folder is printed on standard error, and
    can be deleted to copy it again. Raises GeoError when the data set does not exist or has no pictures.
    """
    settings = parse(rest, ("limit", "seed", "config", "split", "revision"))
    folder = cache_folder() / "hub" / _key(settings)
    tar, kept = folder / "photos.tar", folder / "photos.parquet"
    if not (tar.is_file() and kept.is_file()):
        _copy(settings, tar, kept)
    table = read_table(kept)
    columns = {name: table[name] for name in ("id", "lat", "lon", "place", "author")}
    return photos_table(columns | {"image": references([tar], table)}, read_left_out(table))


def _key(settings: Settings) -> str:
    """Return a folder name that depends on the settings and, for a local data set, on its files."""
    path, state = Path(settings.where), list[tuple[str, int, int]]()
    if path.exists():
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([1, vars(settings), state], sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _copy(settings: Settings, tar: Path, kept: Path) -> None:
    """Copy the pictures into a tar, then write their table, with file, offset and size."""
    rows, left_out = list[dict[str, Any]](), LeftOut()
    stream = _stream(settings)
    split = (stream.info.splits or {}).get(str(stream.split))
    total = settings.limit or (split and split.num_examples) or 0

    def write(beside: Path) -> None:
        bar = progress_bar(total, f"copy of hub:{settings.where}") if total else nullcontext(lambda n: None)
        # Names of 8 digits always fit this format's one header block.
        with bar as advance, tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as file:
            for row, picture in _photos(stream, settings, left_out):
                member = tarfile.TarInfo(f"{len(rows):08d}")
                member.size = len(picture)
                rows.append(row | {"file": 0, "offset": file.offset + tarfile.BLOCKSIZE, "size": len(picture)})
                file.addfile(member, BytesIO(picture))
                advance(1)
                if len(rows) == settings.limit:
                    break
        if not rows:
            raise GeoError(f"hub:{settings.where} gives no photo: {left_out.line() or 'it is empty'}")

    write_whole(tar, write)
    fields = [field for field in SCHEMA if field.name != "image"]
    fields += [pa.field(name, pa.int64()) for name in ("file", "offset", "size")]
    schema = pa.schema(fields, {"left_out": json.dumps(vars(left_out), ensure_ascii=False)})
    write_table(kept, pa.Table.from_pylist(rows, schema))
    print(f"hub:{settings.where}: {len(rows):,} photos copied into {tar.parent}", file=sys.stderr)


def _stream(settings: Settings) -> Any:
    """Open a stream of the data set's rows, pictures not decoded. Raises GeoError when it cannot be opened."""
    import datasets

    path, name = Path(settings.where), settings.where
    try:
        if path.is_file():
            opened = datasets.load_dataset("parquet", data_files=str(path), streaming=True)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            opened = datasets.load_from_disk(str(path))
        elif path.is_dir():
            opened = datasets.load_dataset(str(path.resolve()), settings.config, streaming=True)
        else:
            opened = datasets.load_dataset(name, settings.config, revision=settings.revision, streaming=True)
    except Exception as error:
        where = "" if path.exists() else ": check the name and the network, or give a local copy, hub:FOLDER"
        raise GeoError(f"data set {name} cannot be opened ({_line(error)}){where}") from None
    if isinstance(opened, dict):
        splits = list(opened)
        split = settings.split or (splits[0] if len(splits) == 1 else "train")
        if split not in splits:
            raise GeoError(f"data set {name} has no split {split!r}: choose split= one of {', '.join(splits)}")
        opened = opened[split]
    stream = opened.to_iterable_dataset() if isinstance(opened, datasets.Dataset) else opened
    stream = stream.decode(False)
    return stream if settings.seed is None else stream.shuffle(seed=settings.seed, buffer_size=SHUFFLED)


def _photos(stream: Any, settings: Settings, left_out: LeftOut) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield every usable photo of a stream: id, lat, lon, place, author, and the picture's bytes."""
    columns: dict[str, str | None] = {}
    used = set[str]()
    for number, row in enumerate(_rows(stream, settings.where)):
        columns = columns or _columns(row, settings.where, left_out)
        cells = {kind: row.get(column) if column else None for kind, column in columns.items()}
        photo: dict[str, Any] = {kind: _text(cells[kind]) for kind in ("id", "place", "author")}
        photo["id"] = photo["id"] or f"{number:08d}"
        photo |= {"lat": _degrees(cells["lat"], 90.0), "lon": _degrees(cells["lon"], 180.0)}
        picture = _bytes(cells["image"], Path(settings.where))
        if columns["lat"] and (photo["lat"] is None or photo["lon"] is None):
            reason = "without usable coordinates"
        elif photo["id"] in used:
            reason = "listed before"
        elif not picture:
            reason = "without a picture"
        elif len(picture) > BYTE_CAP:
            reason = f"larger than {BYTE_CAP // 1_000_000} MB"
        else:
            used.add(photo["id"])
            yield photo, picture
            continue
        left_out.add(reason, 1, [photo["id"]])


def _rows(stream: Any, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from stream
    except Exception as error:  # of the network, of a file of any format, of a library for it
        raise GeoError(f"data set {name} cannot be read to its end ({_line(error)})") from None


def _columns(row: dict[str, Any], name: str, left_out: LeftOut) -> dict[str, str | None]:
    """Find the data set's column for each kind in `NAMES`; None where it has none."""
    by_name = {column.lower(): column for column in row}
    columns = {kind: next((by_name[name] for name in names if name in by_name), None) for kind, names in NAMES.items()}
    if columns["image"] is None:
        raise GeoError(f"data set {name} has no column {', '.join(NAMES['image'][:3])}: it has {', '.join(row)}")
    if columns["lat"] is None or columns["lon"] is None:
        columns["lat"] = columns["lon"] = None
        left_out.remarks.append(f"no coordinates: none of the columns {', '.join(row)} is called lat and lon")
    return columns


def _bytes(value: Any, folder: Path) -> bytes | None:
    """Return the bytes of a picture's file. A path is followed only into the local data set, or back to the hub."""
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if value is not None or not isinstance(path, str):
        return value if isinstance(value, bytes) else None
    on_hub = re.match(r"(zip://[^:]*::)?hf://", path) and not folder.exists()
    inside = folder.is_dir() and Path(path).resolve().is_relative_to(folder.resolve())
    if not on_hub and not inside:
        return None
    import fsspec

    with suppress(FileNotFoundError, IsADirectoryError), fsspec.open(path, "rb") as file:
        return bytes(file.read(BYTE_CAP + 1))
    return None


def _text(value: Any) -> str | None:
    text = "" if value is None else str(value).strip().encode("utf-8", "replace").decode()
    return None if text in MISSING else text


def _degrees(value: Any, limit: float) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and abs(number) <= limit else None


def _line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error) or type(error).__name__)[:300]
