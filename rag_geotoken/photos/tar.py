"""These functions read pictures inside a tar without unpacking it: an index of its members, references, and bytes.

The tar may also be a series of pieces (``NAME00``, ``NAME01``, ...), as hubs with a limit on file sizes keep it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from io import FileIO
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import cache_folder
from rag_geotoken.storage.parquet import read_table, write_table
from rag_geotoken.storage.progress import progress_bar

SCHEME = "tar:"
REFERENCE = re.compile(SCHEME + r"(.+)#([0-9]{1,16})\+([0-9]{1,12})", re.DOTALL)
BLOCK = tarfile.BLOCKSIZE
HEADER_CAP = 1 << 20  # bytes; names and attributes of one member are far below
BATCH = 65_536  # members
SCHEMA = pa.schema({"name": pa.string(), "file": pa.int16(), "offset": pa.int64(), "size": pa.int64()})


def tar_files(folder: Path, name: str) -> list[Path]:
    """Find ``folder/NAME.tar``, or else its pieces NAME00, NAME01, ... up to the first gap; empty where none exists."""
    whole = folder / f"{name}.tar"
    if whole.is_file():
        return [whole]
    pieces: list[Path] = []
    while (piece := folder / f"{name}{len(pieces):02d}").is_file():
        pieces.append(piece)
    return pieces


def tar_index(files: list[Path]) -> pa.Table:
    """Return the members of a tar: name (without folders), file, offset and size in bytes.

    ``file`` is a position in ``files``, -1 for a member across two of them. Of members with one name only the last is
    listed, as tar extracts it. The schema's metadata ``tar`` is JSON with ``cut_off``: the byte where a truncated tar
    ends, or null. The index is built once, then kept as ``NAME.index.parquet`` beside the tar, or in the cache folder
    where that cannot be written, until the tar changes in size or time. Raises GeoError.
    """
    state = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    beside = files[0].with_name(f"{files[0].name.removesuffix('.tar')}.index.parquet")
    key = hashlib.sha256(str(beside.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
    cached = cache_folder() / "tar" / f"{key}.parquet"
    for path in (beside, cached):
        if (table := _read_index(path, state)) is not None:
            return table
    table = _scan(files, state)
    try:
        write_table(beside, table)
    except GeoError:
        write_table(cached, table)
        print(f"{beside.parent} cannot be written: the index of {files[0].name} is kept in {cached}", file=sys.stderr)
    return table


def references(files: list[Path], index: pa.Table) -> pa.Array:
    """Make picture references ``tar:PATH#OFFSET+SIZE`` of rows of the index."""
    paths = pa.array([f"{SCHEME}{file}#" for file in files])
    offset, size = (pc.cast(index[name], pa.string()) for name in ("offset", "size"))
    return pc.binary_join_element_wise(pc.take(paths, index["file"]), offset, "+", size, "")


def read_member(reference: str, cap: int) -> bytes:
    """Read the bytes of the member that a reference names; more than ``cap`` are an error.

    A reference is not trusted: at its offset there must be a tar header of a plain file of that size, all in the file.
    Raises GeoError with the reason, without the reference; OSError for a file that is missing or may not be read.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise GeoError("not a reference to a picture in a tar")
    path, offset, size = match[1], int(match[2]), int(match[3])
    if size > cap:
        raise GeoError(f"larger than {cap // 1_000_000} MB")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would block
        raise GeoError("not a file")
    if offset < BLOCK or offset + size > status.st_size:
        raise GeoError("the place lies outside the tar: it is cut off, or not the one that was read")
    with open(path, "rb") as file:
        file.seek(offset - BLOCK)
        data = file.read(BLOCK + size)
    try:
        header = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        header = None
    if header is None or not _is_plain(header) or header.size != size or len(data) < BLOCK + size:
        raise GeoError("no picture of the tar begins there: the tar has changed")
    return data[BLOCK:]


def _is_plain(member: tarfile.TarInfo) -> bool:
    # isreg() is also true of sparse files, whose bytes are not contiguous.
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)


def _read_index(path: Path, state: list[list[Any]]) -> pa.Table | None:
    """Read the index kept at a path; None where it is broken or of another state of the tar."""
    try:
        table = read_table(path)
        fits = json.loads(table.schema.metadata[b"tar"])["files"] == state and table.schema.equals(SCHEMA)
    except (GeoError, KeyError, TypeError, ValueError):
        return None
    return table if fits else None


def _scan(files: list[Path], state: list[list[Any]]) -> pa.Table:
    """Read the headers one after another; the data between them is not read."""
    batches, done = [SCHEMA.empty_table()], 0
    with _JoinedFiles(files) as joined, progress_bar(joined.size >> 20, f"index of {files[0].name}, MB") as advance:
        members = _members(joined)
        while batch := list(islice(members, BATCH)):
            batches.append(pa.Table.from_pylist(batch, SCHEMA))
            advance((joined.position >> 20) - done)
            done = joined.position >> 20
    table = pa.concat_tables(batches).combine_chunks()
    backwards = table["name"].combine_chunks()[::-1]
    is_last = pc.index_in(backwards, value_set=backwards).to_numpy() == np.arange(len(table))
    table = table.filter(pa.array(is_last[::-1]))
    return table.replace_schema_metadata({"tar": json.dumps({"files": state, "cut_off": joined.cut_off})})


def _members(joined: _JoinedFiles) -> Iterator[dict[str, Any]]:
    """Yield every whole plain member as a row of the index, then set ``joined.cut_off``."""
    end = 0  # of the last whole member
    open_tar: Any = tarfile.open  # its types know neither a file of one's own nor `members`
    try:
        with open_tar(fileobj=joined, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            # A size may be made to lead backwards, and round in a circle.
            while (member := tar.next()) is not None and tar.offset > end:
                tar.members.clear()  # or millions of them stay in memory
                if member.offset_data + member.size > joined.size:
                    break
                end = tar.offset
                if _is_plain(member):
                    file, offset = joined.locate(member.offset_data - BLOCK, BLOCK + member.size)
                    name = member.name.rpartition("/")[2].encode("utf-8", "replace").decode()
                    yield {"name": name, "file": file, "offset": offset + BLOCK, "size": member.size}
    except tarfile.TarError as error:
        if end == 0:
            raise GeoError(f"{joined.name} is not a tar file: {error}") from None
    joined.seek(end)
    joined.cut_off = None if joined.read(BLOCK) == bytes(BLOCK) else end


class _JoinedFiles(ExitStack):
    """This class joins the files of a tar for `tarfile`, as one open file that is not buffered."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self.name = str(files[0])
        self.cut_off: int | None = None
        self.position = 0
        try:
            self._files = [self.enter_context(FileIO(file)) for file in files]
        except OSError as error:
            self.close()
            raise GeoError(f"cannot read {error.filename}: {error.strerror}") from None
        self._ends = list(accumulate(os.fstat(file.fileno()).st_size for file in self._files))
        self.size = self._ends[-1]

    def locate(self, start: int, size: int) -> tuple[int, int]:
        """Return the file that holds bytes start..start+size, -1 if they lie across two, and where in it they begin."""
        file = bisect_right(self._ends, start)
        begin = self._ends[file - 1] if file else 0
        return (file if start + size <= self._ends[file] else -1), start - begin

    def seek(self, position: int) -> None:
        self.position = position

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        if size > HEADER_CAP:
            raise tarfile.ReadError("a header claims to be larger than any is")
        data = b""
        while size > len(data) and 0 <= self.position < self.size:
            file, begin = self.locate(self.position, 1)
            self._files[file].seek(begin)
            part = self._files[file].read(size - len(data))
            if not part:
                break
            data += part
            self.position += len(part)
        return data
