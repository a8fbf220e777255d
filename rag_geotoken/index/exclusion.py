"""These functions tell which gallery rows a query must not return: copies of its pixels, and its author's photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

NO_ONE, UNKNOWN = -1, -2  # the numbers of a row without an author, and of an author without a row


def copies(rows: pa.Table, digests: Sequence[str]) -> NDArray[np.int64]:
    """Return the numbers of the rows that have one of these digests, in order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # A dictionary of millions of digests would be large; a pass over them takes no longer than a block's search.
    mask: NDArray[np.bool_] = pc.is_in(rows["digest"], value_set=pa.array(digests, pa.string())).to_numpy()
    return mask.nonzero()[0]


def own_rows(rows: pa.Table, digests: Sequence[str]) -> NDArray[np.int64]:
    """Return the rows (B, M) that have each query's digest (B,), padded with -1 to the query with the most."""
    numbers, by_digest = copies(rows, digests), dict[str, list[int]]()
    # By digest, not each against each: a training searches its whole gallery, and there every photo has a row.
    for row, digest in zip(numbers.tolist(), rows["digest"].take(numbers).to_pylist(), strict=True):
        by_digest.setdefault(digest, []).append(row)
    own = [by_digest.get(digest, []) for digest in digests]
    width = max(map(len, own), default=0)
    return np.array([some + [-1] * (width - len(some)) for some in own], np.int64).reshape(len(digests), width)


def number_authors(names: pa.ChunkedArray) -> tuple[NDArray[np.int32], dict[str | None, int]]:
    """Return the number of each row's author (rows,), -1 where the name is null, and the numbers by name."""
    coded = names.combine_chunks().dictionary_encode()
    numbers = {name: number for number, name in enumerate(coded.dictionary.to_pylist())}
    return coded.indices.fill_null(NO_ONE).to_numpy(), numbers
