"""Stages on disk: each table made once, block by block, and gone on with where it was stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_geotoken.errors import GeoError
from rag_geotoken.files import file_sha256, read_json, remove, write_json
from rag_geotoken.progress import progress_bar
from rag_geotoken.tables import read_table, versions, write_table, write_tables

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

BLOCK, LARGE_BLOCK, MANY = 256, 2048, 65_536  # photos a file while a stage runs, and of how many it has large ones


def run_stage(
    folder: Path,
    name: str,
    recipe: dict[str, Any],
    inputs: Sequence[str],
    ids: Sequence[str],
    work: Callable[[slice], pa.Table],
    many: bool = False,
) -> Path:
    """A stage of a run: ``inputs`` are tables of its folder, ``ids`` the photos in order; see :func:`stage`.

    many: whether its work takes little memory a photo, so that large runs have large blocks.
    """
    files = [folder / f"{file}.parquet" for file in inputs]
    block = LARGE_BLOCK if many and len(ids) > MANY else BLOCK
    with progress_bar(len(ids), f"{folder.name}: {name}") as advance:
        return stage(folder, name, recipe, files, ids, work, block=block, progress=advance)


def stage(
    folder: Path | str,
    name: str,
    recipe: Mapping[str, Any],
    inputs: Sequence[Path | str],
    keys: Sequence[str] | Sequence[int] | NDArray[Any],
    work: Callable[[slice], pa.Table],
    *,
    block: int = 512,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Makes `folder/name.parquet` from blocks of photos; does nothing if it is already made from the same things.

    The stage is known by the SHA-256 of its name, recipe, input files, keys and block. Every finished block is kept
    as a file of its own until all are there, so a stage that was stopped goes on with the blocks that are missing and
    ends in the same bytes as one that ran through. `name.json` is written last: without it the table does not count.

    Args:
        folder: The run's folder; made when missing.
        name: The stage's name, also the files' name.
        recipe: All that changes the result besides inputs and keys, as JSON values.
        inputs: The files read by `work`.
        keys: The N photos' ids, in order.
        work: Takes a slice of positions in `keys`, gives the rows of those photos; any number of rows, always the
            same schema.
        block: How many photos a call of `work` gets.
        progress: Called with the number of photos done since its last call.

    Returns:
        The path of the Parquet file.

    Raises:
        GeoError: there are no keys, an input is missing, or the folder cannot be written.
    """
    folder, total = Path(folder), len(keys)
    if total == 0:
        raise GeoError(f"stage {name} has no photos to work on: the source is empty or everything was left out")
    source = {"stage": name, "recipe": dict(recipe), "inputs": [file_sha256(path) for path in inputs]}
    identity = _sha256(
        {**source, "keys": _sha256(keys.tolist() if isinstance(keys, np.ndarray) else list(keys)), "block": block}
    )
    path, parts = folder / f"{name}.parquet", folder / f".{name}.parts"
    report = progress or (lambda done: None)
    if _is_done(path, identity):
        report(total)
        shutil.rmtree(parts, ignore_errors=True)
        return path

    files = [parts / f"{identity[:16]}-{number:05d}.parquet" for number in range(-(-total // block))]
    for stray in set(parts.glob("*.parquet")) - set(files):
        remove(stray)
    seconds = _write_parts(files, [slice(i, min(i + block, total)) for i in range(0, total, block)], work, report)
    rows = write_tables(path, (read_table(file) for file in files))
    write_json(path.with_suffix(".json"), _manifest(source, identity, inputs, rows, path) | {"seconds": seconds})
    shutil.rmtree(parts, ignore_errors=True)
    return path


def _write_parts(
    files: Sequence[Path], blocks: Sequence[slice], work: Callable[[slice], pa.Table], report: Callable[[int], object]
) -> float:
    """Write the blocks that are missing -> the seconds that all of them took, those of an earlier run too."""
    clock = files[0].with_name("seconds.json")
    seconds = float(read_json(clock)) if clock.is_file() else 0.0
    for file, at in zip(files, blocks, strict=True):
        if not _is_readable(file):
            begun = time.perf_counter()
            write_table(file, work(at))
            seconds += time.perf_counter() - begun
            write_json(clock, round(seconds, 3))
        report(at.stop - at.start)
    return round(seconds, 2)


def _sha256(obj: object) -> str:
    """The SHA-256 of an object's canonical JSON."""
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


def _manifest(
    source: dict[str, Any], identity: str, inputs: Sequence[Path | str], rows: int, path: Path
) -> dict[str, Any]:
    recipe, shas = source["recipe"], source["inputs"]
    seed = {"seed": recipe["seed"]} if "seed" in recipe else {}
    return {
        "stage": source["stage"],
        "identity": identity,
        "recipe": recipe,
        **seed,
        # File names only: a run folder can be moved, and says nothing of the machine it was made on.
        "inputs": [{"file": Path(file).name, "sha256": sha} for file, sha in zip(inputs, shas, strict=True)],
        "rows": rows,
        "parquet_bytes": path.stat().st_size,
        "parquet_sha256": file_sha256(path),
        "versions": versions(),
    }
