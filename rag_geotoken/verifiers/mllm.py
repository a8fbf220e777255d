"""This verifier asks a multimodal model: what it is shown of a pool, and what follows from its answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rag_geotoken.decision import strategies
from rag_geotoken.decision.strategies import Given
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import Floats
from rag_geotoken.mllm.pictures import encode_pictures
from rag_geotoken.models import Models
from rag_geotoken.options import Options, verified_by
from rag_geotoken.types import Embeddings, MllmVerdict, Pool, Predictions, Tables
from rag_geotoken.verifiers import Verifier, questions
from rag_geotoken.verifiers.alignment import cosines
from rag_geotoken.verifiers.router import route
from rag_geotoken.verifiers.shortlist import Shortlist, candidates, evidence, nearby_rows, place_texts, shortlist


def log_probs(models: Models, options: Options, tables: Tables, pool: Pool) -> MllmVerdict:
    """Return log-probabilities (B, C) of the places by a multimodal model's answers, or places that it names itself.

    ``mllm_mode``: pool asks which of the candidates it is; free for any place, the candidates as hints; zero-shot for
    any place; diversify adds the answers to G3's prompts to the pool, and then asks which of the candidates it is.
    """
    ask, pictures = models.session.ask, _pictures(options, tables)
    if options.mllm_mode == "zero-shot":
        prompts = [[questions.zero_shot_request(picture)] for picture in pictures]
        return questions.ask_place(prompts, ask, 1, mask=pool.mask)
    chosen = shortlist(pool)
    shown, near = _shown(models, options, tables, pool=pool, chosen=chosen)
    if options.mllm_mode == "free":
        prompts = [[questions.free_request(*of_photo)] for of_photo in zip(pictures, shown, near, strict=True)]
        return questions.ask_place(prompts, ask, 1, mask=pool.mask)
    return questions.ask_pool(pictures, chosen, ask, shown=shown, near=near, mask=pool.mask)


TUNING = ("alignment_scale", "search_weights")
VERIFIER = Verifier(
    log_probs, MllmVerdict, reads=("embeddings", "neighbors"), models=("mllm", "encoder", "index"), tuning=TUNING
)


def diverse_places(models: Models, options: Options, tables: Tables) -> MllmVerdict:
    """Ask G3's prompts with places of similar and dissimilar photos, whose answers are to join the pool."""
    embeddings, weights = tables.embeddings, models.tuning.search_weights
    far = models.index.search(embeddings.vectors, questions.SIMILAR[-1], weights, dissimilar=True)
    photos = zip(_pictures(options, tables), tables.neighbors.lat_lon, far.lat_lon, strict=True)
    prompts = [questions.diverse_requests(*photo, n=options.answers) for photo in photos]
    most = options.answers * len(questions.SIMILAR)
    return questions.ask_place(prompts, models.session.ask, most, mask=np.zeros((len(prompts), 1), bool))


def decide_with_mllm(
    models: Models, options: Options, embeddings: Embeddings, pool: Pool, given: Given, verdict: MllmVerdict
) -> Predictions:
    """Decide with a model's verdict beside other verifiers' scores, or without it where it gave none.

    A place of its own (``free``, ``zero-shot``) is the answer where the router prefers it.
    """
    if options.mllm_mode in ("pool", "diversify"):
        scores = {**given.scores, "mllm": verdict.over(pool.mask)}
        decided = strategies.decide(pool, replace(given, scores=scores), options.select)
        if verdict.answered.all():
            return decided
        without = strategies.decide(pool, given, options.select)
    else:
        without = strategies.decide(pool, given, options.select)
        own, stated = verdict.lat_lon[:, 0], verdict.confidence[:, 0]
        gain, verified = gain_of(models, embeddings, own, decided=without), verified_by(given.scores)
        decided = route(pool, without, own, stated=stated, gain=gain, tuning=models.tuning, verified=verified)
    answered = verdict.answered
    return Predictions(
        np.where(answered[:, None], decided.lat_lon, without.lat_lon),
        np.where(answered[:, None], decided.confidence, without.confidence),
        np.where(answered, decided.source, without.source).astype(np.int8),
    )


def gain_of(models: Models, embeddings: Embeddings, own: Floats, decided: Predictions) -> Floats:
    """Return by how much (B,) the photos' cosine with the model's places (B, 2) exceeds that with the decided ones."""
    named = np.where(np.isfinite(own), own, 0.0)
    theirs, ours = (models.alignment.embed_places(places) for places in (named, decided.lat_lon))
    gain: Floats = np.einsum("bd,bd->b", embeddings.gps, theirs - ours).astype(np.float64)
    return gain


def _pictures(options: Options, tables: Tables) -> list[bytes]:
    """Encode the photos as the model is shown them."""
    encoded, errors = encode_pictures(tables.photos.images, options.picture_size)
    if any(errors):
        raise GeoError(f"a picture is gone since it was encoded: {next(filter(None, errors))}")
    return [picture or b"" for picture in encoded]


def _shown(
    models: Models, options: Options, tables: Tables, *, pool: Pool, chosen: Shortlist
) -> tuple[list[list[dict[str, Any]]], list[dict[str, bytes]]]:
    """Return each photo's candidates as prompts show them, and the pictures that they name."""
    known = None
    if options.evidence:
        aligned = cosines(models, options, tables, pool).scores
        matches = tables.matches if options.visual else None
        known = evidence(chosen, pool, tables.neighbors, aligned=aligned, tuning=models.tuning, matches=matches)
    shown = [candidates(chosen, i, texts, known) for i, texts in enumerate(place_texts(chosen))]
    near: list[dict[str, bytes]] = [{} for _ in shown]
    if options.near_pictures:
        rows = nearby_rows(chosen, tables.neighbors)
        wanted = np.unique(rows[rows >= 0])
        encoded, _ = encode_pictures(models.index.picture_files(wanted), options.picture_size)
        pictures = dict(zip(wanted.tolist(), encoded, strict=True))
        for i, j in np.argwhere(rows >= 0).tolist():
            if picture := pictures[rows[i, j]]:
                shown[i][j]["picture"] = f"near {j}"
                near[i][f"near {j}"] = picture
    return shown, near
