"""This module holds what every training is given: its settings, the folder of the weights, and its gallery."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.index.build import Plan
from rag_geotoken.index.files import MANIFEST
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.models import Models
from rag_geotoken.run.build_index import make_index
from rag_geotoken.storage.files import read_json
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.training.loop import Log


@dataclass(frozen=True)
class Setup:
    """This class holds a training's settings, the folder ``out`` of the weights, and where its gallery comes from.

    source: the recipe's gallery, an index of which is kept in ``OUT-index``. index: a folder to be read instead.
    """

    settings: dict[str, Any]
    out: Path
    source: Any
    index: Path | None
    log: Log

    def beside(self, name: str) -> Path:
        """Return the folder ``OUT-NAME``."""
        return self.out.with_name(f"{self.out.name}-{name}")

    def identity(self, **facts: Any) -> str:
        """Return the SHA-256 of the settings and of what else the weights follow from, as JSON values."""
        return hashlib.sha256(json.dumps({"settings": self.settings} | facts, sort_keys=True).encode()).hexdigest()

    def models(self, tuning: Tuning, **more: Any) -> Models:
        """Open the models trained so far, with the gallery; more: as :class:`.Models` takes it. Raises GeoError."""
        alignment, tokens = GeoAlignment.from_pretrained(self.out), TokenModel.from_pretrained(self.out)
        return Models(alignment, tokens, self.gallery(alignment), tuning, **more)

    def gallery(self, alignment: GeoAlignment) -> GeoIndex:
        """Open the index to train with: one that was given is only read, that in ``OUT-index`` is kept up to date.

        The latter is made where it is missing, and anew where its source or the alignment has changed, with the same
        plan and thumbnails. Raises GeoError, and leaves everything as it is, where it is an index of another source.
        """
        if self.index is not None:
            return GeoIndex.load(self.index, alignment.heads)
        if not isinstance(self.source, str):
            raise GeoError('the recipe names no gallery: give --index DIR, or write gallery = "SCHEME:REST" into it')
        folder, plan, thumbnails = self.beside("index"), Plan(), None
        if (folder / MANIFEST).is_file():
            manifest, photos = read_json(folder / MANIFEST), folder / "stages" / "photos.json"
            if not photos.is_file() or read_json(photos)["recipe"]["source"] != self.source:
                raise GeoError(
                    f"{folder} holds an index of other photos than {self.source}: add --index {folder} to train with "
                    "it, or choose another --out"
                )
            with suppress(AttributeError, KeyError, TypeError):  # a broken manifest: the index is made anew
                plan, thumbnails = Plan(**manifest["made_from"].get("plan", {})), manifest.get("thumbnails")
        make_index(folder, self.source, alignment, plan, thumbnails)
        return GeoIndex.load(folder, alignment.heads)
