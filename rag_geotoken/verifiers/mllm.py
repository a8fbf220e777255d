"""A multimodal model as a verifier: what it is shown of a pool, what its answers say, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision import strategies
from rag_geotoken.decision.strategies import Given
from rag_geotoken.errors import GeoError
from rag_geotoken.mllm.pictures import encode_pictures
from rag_geotoken.options import verified_by
from rag_geotoken.types import Embeddings, MllmVerdict, Pool, Predictions, Tables
from rag_geotoken.verifiers import Verifier, questions
from rag_geotoken.verifiers.router import route
from rag_geotoken.verifiers.shortlist import (
    Evidence,
    Shortlist,
    candidates,
    evidence,
    nearby_rows,
    place_texts,
    shortlist,
)

if TYPE_CHECKING:
    from rag_geotoken.models import Models
    from rag_geotoken.options import Options

Floats = NDArray[np.float64]


def log_probs(models: Models, options: Options, tables: Tables, pool: Pool) -> MllmVerdict:
    """Log-probabilities (B, C) of the places by what a multimodal model answers, or places of its own.

    ``mllm_mode``: pool asks which of the candidates it is; free for any place, the candidates as hints; zero-shot for
    any place; diversify adds the answers to G3's prompts to the pool, and then asks which of the candidates it is.
    """
    pictures = _pictures(options, tables)
    if options.mllm_mode == "zero-shot":
        prompts = [[questions.zero_shot_request(picture)] for picture in pictures]
        return questions.ask_place(prompts, models.session.ask, 1, pool.mask)
    chosen = shortlist(pool)
    shown, near = _shown(models, options, tables, pool, chosen)
    if options.mllm_mode == "free":
        asked = zip(pictures, shown, near, strict=True)
        prompts = [[questions.free_request(picture, places, seen)] for picture, places, seen in asked]
        return questions.ask_place(prompts, models.session.ask, 1, pool.mask)
    return questions.ask_pool(pictures, chosen, shown, models.session.ask, near, pool.mask)


VERIFIER = Verifier(
    log_probs,
    MllmVerdict,
    reads=("embeddings", "neighbors"),
    models=("mllm", "encoder", "index"),
    tuning=("alignment_scale", "search_weights"),
)


def diverse_places(models: Models, options: Options, tables: Tables) -> MllmVerdict:
    """G3's prompts with places of similar and dissimilar photos: answers that are to join the pool."""
    embeddings, weights = tables.embeddings, models.tuning.search_weights
    far = models.index.search(embeddings.vectors, questions.SIMILAR[-1], weights, dissimilar=True)
    prompts = [
        questions.diverse_requests(picture, near, away, options.answers)
        for picture, near, away in zip(_pictures(options, tables), tables.neighbors.lat_lon, far.lat_lon, strict=True)
    ]
    most = options.answers * len(questions.SIMILAR)
    return questions.ask_place(prompts, models.session.ask, most, np.zeros((len(prompts), 1), bool))


def decide_with_mllm(
    models: Models, options: Options, embeddings: Embeddings, pool: Pool, given: Given, verdict: MllmVerdict
) -> Predictions:
    """The decision with a model's verdict beside other verifiers' scores; without it, where it gave none.

    A place of its own (``free``, ``zero-shot``) is the answer where the router prefers it.
    """
    asked = replace(given, scores={**given.scores, "mllm": verdict.over(pool.mask)})
    chooses = options.mllm_mode in ("pool", "diversify")
    if chooses and verdict.answered.all():
        return strategies.decide(pool, asked, options.select)
    without = strategies.decide(pool, given, options.select)
    if chooses:
        decided = strategies.decide(pool, asked, options.select)
    else:
        own = verdict.lat_lon[:, 0]
        gain = gain_of(models, embeddings, own, without)
        decided = route(pool, without, own, verdict.confidence[:, 0], gain, models.tuning, verified_by(given.scores))
    pick = verdict.answered
    return Predictions(
        np.where(pick[:, None], decided.lat_lon, without.lat_lon),
        np.where(pick[:, None], decided.confidence, without.confidence),
        np.where(pick, decided.source, without.source).astype(np.int8),
    )


def gain_of(models: Models, embeddings: Embeddings, own: Floats, decided: Predictions) -> Floats:
    """How much more alike photos are to the model's places (B, 2) than to the decided ones, in cosines (B,)."""
    spots = np.where(np.isfinite(own), own, 0.0)
    theirs, ours = (models.alignment.embed_places(places) for places in (spots, decided.lat_lon))
    gain: Floats = np.einsum("bd,bd->b", embeddings.gps, theirs - ours).astype(np.float64)
    return gain


def _pictures(options: Options, tables: Tables) -> list[bytes]:
    """The photos as the model is shown them."""
    encoded, errors = encode_pictures(tables.photos.images, options.picture_size)
    if any(errors):
        raise GeoError(f"a picture is gone since it was encoded: {next(filter(None, errors))}")
    return [picture or b"" for picture in encoded]


def _shown(
    models: Models, options: Options, tables: Tables, pool: Pool, chosen: Shortlist
) -> tuple[list[list[dict[str, Any]]], list[dict[str, bytes]]]:
    """Each photo's candidates as prompts show them, and the pictures that they name."""
    known: Evidence | None = None
    if options.evidence:
        from rag_geotoken.verifiers.alignment import VERIFIER as ALIGNMENT

        aligned = ALIGNMENT.scores(models, options, tables, pool).scores
        matches = tables.matches if options.visual else None
        known = evidence(chosen, pool, tables.neighbors, aligned, models.tuning, matches)
    shown = [candidates(chosen, i, texts, known) for i, texts in enumerate(place_texts(chosen))]
    near: list[dict[str, bytes]] = [{} for _ in shown]
    if options.near_pictures:
        rows = nearby_rows(chosen, tables.neighbors)
        pictures = _encoded(models, options, rows)
        for i, j in zip(*np.nonzero(rows >= 0), strict=True):
            if rows[i, j] in pictures:
                shown[i][j]["picture"] = f"near {j}"
                near[i][f"near {j}"] = pictures[int(rows[i, j])]
    return shown, near


def _encoded(models: Models, options: Options, rows: NDArray[np.int64]) -> Mapping[int, bytes]:
    """The gallery's pictures of rows (B, M), -1 for none, that can be read."""
    wanted = np.unique(rows[rows >= 0])
    encoded, _ = encode_pictures(models.index.picture_files(wanted), options.picture_size)
    return {row: picture for row, picture in zip(wanted.tolist(), encoded, strict=True) if picture}
