"""These classes and functions are shared by all sources: the photos table, settings, subsets, rows left out."""

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

TEXT, DEGREES = pa.string(), pa.float64()
SCHEMA = pa.schema({"id": TEXT, "image": TEXT, "lat": DEGREES, "lon": DEGREES, "place": TEXT, "author": TEXT})
SHOWN = 10  # ids kept for each reason


@dataclass(frozen=True)
class Settings:
    """This class holds the settings of a source: its folder or name, how many photos, and which."""

    where: str
    limit: int | None = None
    seed: int | None = None
    split: str | None = None
    revision: str | None = None
    config: str | None = None

    def choose(self, count: int) -> NDArray[np.int64]:
        """Choose rows out of ``count``, ascending: all, the first ``limit``, or a random subset by ``seed``."""
        if self.limit is None or self.limit >= count:
            return np.arange(count)
        if self.seed is None:
            return np.arange(self.limit)
        return np.sort(np.random.default_rng(self.seed).choice(count, self.limit, replace=False, shuffle=False))


def parse(rest: str, known: Sequence[str] = ("limit", "seed")) -> Settings:
    """Parse text such as ``DIR,limit=1000,seed=1``. Raises GeoError for a malformed number.

    It is read from the end, so that a folder's name may hold commas; of a setting given twice the last one counts.
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
    """This class counts the rows of a source that were left out, by reason, and holds remarks on the whole source."""

    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, reason: str, count: int, ids: Sequence[str | None] = ()) -> None:
        """Count photos that were left out for a reason; the first ten ids are kept."""
        entry = self.reasons.setdefault(reason, {"photos": 0, "first": []})
        entry["photos"] += count
        entry["first"] += list(ids)[: SHOWN - len(entry["first"])]

    def drop(self, table: pa.Table, bad: NDArray[np.bool_] | pa.ChunkedArray, reason: str) -> pa.Table:
        """Return the table (with a column ``id``) without the rows where the mask ``bad`` (N,) is true; count them."""
        bad = np.asarray(bad, bool)
        if not bad.any():
            return table
        self.add(reason, int(bad.sum()), table["id"].take(np.flatnonzero(bad)[:SHOWN]).to_pylist())
        return table.filter(pa.array(~bad))

    def line(self) -> str:
        """Return a line such as "left out: 12 without a country, 3 of 5 KB or less; the tar is cut off", or ""."""
        counts = ", ".join(f"{entry['photos']:,} {reason}" for reason, entry in self.reasons.items())
        return "; ".join([f"left out: {counts}"] * bool(counts) + self.remarks)


def photos_table(columns: dict[str, Any], left_out: LeftOut) -> pa.Table:
    """Make the photos table of these columns, null where one is missing, with the rows left out in its metadata."""
    count = len(columns["id"])
    arrays = [columns.get(column.name, pa.nulls(count, column.type)) for column in SCHEMA]
    return pa.table(arrays, schema=SCHEMA.with_metadata({"left_out": json.dumps(vars(left_out), ensure_ascii=False)}))


def read_left_out(table: pa.Table) -> LeftOut:
    """Read the counts of rows left out from the metadata of a photos table; none where it has none."""
    text = (table.schema.metadata or {}).get(b"left_out")
    return LeftOut(**json.loads(text)) if text else LeftOut()
