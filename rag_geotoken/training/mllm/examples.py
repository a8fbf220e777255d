"""These classes make the embedded verifier's training prompts, from photos whose places are known."""

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
    """This is a prompt, with a run of image tokens for each picture, its pictures' references, and the right answer.

    distances_km: from the truth to each of the candidates, in the order of their lines.
    """

    text: str
    pictures: tuple[str, ...]
    answer: str
    distances_km: tuple[float, ...]


@dataclass(frozen=True)
class Examples:
    """These are N photos with what the pipeline knows of each.

    images: N references; truth (N, 2) degrees; candidates, evidence: M candidates a photo and their evidence; places:
    N x M texts; nearby (N, M): the most alike neighbor's picture near each candidate, or None. matched: the same
    photos, compared with their neighbors' pictures.
    """

    images: list[str]
    truth: NDArray[np.float64]
    candidates: Shortlist
    evidence: Evidence
    places: list[list[str | None]]
    nearby: list[list[str | None]]
    matched: Examples | None = None

    def prompt(self, i: int, rng: np.random.Generator) -> Prompt:
        """Draw one of the many ways to ask about photo ``i`` from ``rng``."""
        if self.matched and rng.random() < SEEN:
            return self.matched.prompt(i, rng)
        if rng.random() < ZERO_SHOT:
            return self._render("diversify", i, shown=[], order=[])
        free, unproven, absent, unplaced, pictures = rng.random(5) < (FREE, UNPROVEN, ABSENT, UNPLACED, PICTURES)
        places, evidence = None if unplaced else self.places[i], None if unproven else self.evidence
        shown = candidates(self.candidates, i, places, evidence)
        if pictures:
            for place, picture in zip(shown, self.nearby[i], strict=False):
                if picture is not None:
                    place["picture"] = picture
        order = np.arange(len(shown))
        if absent:
            order = order[self._distances_km(i)[order] > RIGHT_KM]
        count = rng.integers(2, MOST + 1) if rng.random() < FEWER else COUNT
        order = rng.permutation(order[:count])
        return self._render("free" if free else "pool", i, shown=shown, order=order.tolist())

    def usual_prompt(self, i: int, rng: np.random.Generator) -> Prompt:
        """Return the usual question about photo ``i``, its candidates in an order drawn from ``rng``."""
        shown = candidates(self.candidates, i, self.places[i], self.evidence)[:COUNT]
        return self._render("pool", i, shown=shown, order=rng.permutation(len(shown)).tolist())

    def _distances_km(self, i: int) -> NDArray[np.float64]:
        return haversine_km(*self.truth[i], *self.candidates.lat_lon[i].T)

    def _render(self, name: str, i: int, *, shown: list[dict[str, Any]], order: list[int]) -> Prompt:
        """Render a prompt file with the candidates at ``order``, and add the right answer."""
        listed = [shown[at] | {"letter": letter} for at, letter in zip(order, LETTERS, strict=False)]
        distances_km = self._distances_km(i)[order].tolist()
        is_right = min(distances_km, default=np.inf) <= RIGHT_KM
        if name == "pool":
            answer = LETTERS[int(np.argmin(distances_km))] if is_right else LETTERS[-1]
        else:
            lat, lon = (round(float(value), 1) for value in self.truth[i])
            answer = json.dumps({"latitude": lat, "longitude": lon, "confidence": 95 if is_right else 20}) + END
        pictures = {"photo": PHOTO} | {str(p["picture"]): str(p["picture"]).encode() for p in listed if "picture" in p}
        parts = render(name, pictures, candidates=listed, similar=[])
        text = "".join(part if isinstance(part, str) else IMAGE * (PIXELS // PATCH) ** 2 for part in parts)
        references = [self.images[i] if part == PHOTO else part.decode() for part in parts if isinstance(part, bytes)]
        return Prompt(BEGIN + text, tuple(references), answer=answer, distances_km=tuple(distances_km))


def read_examples(tables: Tables, index: GeoIndex, tuning: Tuning) -> Examples:
    """Read examples from a run's tables up to the alignment's verdicts; ``tuning`` is that of the pool.

    Raises GeoError when a place is not known.
    """
    truth, neighbors = tables.photos.lat_lon, tables.neighbors
    if not np.isfinite(truth).all():
        raise GeoError("training a verifier needs photos whose places are known")
    alignment = tables.verdicts["alignment"].over(tables.pool.mask)

    def make(pool: Pool, matches: Places | None, matched: Examples | None) -> Examples:
        chosen = shortlist(pool, MOST)
        rows = nearby_rows(chosen, neighbors)
        pictures = np.full(rows.shape, None, object)
        pictures[rows >= 0] = index.rows["image"].take(rows[rows >= 0]).to_pylist()
        known = evidence(chosen, pool, neighbors, aligned=alignment, tuning=tuning, matches=matches)
        images = [str(image) for image in tables.photos.images]
        return Examples(
            images,
            truth,
            candidates=chosen,
            evidence=known,
            places=place_texts(chosen),
            nearby=pictures.tolist(),
            matched=matched,
        )

    return make(without(tables.pool, VISUAL), None, make(tables.pool, tables.matches, None))
