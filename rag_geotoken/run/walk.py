"""The road is walked in memory, tables passed on, or in a folder, every finished block kept."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.errors import GeoError
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.photos.sources import read_source
from rag_geotoken.photos.table import read_left_out
from rag_geotoken.run.resumable import BLOCK, run_stage, stage
from rag_geotoken.run.road import Stage, road
from rag_geotoken.storage.files import read_json, remove, write_json
from rag_geotoken.storage.parquet import read_table, table_sha256
from rag_geotoken.storage.side_by_side import cores, side_by_side
from rag_geotoken.types import Answers, MllmVerdict, Photos, Tables

FEWEST = 8  # photos in a part of a batch


def in_memory(models: Models, options: Options, photos: Photos, block: int = BLOCK) -> Answers:
    """Answer photos in order, at most so many in a part."""

    def work(part: Photos) -> Answers:
        tables = embedded(models, options, part)
        decided = answered(models, options, tables[tables.embeddings.readable])
        return complete(part, tables.embeddings.errors, decided)

    size = min(block, max(FEWEST, -(-len(photos) // cores())))
    parts = [photos[start : start + size] for start in range(0, len(photos), size)]
    found = list(map(work, parts) if options.asks_mllm else side_by_side(work, parts))
    return Answers.join(found) if found else Answers.of(photos, [])


def embedded(models: Models, options: Options, photos: Photos) -> Tables:
    """Return tables that hold the embeddings of photos, those of unreadable ones among them."""
    tables, first = Tables(photos), road(options)[0]
    tables.put(first.name, first.work(models, options, tables))
    return tables


def answered(models: Models, options: Options, tables: Tables, until: str = "predictions") -> Any:
    """Walk on from embeddings of readable photos to a later stage, and return its result."""
    result: Any = Answers.of(tables.photos, [])
    for step in road(options)[1:] if len(tables.photos) else ():
        result = step.work(models, options, tables)
        tables.put(step.name, result)
        if step.name == until:
            break
    return result


def complete(photos: Photos, errors: Sequence[str | None], decided: Answers | None) -> Answers:
    """Complete the answers of the readable photos by the others, with their errors."""
    answers = Answers.of(photos, errors)
    good = np.array([error is None for error in errors], bool)
    if decided is not None and good.any():
        for name in ("lat_lon", "confidence", "source", "area_km2", "verified"):
            getattr(answers, name)[good] = getattr(decided, name)
        for i, error in zip(np.flatnonzero(good).tolist(), decided.errors, strict=True):
            answers.errors[i] = error
    return answers


def write_photos(folder: Path, source: str) -> Path:
    """Write the photos table of a source: id, image, lat, lon, place, author.

    The source is read each time and known by what it holds, since a folder can change under the same name. What it left
    out stands by reason in ``left_out.json``, and in one line on standard error.
    """
    table = read_source(source)
    left_out = read_left_out(table)
    if line := left_out.line():
        print(f"{source}: {line}", file=sys.stderr)

    def work(_: slice) -> Any:
        write_json(folder / "left_out.json", {"photos": len(table), **vars(left_out)})
        return table

    return stage(folder, "photos", {"source": source, "content": table_sha256(table)}, [], ["all"], work)


class RunFolder:
    """In this folder with ``photos.parquet`` the road is walked, with one set of options after another.

    Tables are shared where they follow from the same things. The first table of a stage bears its name, others that of
    their contents behind it. ``reused``: those that were there already. ``seconds``: what making each took.
    """

    def __init__(self, folder: Path, models: Models) -> None:
        """Keep the answers of a multimodal model in the folder."""
        self.folder = folder
        self.models = models.replace(mllm=models.mllm.kept_in(folder)) if models.mllm else models
        self.reused: list[str] = []
        self.seconds: dict[str, float] = {}
        self._names: dict[str, list[str]] = {}  # stage -> what its tables follow from, in order
        self._read: dict[str, Any] = {}

    @cached_property
    def photos(self) -> Photos:
        """Return all photos, readable or not."""
        return Photos.from_table(read_table(self.folder / "photos.parquet"))

    @cached_property
    def errors(self) -> list[str | None]:
        """Return why each photo cannot be read, once the road has passed the embeddings."""
        errors: list[str | None] = read_table(self.folder / "embeddings.parquet", ["error"])["error"].to_pylist()
        return errors

    @cached_property
    def readable(self) -> NDArray[np.int64]:
        """Return the positions of the readable photos among all, or raise GeoError when there is none."""
        good = np.flatnonzero([error is None for error in self.errors])
        if not len(good):
            raise GeoError(f"none of the {len(self.errors)} pictures can be read; the first: {self.errors[0]}")
        return good

    def walk(
        self,
        options: Options,
        shared: Options | None = None,
        label: str | None = None,
        until: str = "predictions",
        given: Sequence[str] = (),
    ) -> dict[str, str]:
        """Make the tables that the options ask for, and return stage to table.

        Args:
            options: Of the decision.
            shared: Of the stages before it, where variants of the decision share them; else the same.
            label: Of the predictions, else by the options.
            until: The last stage.
            given: Stages whose tables lie there already, however they were made.

        Raises:
            GeoError: No picture can be read, or a stage fails.
        """
        steps = [(step, shared or options) for step in road(shared or options) if not step.own]
        steps += [(step, options) for step in road(options) if step.own]
        files = {name: name for name in ("photos", *given)}
        for step, settings in steps:
            if step.name in given:
                continue
            name = f"{step.name}-{label or options.label}" if step.name == "predictions" else step.name
            files[step.name] = self._make(step, settings, files, name)
            if step.name == until:
                break
        return files

    def result(self, name: str, kind: type[Any]) -> Any:
        """Return a table of the folder as its type."""
        if name not in self._read:
            self._read[name] = kind.from_table(read_table(self.folder / f"{name}.parquet"))
        return self._read[name]

    def tables(self, options: Options, files: dict[str, str], at: slice = slice(None)) -> Tables:
        """Return what :meth:`walk` made with these options before the decision, of readable photos."""
        rows = self.readable[at]
        tables = Tables(self.photos[rows])
        for step in road(options):
            if step.name in files and step.name != "predictions":
                result = self.result(files[step.name], step.kind)
                tables.put(step.name, result[rows] if step.whole else result[at])
        return tables

    def _make(self, step: Stage, options: Options, files: dict[str, str], name: str) -> str:
        file, new = self._name(step, options, files, name)
        if not new:
            return file
        reads = {read: files[read] for read in step.reads}
        manifest = self.folder / f"{file}.json"
        if step.kind is MllmVerdict and self.models.mllm and self.models.mllm.resume:
            self._forget_failures(file)
        before = manifest.stat().st_mtime_ns if manifest.is_file() else None
        ids = self.photos.ids if step.whole else [self.photos.ids[i] for i in self.readable.tolist()]
        recipe = step.settings(self.models, options)
        inputs, many, alone = list(reads.values()), step.name == "embeddings", "mllm" in step.models

        def work(at: slice) -> Any:
            return self._block(step, options, reads, at)

        run_stage(self.folder, file, recipe, inputs, ids, work, many=many, alone=alone)
        self.seconds[file] = read_json(manifest).get("seconds", 0.0)
        if manifest.stat().st_mtime_ns == before:
            self.reused.append(file)
        self._read.pop(file, None)
        return file

    def _name(self, step: Stage, options: Options, files: dict[str, str], name: str) -> tuple[str, bool]:
        """The file of a stage, and whether this run has not met it yet."""
        facts = [step.settings(self.models, options), [files[read] for read in step.reads]]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        known = self._names.setdefault(name, [])
        new = key not in known
        if new:
            known.append(key)
        return name if known[0] == key else f"{name}-{key[:8]}", new

    def _block(self, step: Stage, options: Options, reads: dict[str, str], at: slice) -> Any:
        """The table of a block of a stage's photos."""
        if step.name == "embeddings":
            return step.work(self.models, options, Tables(self.photos[at])).to_table(self.photos.ids[at])
        if not step.whole:
            ids = [self.photos.ids[i] for i in self.readable[at].tolist()]
            return step.work(self.models, options, self.tables(options, reads, at)).to_table(ids)
        part = slice(*np.searchsorted(self.readable, [at.start, at.stop]).tolist())
        some = part.stop > part.start
        decided = step.work(self.models, options, self.tables(options, reads, part)) if some else None
        return complete(self.photos[at], self.errors[at], decided).to_table()

    def _forget_failures(self, file: str) -> None:
        path = self.folder / f"{file}.parquet"
        if path.is_file() and set(read_table(path, ["status"])["status"].to_pylist()) != {"ok"}:
            remove(path)
