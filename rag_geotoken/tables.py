"""Stage tables in Parquet, and stages that go on where they were stopped."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_geotoken.errors import GeoError
from rag_geotoken.files import file_sha256, read_json, remove, write_json, write_whole

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

ROW_GROUP = 65_536  # rows


def write_table(path: Path | str, table: pa.Table) -> None:
    """Writes `table` as Parquet; the same table gives the same bytes."""
    write_tables(path, [table])


def write_tables(path: Path | str, tables: Iterable[pa.Table]) -> int:
    """Writes tables of one schema below each other, no row group across two; returns the number of rows."""
    import pyarrow.parquet as pq

    rows = 0

    def write(beside: Path) -> None:
        nonlocal rows
        writer = None
        try:
            for table in tables:
                if writer is None:
                    # A dictionary pays for words; for vectors it only costs time.
                    words = [field.name for field in table.schema if str(field.type) in ("string", "large_string")]
                    writer = pq.ParquetWriter(beside, table.schema, compression="zstd", use_dictionary=words)
                writer.write_table(table.combine_chunks(), row_group_size=ROW_GROUP)
                rows += table.num_rows
        finally:
            if writer is not None:
                writer.close()

    write_whole(path, write)
    return rows


def read_table(path: Path | str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a Parquet table, or only some of its columns in the order given.

    Raises:
        GeoError: the file is missing or broken, or a column is not in it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns or () if name not in file.schema_arrow.names]
            if missing:
                raise GeoError(f"{path} has no column {', '.join(missing)}: delete it and run its stage again")
            table = file.read(columns=None if columns is None else list(columns))
    except FileNotFoundError as error:
        raise GeoError(f"there is no {path}: run the stage that writes it") from error
    except (pa.ArrowException, OSError) as error:
        raise GeoError(f"{path} is not a whole Parquet table: delete it and run its stage again") from error
    return table if columns is None else table.select(list(columns))


def table_sha256(table: pa.Table) -> str:
    """The SHA-256 of a table's schema and rows, as 64 hexadecimal digits."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def fixed_list(array: NDArray[Any]) -> pa.FixedSizeListArray:
    """A column of vectors: (N, D) or (N, D, E, ...) numbers become N nested lists of fixed size, without a copy."""
    import pyarrow as pa

    if array.ndim < 2 or 0 in array.shape[1:]:
        raise ValueError(f"a column of vectors needs a shape of (N, D), not {array.shape}")
    column = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def to_numpy(column: pa.ChunkedArray | pa.Array) -> NDArray[Any]:
    """The array (N, D, ...) behind a column of `fixed_list`, or (N,) behind a plain one.

    A view that cannot be written where the column is one chunk of numbers, else a copy.

    Raises:
        GeoError: a vector is missing.
    """
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    shape = [len(column)]
    while pa.types.is_fixed_size_list(column.type):
        if column.null_count:
            raise GeoError("a table has rows without a vector: delete it and run its stage again")
        shape.append(column.type.list_size)
        column = column.flatten()
    array: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return array.reshape(shape)


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
    for stray in set(parts.glob("*")) - set(files):
        remove(stray)
    for number, file in enumerate(files):
        at = slice(number * block, min((number + 1) * block, total))
        if not _is_readable(file):
            write_table(file, work(at))
        report(at.stop - at.start)

    rows = write_tables(path, (read_table(file) for file in files))
    write_json(path.with_suffix(".json"), _manifest(source, identity, inputs, rows, path))
    shutil.rmtree(parts, ignore_errors=True)
    return path


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


def _manifest(source: dict[str, Any], identity: str, inputs: Sequence[Path | str], rows: int, path: Path) -> object:
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


def versions(*more: str) -> dict[str, str]:
    """The versions of Python, of the libraries that results depend on and of more, found without importing them."""
    found = {"python": platform.python_version()}
    for library in ("numpy", "torch", "transformers", "faiss-cpu", "pillow", "pyarrow", *more):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found
