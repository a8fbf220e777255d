"""These functions write Parquet tables, the same rows as the same bytes, and read them, refusing a broken file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import write_whole

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

ROW_GROUP = 65_536  # rows


def write_table(path: Path | str, table: pa.Table) -> None:
    """Write a table as Parquet; the same table gives the same bytes."""
    write_tables(path, [table])


def write_tables(path: Path | str, tables: Iterable[pa.Table]) -> int:
    """Write tables of one schema below each other, no row group across two, and return the number of rows."""
    import pyarrow.parquet as pq

    rest = iter(tables)
    first = next(rest)
    # A dictionary pays for words; for vectors it only costs time.
    words = [field.name for field in first.schema if str(field.type) in ("string", "large_string")]

    def write(beside: Path) -> None:
        with pq.ParquetWriter(beside, first.schema, compression="zstd", use_dictionary=words) as writer:
            for table in chain([first], rest):
                writer.write_table(table.combine_chunks(), row_group_size=ROW_GROUP)

    write_whole(path, write)
    return int(pq.read_metadata(path).num_rows)


def read_table(path: Path | str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet table, or some of its columns in the order given.

    Raises GeoError when the file is missing or broken, or a column is not in it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in columns or () if name not in file.schema_arrow.names]:
                raise GeoError(f"{path} has no column {', '.join(missing)}: delete it and run its stage again")
            table = file.read(columns=columns)
            return table if columns is None else table.select(columns)
    except FileNotFoundError as error:
        raise GeoError(f"there is no {path}: run the stage that writes it") from error
    except (pa.ArrowException, OSError) as error:
        raise GeoError(f"{path} is not a whole Parquet table: delete it and run its stage again") from error


def table_sha256(table: pa.Table) -> str:
    """Return the SHA-256 of a table's schema and rows as 64 hexadecimal digits."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def fixed_list(array: NDArray[Any]) -> pa.FixedSizeListArray:
    """Return numbers (N, D) or (N, D, E, ...) as a column of N nested lists of fixed size, without a copy."""
    import pyarrow as pa

    if array.ndim < 2 or 0 in array.shape[1:]:
        raise ValueError(f"a column of vectors needs a shape of (N, D), not {array.shape}")
    column = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def to_numpy(column: pa.ChunkedArray | pa.Array) -> NDArray[Any]:
    """Return the array (N, D, ...) behind a column of `fixed_list`, or (N,) behind a plain one.

    A read-only view where the column is one chunk of numbers, else a copy. Raises GeoError when a vector is missing.
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


def spread(values: NDArray[Any], mask: NDArray[np.bool_], fill: float | None = None) -> NDArray[Any]:
    """Return an array (N, M, ...) with values (L, ...) at the L true places of a mask (N, M).

    The other places are ``fill`` or the first value.
    """
    if mask.all():
        return values.reshape(*mask.shape, *values.shape[1:])
    whole = np.full((*mask.shape, *values.shape[1:]), values[0] if fill is None else fill, values.dtype)
    whole[mask] = values
    return whole


def pad_lists(lists: pa.ChunkedArray, fill: float = np.nan) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return N lists of numbers as an array (N, M) padded with ``fill``, and the mask of their places; M at least 1."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(lists).to_numpy()
    mask = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
    return spread(pc.list_flatten(lists).to_numpy(), mask, fill), mask


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, of the libraries that results depend on and of more, without importing them."""
    installed = {"python": platform.python_version()}
    for library in ("numpy", "torch", "transformers", "faiss-cpu", "pillow", "pyarrow", *more):
        try:
            installed[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            installed[library] = "not installed"
    return installed
