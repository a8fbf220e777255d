"""All sources share this: the photos table, the settings behind a name, subsets, and what was left out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("lat", pa.float64()),
        ("lon", pa.float64()),
        ("place", pa.string()),
        ("author", pa.string()),
    ]
)
SHOWN = 10  # ids named for each reason


@dataclass(frozen=True)
class Settings:
    """This is what stands behind SCHEME: a folder or name, how many photos, and which."""

    where: str
    limit: int | None = None
    seed: int | None = None
    split: str | None = None
    revision: str | None = None
    config: str | None = None

    def choose(self, count: int) -> NDArray[np.int64]:
        """Choose rows of ``count``, ascending: all, the first ``limit``, or a random subset by ``seed``."""
        if self.limit is None or self.limit >= count:
            return np.arange(count)
        if self.seed is None:
            return np.arange(self.limit)
        return np.sort(np.random.default_rng(self.seed).choice(count, self.limit, replace=False, shuffle=False))


def parse(rest: str, known: Sequence[str] = ("limit", "seed")) -> Settings:
    """Parse ``"DIR,limit=1000,seed=1"`` into settings, or raise GeoError for a number that is none.

    Read from the end, so a folder's name may hold commas; of a setting given twice the last one counts.
    """
    given: dict[str, Any] = {}
    while match := re.fullmatch(rf"(.*),({'|'.join(known)})=([^,]*)", rest, re.DOTALL):
        rest, name, value = match.groups()
        if name in ("limit", "seed"):
            lowest = 1 if name == "limit" else 0
            if not re.fullmatch("[0-9]{1,9}", value) or int(value) < lowest:
                raise GeoError(f"{name}={value} is not understood: write {name}= and a whole number from {lowest}")
            value = int(value)
        given.setdefault(name, value)
    if "seed" in given and "limit" not in given:
        raise GeoError(f"seed={given['seed']} chooses a random subset: say how many with limit=N")
    return Settings(rest, **given)


@dataclass
class LeftOut:
    """This counts rows of a source that became no photo, by reason, the first of each named, and keeps remarks."""

    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, reason: str, count: int, ids: Sequence[str | None] = ()) -> None:
        """Count photos that were left out for a reason."""
        entry = self.reasons.setdefault(reason, {"photos": 0, "first": []})
        entry["photos"] += count
        entry["first"] += list(ids)[: SHOWN - len(entry["first"])]

    def drop(self, table: pa.Table, bad: NDArray[np.bool_] | pa.ChunkedArray, reason: str) -> pa.Table:
        """Return the table (with a column ``id``) without its bad rows (N,), which are counted."""
        bad = np.asarray(bad, bool)
        if not bad.any():
            return table
        self.add(reason, int(bad.sum()), table["id"].take(np.flatnonzero(bad)[:SHOWN]).to_pylist())
        return table.filter(pa.array(~bad))

    def line(self) -> str:
        """Return one line, such as "left out: 12 without a country, 3 of 5 KB or less; the tar is cut off"."""
        counts = ", ".join(f"{entry['photos']:,} {reason}" for reason, entry in self.reasons.items())
        return "; ".join([f"left out: {counts}"] * bool(counts) + self.remarks)


def photos_table(columns: dict[str, Any], left_out: LeftOut) -> pa.Table:
    """Make a photos table of columns, null where one is not given; its schema carries what was left out."""
    count = len(columns["id"])
    arrays = [columns.get(f.name, pa.nulls(count, f.type)) for f in SCHEMA]
    return pa.table(arrays, schema=SCHEMA.with_metadata({"left_out": json.dumps(vars(left_out), ensure_ascii=False)}))


def read_left_out(table: pa.Table) -> LeftOut:
    """Return what a source left out on the way to its photos table; nothing where the table does not say."""
    text = (table.schema.metadata or {}).get(b"left_out")
    return LeftOut(**json.loads(text)) if text else LeftOut()
