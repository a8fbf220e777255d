"""The source `hub:NAME` is a data set of a hub, or a local one, read through `datasets` in streaming.

A stream is read from its start only, and a picture in a Parquet file only with its whole row group; later stages want
single pictures, and want them again. So the photos asked for are copied once, their bytes as they are, into a tar in
the cache folder, and are read from there as those of MP16-Pro are from theirs.
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

# What the columns are called in data sets, any case; the first that is there counts.
NAMES = {
    "image": ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp"),
    "lat": ("lat", "latitude", "gps_lat"),
    "lon": ("lon", "lng", "long", "longitude", "gps_lon"),
    "id": ("id", "img_id", "image_id", "photo_id", "key", "__key__"),
    "place": ("place",),
    "author": ("author", "ownernsid", "owner", "user_id"),
}
SHUFFLED = 1000  # rows a random subset is drawn from at a time, in memory with their pictures
LINES = re.compile(r"\s+")


def read(rest: str) -> pa.Table:
    """Read the photos table of ``NAME[,config=C][,split=S][,revision=R][,limit=N][,seed=S]``.

    Columns: id, image, lat, lon, place, author. ``NAME`` is a data set of the hub, or a local path: a folder of Parquet
    files or pictures, what `save_to_disk` wrote, or one Parquet file. ``limit`` takes the first usable photos. With
    ``seed`` the files are shuffled, and so are 1,000 rows at a time: a random subset, nearly uniform, without reading
    all. A data set of the hub is copied once for its name and revision; its folder is said on standard error, and can
    be deleted to copy it anew. Raises GeoError when the data set is not there or has no pictures.
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
    """A folder's name for what is asked for; that of a local data set changes with its files."""
    path, state = Path(settings.where), list[tuple[str, int, int]]()
    if path.exists():
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([1, vars(settings), state], sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _copy(settings: Settings, tar: Path, kept: Path) -> None:
    """Copy the pictures asked for into a tar, then the table of them, with file, offset and size."""
    rows, left_out = list[dict[str, Any]](), LeftOut()
    stream = _stream(settings)
    splits, split = stream.info.splits or {}, str(stream.split)
    total = settings.limit or (splits[split].num_examples if split in splits else 0) or 0

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
    """The data set's rows, pictures not decoded. Raises GeoError when it is not there."""
    import datasets

    path, name = Path(settings.where), settings.where
    try:
        if path.is_file():
            found = datasets.load_dataset("parquet", data_files=str(path), streaming=True)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
        elif path.is_dir():
            found = datasets.load_dataset(str(path.resolve()), settings.config, streaming=True)
        else:
            found = datasets.load_dataset(name, settings.config, revision=settings.revision, streaming=True)
    except Exception as error:
        where = "" if path.exists() else ": check the name and the network, or give a local copy, hub:FOLDER"
        raise GeoError(f"data set {name} cannot be opened ({_line(error)}){where}") from None
    if isinstance(found, dict):
        splits = list(found)
        split = settings.split or (splits[0] if len(splits) == 1 else "train")
        if split not in splits:
            raise GeoError(f"data set {name} has no split {split!r}: choose split= one of {', '.join(splits)}")
        found = found[split]
    stream = found.to_iterable_dataset() if isinstance(found, datasets.Dataset) else found
    stream = stream.decode(False)
    return stream if settings.seed is None else stream.shuffle(seed=settings.seed, buffer_size=SHUFFLED)


def _photos(stream: Any, settings: Settings, left_out: LeftOut) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Every usable photo of a stream: id, lat, lon, place, author, and the picture's bytes."""
    columns: dict[str, str | None] = {}
    seen = set[str]()
    for number, row in enumerate(_rows(stream, settings.where)):
        if not columns:
            columns = _columns(row, settings.where, left_out)
        image, lat, lon, id_, place, author = (None if name is None else row.get(name) for name in columns.values())
        photo: dict[str, Any] = {"id": _text(id_) or f"{number:08d}"}
        photo |= {"lat": _number(lat, 90.0), "lon": _number(lon, 180.0)}
        photo |= {"place": _text(place), "author": _text(author)}
        picture = _bytes(image, Path(settings.where))
        if columns["lat"] and (photo["lat"] is None or photo["lon"] is None):
            left_out.add("without usable coordinates", 1, [photo["id"]])
        elif photo["id"] in seen:
            left_out.add("listed before", 1, [photo["id"]])
        elif not picture:
            left_out.add("without a picture", 1, [photo["id"]])
        elif len(picture) > BYTE_CAP:
            left_out.add(f"larger than {BYTE_CAP // 1_000_000} MB", 1, [photo["id"]])
        else:
            seen.add(photo["id"])
            yield photo, picture


def _rows(stream: Any, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from stream
    except Exception as error:  # of the network, of a file of any format, of a library for it
        raise GeoError(f"data set {name} cannot be read to its end ({_line(error)})") from None


def _columns(row: dict[str, Any], name: str, left_out: LeftOut) -> dict[str, str | None]:
    """The names of the data set's columns for image, lat, lon, id, place, author, in that order."""
    given = {column.lower(): column for column in row}
    columns = {kind: next((given[name] for name in names if name in given), None) for kind, names in NAMES.items()}
    if columns["image"] is None:
        raise GeoError(f"data set {name} has no column {', '.join(NAMES['image'][:3])}: it has {', '.join(row)}")
    if columns["lat"] is None or columns["lon"] is None:
        columns["lat"] = columns["lon"] = None
        left_out.remarks.append(f"no coordinates: none of the columns {', '.join(row)} is called lat and lon")
    return columns


def _bytes(value: Any, folder: Path) -> bytes | None:
    """The picture's file as it is. A path is followed only into the local data set, or back to the hub."""
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
        if value is None and isinstance(path, str):
            return _file(path, folder)
    return value if isinstance(value, bytes) else None


def _file(path: str, folder: Path) -> bytes | None:
    on_hub = re.match(r"(zip://[^:]*::)?hf://", path) and not folder.exists()
    inside = folder.is_dir() and Path(path).resolve().is_relative_to(folder.resolve())
    if not on_hub and not inside:
        return None
    import fsspec

    with suppress(FileNotFoundError, IsADirectoryError), fsspec.open(path, "rb") as file:
        data: bytes = file.read(BYTE_CAP + 1)
        return data
    return None


def _text(value: Any) -> str | None:
    text = "" if value is None else str(value).strip().encode("utf-8", "replace").decode()
    return None if text in MISSING else text


def _number(value: Any, limit: float) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and abs(number) <= limit else None


def _line(error: Exception) -> str:
    return LINES.sub(" ", str(error) or type(error).__name__)[:300]
