"""What every training is given: its settings, the folder of the weights, and the gallery that it is trained with."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.index.build import Plan
from rag_geotoken.index.files import MANIFEST
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.models import Models
from rag_geotoken.photos.table import SCHEMA
from rag_geotoken.run.build_index import make_index
from rag_geotoken.run.resumable import run_stage, stage
from rag_geotoken.storage.files import read_json
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.training.loop import Log
from rag_geotoken.types import Embeddings

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Setup:
    """A training's settings, the folder ``out`` of the weights, and where its gallery comes from.

    source: the recipe's gallery, an index of which is kept in ``OUT-index``. index: a folder to be read instead.
    """

    settings: dict[str, Any]
    out: Path
    source: Any
    index: Path | None
    log: Log

    def beside(self, name: str) -> Path:
        """The folder ``OUT-NAME``."""
        return self.out.with_name(f"{self.out.name}-{name}")

    def numbers(self, *names: str) -> dict[str, Any]:
        """Some of the settings."""
        return {name: self.settings[name] for name in names}

    def identity(self, **facts: Any) -> str:
        """The SHA-256 of the settings and of what else the weights follow from, as JSON values."""
        return hashlib.sha256(json.dumps({"settings": self.settings} | facts, sort_keys=True).encode()).hexdigest()

    def models(self, tuning: Tuning, **more: Any) -> Models:
        """The models trained so far, with the gallery; more: as :class:`.Models` takes it. Raises GeoError."""
        alignment, tokens = GeoAlignment.from_pretrained(self.out), TokenModel.from_pretrained(self.out)
        return Models(alignment, tokens, self.gallery(alignment), tuning, **more)

    def gallery(self, alignment: GeoAlignment) -> GeoIndex:
        """The index to train with: a given one is only read, another is made where it is missing. Raises GeoError."""
        index = self.index
        if index is None:
            if not isinstance(self.source, str):
                raise GeoError(
                    'the recipe names no gallery: give --index DIR, or write gallery = "SCHEME:REST" into it'
                )
            index = index_of(self.beside("index"), self.source, alignment)
        return GeoIndex.load(index, alignment.heads)


def index_of(folder: Path, source: str, alignment: GeoAlignment) -> Path:
    """The index of a source at a place where a training keeps it, made where it is missing -> its folder.

    One of that source follows it and the alignment, if either has changed, with the same plan and thumbnails. Raises
    GeoError, and leaves everything as it is, where an index of another source lies there.
    """
    plan, thumbnails = Plan(), None
    if (folder / MANIFEST).is_file():
        manifest, known = read_json(folder / MANIFEST), folder / "stages" / "photos.json"
        if not known.is_file() or read_json(known)["recipe"]["source"] != source:
            raise GeoError(
                f"{folder} holds an index of other photos than {source}: add --index {folder} to train with it, or "
                "choose another --out"
            )
        with suppress(AttributeError, KeyError, TypeError):  # a broken manifest: the index is made anew
            plan, thumbnails = Plan(**manifest["made_from"].get("plan", {})), manifest.get("thumbnails")
    make_index(folder, source, alignment, plan, thumbnails)
    return folder


def gallery_tables(folder: Path, index: GeoIndex) -> None:
    """An index's own photos as the tables photos and embeddings of a run."""
    recipe, rows = {"gallery": index.identity}, index.rows.select(SCHEMA.names)
    stage(folder, "photos", recipe, [], ["all"], lambda _: rows)
    ids, names = rows["id"].to_pylist(), index.rows["digest"].to_pylist()

    def work(at: slice) -> pa.Table:
        vectors = index.vectors(np.arange(at.start, at.stop))
        return Embeddings(vectors, names[at], [None] * len(vectors)).to_table(ids[at])

    run_stage(folder, "embeddings", recipe, ["photos"], ids, work, many=True)
