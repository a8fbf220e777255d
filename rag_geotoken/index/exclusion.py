"""Some gallery rows are not to be found: those with a query's own pixels and, if asked, those of its author."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

NO_ONE, UNKNOWN = -1, -2  # a row without an author; an author without a row


def copies(rows: pa.Table, digests: Sequence[str]) -> NDArray[np.int64]:
    """Return the rows that have one of these digests, in order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # A dictionary of millions of digests would be large; a pass over them takes no longer than a block's search.
    found: NDArray[np.bool_] = pc.is_in(rows["digest"], value_set=pa.array(digests, pa.string())).to_numpy()
    return found.nonzero()[0]


def own_rows(rows: pa.Table, digests: Sequence[str]) -> NDArray[np.int64]:
    """Return the rows with each digest as (B, most of one), padded with -1."""
    there, by_digest = copies(rows, digests), dict[str, list[int]]()
    for row, digest in zip(there.tolist(), rows["digest"].take(there).to_pylist(), strict=True):
        by_digest.setdefault(digest, []).append(row)
    found = [by_digest.get(digest, []) for digest in digests]
    width = max(map(len, found), default=0)
    return np.array([own + [-1] * (width - len(own)) for own in found], np.int64).reshape(len(digests), width)


class Authors:
    """This table says who took each gallery photo: ``numbers`` (rows,), -1 where nobody knows."""

    def __init__(self, names: pa.ChunkedArray) -> None:
        """Number the names (rows,), null where nobody knows."""
        coded = names.combine_chunks().dictionary_encode()
        self.numbers: NDArray[np.int32] = coded.indices.fill_null(NO_ONE).to_numpy()
        self._number_of = {name: number for number, name in enumerate(coded.dictionary.to_pylist())}

    def named(self, names: Sequence[str | None]) -> NDArray[np.int64]:
        """Return the numbers of names (B,), -2 for an author without a photo here, or none."""
        return np.array([self._number_of.get(name, UNKNOWN) for name in names], np.int64)
