"""What the embedded verifier is trained on: prompts about photos whose places are known, with the right answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision.pool import without
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.mllm.prompts import render
from rag_geotoken.training.mllm.words import BEGIN, END, IMAGE, LETTERS, PATCH, PIXELS
from rag_geotoken.types import VISUAL, Places, Pool, Tables
from rag_geotoken.verifiers.shortlist import (
    COUNT,
    Evidence,
    Shortlist,
    candidates,
    evidence,
    nearby_rows,
    place_texts,
    shortlist,
)

MOST = len(LETTERS) - 1  # candidates
RIGHT_KM = 200.0
# How often a photo is asked about in another way than the pipeline's usual one.
SEEN, FREE, ZERO_SHOT, UNPROVEN, ABSENT, FEWER, UNPLACED, PICTURES = 0.4, 0.1, 0.02, 0.08, 0.12, 0.3, 0.05, 0.04
PHOTO = b"photo"


@dataclass(frozen=True)
class Prompt:
    """What is said, with a run of image tokens for each picture, its pictures' references, and the right answer.

    away: how far from the truth each of the candidates is, in km, in the order of their lines.
    """

    text: str
    pictures: tuple[str, ...]
    answer: str
    away: tuple[float, ...]


@dataclass(frozen=True)
class Examples:
    """N photos with what the pipeline knows of each.

    images: N references; truth (N, 2) degrees; chosen, found: M candidates a photo and their evidence; places: N x M
    texts; near (N, M): the most alike neighbor's picture near each candidate, or None. seen: the same photos, compared
    with their neighbors' pictures.
    """

    images: list[str]
    truth: NDArray[np.float64]
    chosen: Shortlist
    found: Evidence
    places: list[list[str | None]]
    near: list[list[str | None]]
    seen: Examples | None = None

    def prompt(self, i: int, rng: np.random.Generator) -> Prompt:
        """One of the many ways to ask about photo ``i``, drawn from ``rng``."""
        if self.seen and rng.random() < SEEN:
            return self.seen.prompt(i, rng)
        if rng.random() < ZERO_SHOT:
            return self._say("diversify", i, [], [])
        free, unproven, absent, unplaced, pictures = rng.random(5) < (FREE, UNPROVEN, ABSENT, UNPLACED, PICTURES)
        known = candidates(self.chosen, i, None if unplaced else self.places[i], None if unproven else self.found)
        if pictures:
            for place, near in zip(known, self.near[i], strict=False):
                if near is not None:
                    place["picture"] = near
        order = np.arange(len(known))
        if absent:
            order = order[self._away(i)[order] > RIGHT_KM]
        listed_at_most = rng.integers(2, MOST + 1) if rng.random() < FEWER else COUNT
        return self._say("free" if free else "pool", i, known, rng.permutation(order[:listed_at_most]).tolist())

    def plain(self, i: int, rng: np.random.Generator) -> Prompt:
        """The usual question about photo ``i``, its candidates in an order drawn from ``rng``."""
        known = candidates(self.chosen, i, self.places[i], self.found)[:COUNT]
        return self._say("pool", i, known, rng.permutation(len(known)).tolist())

    def _away(self, i: int) -> NDArray[np.float64]:
        return haversine_km(*self.truth[i], *self.chosen.lat_lon[i].T)

    def _say(self, name: str, i: int, known: list[dict[str, Any]], order: list[int]) -> Prompt:
        """The question of a prompt file with the candidates at ``order``, and the right answer."""
        listed = [known[at] | {"letter": letter} for at, letter in zip(order, LETTERS, strict=False)]
        away = self._away(i)[order].tolist()
        right = min(away, default=np.inf) <= RIGHT_KM
        if name == "pool":
            answer = LETTERS[int(np.argmin(away))] if right else LETTERS[-1]
        else:
            lat, lon = (round(float(value), 1) for value in self.truth[i])
            answer = json.dumps({"latitude": lat, "longitude": lon, "confidence": 95 if right else 20}) + END
        pictures = {"photo": PHOTO} | {str(p["picture"]): str(p["picture"]).encode() for p in listed if "picture" in p}
        parts = render(name, pictures, candidates=listed, similar=[])
        said = "".join(part if isinstance(part, str) else IMAGE * (PIXELS // PATCH) ** 2 for part in parts)
        shown = [self.images[i] if part == PHOTO else part.decode() for part in parts if isinstance(part, bytes)]
        return Prompt(BEGIN + said, tuple(shown), answer, tuple(away))


def read_examples(tables: Tables, index: GeoIndex, tuning: Tuning) -> Examples:
    """Tables up to the alignment's verdicts -> examples. ``tuning``: that of the pool.

    Raises GeoError when a place is not known.
    """
    truth, whole, neighbors = tables.photos.lat_lon, tables.pool, tables.neighbors
    if not np.isfinite(truth).all():
        raise GeoError("training a verifier needs photos whose places are known")
    aligned = tables.verdicts["alignment"].over(whole.mask)

    def known(pool: Pool, matches: Places | None, seen: Examples | None) -> Examples:
        chosen = shortlist(pool, MOST)
        found = evidence(chosen, pool, neighbors, aligned=aligned, tuning=tuning, matches=matches)
        rows = nearby_rows(chosen, neighbors)
        shown = iter(index.rows["image"].take(rows[rows >= 0]).to_pylist())
        near = [[next(shown) if there else None for there in row] for row in (rows >= 0).tolist()]
        images = [str(image) for image in tables.photos.images]
        return Examples(images, truth, chosen, found, place_texts(chosen), near, seen)

    return known(without(whole, VISUAL), None, known(whole, tables.matches, None))
