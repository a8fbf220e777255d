"""These functions walk the road: in memory, or in a folder where every finished block is kept and a run resumes."""

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
    """Return the answers of photos in order, computed at most ``block`` photos at a time."""

    def work(part: Photos) -> Answers:
        tables = embedded(models, options, part)
        decided = answered(models, options, tables[tables.embeddings.readable])
        return Answers.complete(part, tables.embeddings.errors, decided)

    size = min(block, max(FEWEST, -(-len(photos) // cores())))
    parts = [photos[start : start + size] for start in range(0, len(photos), size)]
    answers = list(map(work, parts) if options.asks_mllm else side_by_side(work, parts))
    return Answers.join(answers) if answers else Answers.of(photos, [])


def embedded(models: Models, options: Options, photos: Photos) -> Tables:
    """Return tables that hold the photos' embeddings, those of unreadable photos too."""
    tables, first = Tables(photos), road(options)[0]
    tables.put(first.name, first.work(models, options, tables))
    return tables


def answered(models: Models, options: Options, tables: Tables, until: str = "predictions") -> Any:
    """Run the stages after the embeddings on readable photos, and return the result of the last one."""
    result: Any = Answers.of(tables.photos, [])
    for step in road(options)[1:] if len(tables.photos) else ():
        result = step.work(models, options, tables)
        tables.put(step.name, result)
        if step.name == until:
            break
    return result


def write_photos(folder: Path, source: str) -> Path:
    """Write the photos table of a source: id, image, lat, lon, place, author.

    The source is read each time and known by its contents, since a folder can change under the same name. How many
    photos it left out stands by reason in ``left_out.json``, and in one line on standard error.
    """
    table = read_source(source)
    left_out = read_left_out(table)
    if line := left_out.line():
        print(f"{source}: {line}", file=sys.stderr)

    def work(_: slice) -> Any:
        write_json(folder / "left_out.json", {"photos": len(table), **vars(left_out)})
        return table

    recipe = {"source": source, "content": table_sha256(table)}
    return stage(folder, "photos", recipe, inputs=[], keys=["all"], work=work)


class RunFolder:
    """This class walks the road in a folder with ``photos.parquet``, with one set of options after another.

    Options share the tables that follow from the same inputs. The first table of a stage bears the stage's name, later
    ones that name and a part of their identity. ``reused``: the tables that an earlier run had made. ``seconds``: what
    making each took.
    """

    def __init__(self, folder: Path, models: Models) -> None:
        """Open the folder, in which a multimodal model's answers are kept."""
        self.folder = folder
        self.models = models.replace(mllm=models.mllm.kept_in(folder)) if models.mllm else models
        self.reused: list[str] = []
        self.seconds: dict[str, float] = {}
        self._identities: dict[str, list[str]] = {}  # by table name without identity, in order
        self._results: dict[str, Any] = {}

    @cached_property
    def photos(self) -> Photos:
        """Return all photos, readable or not."""
        return Photos.from_table(read_table(self.folder / "photos.parquet"))

    @cached_property
    def errors(self) -> list[str | None]:
        """Return why each photo cannot be read; known once the embeddings are made."""
        errors: list[str | None] = read_table(self.folder / "embeddings.parquet", ["error"])["error"].to_pylist()
        return errors

    @cached_property
    def readable(self) -> NDArray[np.int64]:
        """Return the positions of the readable photos among all. Raises GeoError when there is none."""
        readable = np.flatnonzero([error is None for error in self.errors])
        if not len(readable):
            raise GeoError(f"none of the {len(self.errors)} pictures can be read; the first: {self.errors[0]}")
        return readable

    def walk(
        self,
        options: Options,
        shared: Options | None = None,
        label: str | None = None,
        until: str = "predictions",
        given: Sequence[str] = (),
    ) -> dict[str, str]:
        """Make the tables that the options need, and return the table's name of every stage.

        Args:
            options: Of the decision.
            shared: Of the stages before it, where variants of the decision share them; else the same.
            label: Of the predictions, else by the options.
            until: The last stage.
            given: Stages whose tables exist already, however they were made.

        Raises:
            GeoError: No picture can be read, or a stage fails.
        """
        steps = [(step, shared or options) for step in road(shared or options) if not step.own]
        steps += [(step, options) for step in road(options) if step.own]
        files = {name: name for name in ("photos", *given)}
        for step, settings in steps:
            if step.name not in given:
                name = f"{step.name}-{label or options.label}" if step.name == "predictions" else step.name
                files[step.name] = self._make(step, settings, files, name)
                if step.name == until:
                    break
        return files

    def result(self, name: str, kind: type[Any]) -> Any:
        """Return a table of the folder as its type."""
        if name not in self._results:
            self._results[name] = kind.from_table(read_table(self.folder / f"{name}.parquet"))
        return self._results[name]

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
        """Make a stage's table unless this run has met it before, and return its file's name."""
        recipe, reads = step.settings(self.models, options), {read: files[read] for read in step.reads}
        facts = json.dumps([recipe, list(reads.values())], sort_keys=True)
        key, known = hashlib.sha256(facts.encode()).hexdigest(), self._identities.setdefault(name, [])
        file = name if known[:1] in ([], [key]) else f"{name}-{key[:8]}"
        if key in known:
            return file
        known.append(key)
        manifest = self.folder / f"{file}.json"
        if step.kind is MllmVerdict and self.models.mllm and self.models.mllm.resume:
            table = self.folder / f"{file}.parquet"
            if table.is_file() and set(read_table(table, ["status"])["status"].to_pylist()) != {"ok"}:
                remove(table)
        before = manifest.stat().st_mtime_ns if manifest.is_file() else None
        ids = self.photos.ids if step.whole else self.photos[self.readable].ids

        def work(at: slice) -> Any:
            return self._block(step, options, reads, at)

        many, alone, inputs = step.name == "embeddings", "mllm" in step.models, list(reads.values())
        run_stage(self.folder, file, recipe, inputs=inputs, ids=ids, work=work, many=many, alone=alone)
        self.seconds[file] = read_json(manifest).get("seconds", 0.0)
        if manifest.stat().st_mtime_ns == before:
            self.reused.append(file)
        self._results.pop(file, None)
        return file

    def _block(self, step: Stage, options: Options, reads: dict[str, str], at: slice) -> Any:
        """Return the table of a block of a stage's photos."""
        if step.name == "embeddings":
            return step.work(self.models, options, Tables(self.photos[at])).to_table(self.photos.ids[at])
        if not step.whole:
            tables = self.tables(options, reads, at)
            return step.work(self.models, options, tables).to_table(tables.photos.ids)
        part = slice(*np.searchsorted(self.readable, [at.start, at.stop]).tolist())
        decided = None
        if part.stop > part.start:
            decided = step.work(self.models, options, self.tables(options, reads, part))
        return Answers.complete(self.photos[at], self.errors[at], decided).to_table()
