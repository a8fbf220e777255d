"""These functions make a stage's table on disk once, block by block, and resume where they were stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import file_sha256, read_json, remove, write_json
from rag_geotoken.storage.parquet import read_table, versions, write_table, write_tables
from rag_geotoken.storage.progress import progress_bar
from rag_geotoken.storage.side_by_side import side_by_side

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK, LARGE_BLOCK, MANY = 256, 2048, 65_536  # photos in a block, in a large one, and from how many on they are large


def run_stage(
    folder: Path,
    name: str,
    recipe: dict[str, Any],
    inputs: Sequence[str],
    ids: Sequence[str],
    work: Callable[[slice], pa.Table],
    *,
    many: bool = False,
    block: int | None = None,
    alone: bool = False,
) -> Path:
    """Make a stage's table with a progress bar; ``inputs`` name tables of its folder, for the rest see :func:`stage`.

    many: whether its work takes little memory a photo, so that large runs have large blocks where none is given.
    """
    files = [folder / f"{file}.parquet" for file in inputs]
    if block is None:
        block = LARGE_BLOCK if many and len(ids) > MANY else BLOCK
    with progress_bar(len(ids), f"{folder.name}: {name}") as advance:
        keywords: dict[str, Any] = {"block": block, "progress": advance, "alone": alone}
        return stage(folder, name, recipe, inputs=files, keys=ids, work=work, **keywords)


def stage(
    folder: Path,
    name: str,
    recipe: dict[str, Any],
    inputs: Sequence[Path],
    keys: Sequence[str],
    work: Callable[[slice], pa.Table],
    *,
    block: int = 512,
    progress: Callable[[int], object] = lambda done: None,
    alone: bool = False,
) -> Path:
    """Make ``folder/name.parquet`` from blocks of photos unless it exists with the same identity, and return its path.

    The identity is the SHA-256 of name, recipe, input files, keys and block. Every finished block is kept as a file of
    its own until all are made, so a stage that was stopped resumes with the missing blocks and ends in the same bytes
    as one that ran through. ``name.json`` is written last: without it the table does not count.

    Args:
        folder: The run's folder; made when missing.
        name: The stage's name, also the files' name.
        recipe: All that changes the result besides inputs and keys, as JSON values.
        inputs: The files read by ``work``.
        keys: The N photos' ids, in order.
        work: Takes a slice of positions in ``keys``, gives those photos' rows, any number, always of the same schema.
        block: How many photos a call of ``work`` gets.
        progress: Called with the number of photos done since its last call.
        alone: Whether blocks are made one after the other, by the thread that calls, else side by side.

    Raises:
        GeoError: There are no keys, an input is missing, or the folder cannot be written.
    """
    total = len(keys)
    if total == 0:
        raise GeoError(f"stage {name} has no photos to work on: the source is empty or everything was left out")
    shas = [file_sha256(file) for file in inputs]
    identity = _sha256({"stage": name, "recipe": recipe, "inputs": shas, "keys": _sha256(list(keys)), "block": block})
    path, folder_of_parts = folder / f"{name}.parquet", folder / f".{name}.parts"
    if _is_done(path, identity):
        progress(total)
    else:
        blocks = [slice(start, min(start + block, total)) for start in range(0, total, block)]
        parts = {folder_of_parts / f"{identity[:16]}-{i:05d}.parquet": at for i, at in enumerate(blocks)}
        seconds = _write_parts(parts, work, progress, alone)
        manifest: dict[str, Any] = {"stage": name, "identity": identity, "recipe": recipe}
        manifest |= {"seed": recipe["seed"]} if "seed" in recipe else {}
        # File names only: a run folder can be moved, and says nothing of the machine it was made on.
        manifest["inputs"] = [{"file": file.name, "sha256": sha} for file, sha in zip(inputs, shas, strict=True)]
        manifest["rows"] = write_tables(path, map(read_table, parts))
        manifest |= {"parquet_bytes": path.stat().st_size, "parquet_sha256": file_sha256(path)}
        write_json(path.with_suffix(".json"), manifest | {"versions": versions(), "seconds": seconds})
    shutil.rmtree(folder_of_parts, ignore_errors=True)
    return path


def _write_parts(
    parts: dict[Path, slice], work: Callable[[slice], pa.Table], progress: Callable[[int], object], alone: bool
) -> float:
    """Write the blocks that are missing, and return the seconds that all took, those of an earlier run too."""
    clock = next(iter(parts)).with_name("seconds.json")
    for stray in set(clock.parent.glob("*.parquet")) - parts.keys():
        remove(stray)
    seconds = float(read_json(clock)) if clock.is_file() else 0.0
    missing = {file: at for file, at in parts.items() if not _is_readable(file)}
    if kept := sum(at.stop - at.start for file, at in parts.items() if file not in missing):
        progress(kept)

    def write(part: tuple[Path, slice]) -> int:
        file, at = part
        write_table(file, work(at))
        return int(at.stop - at.start)

    begun, todo = time.perf_counter(), list(missing.items())
    for done in map(write, todo) if alone else side_by_side(write, todo, of=len(parts)):
        write_json(clock, round(seconds + time.perf_counter() - begun, 3))
        progress(done)
    return round(seconds + time.perf_counter() - begun, 2)


def _sha256(obj: object) -> str:
    """Return the SHA-256 of an object's canonical JSON."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _is_done(path: Path, identity: str) -> bool:
    try:
        manifest = read_json(path.with_suffix(".json"))
        return bool(manifest["identity"] == identity and manifest["parquet_sha256"] == file_sha256(path))
    except (GeoError, KeyError, TypeError):
        return False


def _is_readable(part: Path) -> bool:
    try:
        read_table(part)
    except GeoError:
        return False
    return True
