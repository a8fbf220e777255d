"""How long the tables of a run took, whenever they were made."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rag_geotoken.files import read_json, write_json


class Clock:
    """Does what makes a table, and keeps its seconds in a file; what was there already keeps those of its making."""

    def __init__(self, path: Path) -> None:
        self.path, self.reused = path, list[str]()
        self.seconds: dict[str, float] = read_json(path) if path.is_file() else {}

    def __call__(self, table: Path, work: Callable[[], object]) -> None:
        """table: the manifest that ``work`` writes last, unless all is there."""
        before = table.stat().st_mtime_ns if table.is_file() else None
        begun = time.perf_counter()
        work()
        name = table.stem.replace("manifest", "index")
        if table.stat().st_mtime_ns == before:
            self.reused.append(name)
            return
        self.seconds[name] = round(time.perf_counter() - begun, 2)
        write_json(self.path, self.seconds)
