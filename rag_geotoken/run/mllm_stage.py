"""A multimodal model's verdicts as a table of a run: asked once, kept as they come, resumed where it failed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.decision import strategies as selection
from rag_geotoken.errors import GeoError
from rag_geotoken.files import remove
from rag_geotoken.mllm import open_client
from rag_geotoken.mllm.journal import ask_journaled, read_journal
from rag_geotoken.mllm.pictures import SIZE, encode_pictures
from rag_geotoken.mllm.prompts import prompts_sha256
from rag_geotoken.run.retrieval import run_stage
from rag_geotoken.run.tables import padded, read_embeddings, read_neighbors, read_own_places, read_verdicts
from rag_geotoken.tables import read_table
from rag_geotoken.types import Matches, Neighbors, Pool, Predictions
from rag_geotoken.verifiers import questions as verify
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
    import pyarrow as pa

    from rag_geotoken.mllm.request import Client
    from rag_geotoken.pipeline import Geolocator

JOURNAL = "mllm-journal.jsonl"


@dataclass(frozen=True)
class Asking:
    """How a multimodal model is asked.

    mode: ``pool``, which of the candidates it is; ``free``, any place, the candidates as hints; ``zero-shot``, any
    place; ``diversify``, G3's prompts, whose answers join the pool. evidence: what is known of each candidate, in
    words. pictures: the best neighbour's picture beside each candidate. answers: how many to each prompt of
    ``diversify``. size: of a picture's longer side in pixels.
    """

    mode: str = "pool"
    evidence: bool = True
    pictures: bool = False
    answers: int = 2
    size: int = SIZE

    def __post_init__(self) -> None:
        """Raises GeoError for an unknown mode."""
        if self.mode not in verify.MODES:
            raise GeoError(
                f"a multimodal model is not asked in the mode {self.mode!r}: choose {', '.join(verify.MODES)}"
            )


@dataclass(frozen=True)
class Asked:
    """A model that is there, how it is asked, and whether again where it failed before."""

    client: Client
    asking: Asking
    resume: bool = False

    @classmethod
    def open(
        cls,
        where: str | None,
        model: str | None,
        concurrent: int | None,
        mode: str,
        evidence: bool,
        pictures: bool,
        resume: bool,
        verifies: bool,
    ) -> Asked | None:
        """The model of a command line, None where none is wanted. Raises GeoError, before any work."""
        if where is None:
            if verifies or model or mode != "pool" or resume:
                raise GeoError(
                    "which multimodal model? Give --mllm http://HOST:PORT/v1, a folder, a hub's name or embedded"
                )
            return None
        if not verifies and mode != "diversify":
            raise GeoError("--mllm is given and verifies nothing: add --verify mllm, or --mllm-mode diversify")
        return cls(open_client(where, model, concurrent), Asking(mode, evidence, pictures), resume)


def ask_model(
    folder: Path,
    name: str,
    geolocator: Geolocator,
    asked: Asked,
    pool: Pool | None = None,
    matches: Matches | None = None,
) -> Path:
    """Photos and their pool -> ``verdicts-NAME``, a line a photo.

    Columns: id, verifier, status, scores (over the pool's entries in their order), lat, lon, confidence (lists: places
    of the model's own), raw (its answers), requests, prompt_tokens, output_tokens. Every answer is in a journal as soon
    as it is there. A photo that got none has the reason as status and scores of zero; ``asked.resume`` asks again for
    those, instead of leaving them as they are. pool: not needed to diversify.
    """
    import pyarrow as pa

    path = folder / f"verdicts-{name}.parquet"
    if asked.resume and path.is_file() and set(read_table(path, ["status"])["status"].to_pylist()) != {"ok"}:
        remove(path)
    ids, photo, _ = read_embeddings(folder)
    neighbors, images = read_neighbors(folder), _images(folder)
    journal = folder / JOURNAL
    known = cache(partial(read_journal, journal))  # once for all parts, and not at all where nothing is left to do

    def work(at: slice) -> pa.Table:
        ask = partial(ask_journaled, asked.client, journal=journal, again=asked.resume, known=known())
        shown, errors = encode_pictures(images[at], asked.asking.size)
        if any(errors):
            raise GeoError(f"a picture is gone since it was encoded: {next(filter(None, errors))}")
        pictures = [picture or b"" for picture in shown]
        part = _Part(photo[at], neighbors[at], pool and pool[at], matches and matches[at], pictures)
        found, scores = _ask(geolocator, part, asked.asking, ask)
        own = [places[np.isfinite(places[:, 0])] for places in found.lat_lon]
        sure = [values[: len(places)] for values, places in zip(found.confidence, own, strict=True)]
        doubles = pa.list_(pa.float64())
        return pa.table(
            {
                "id": pa.array(ids[at], pa.string()),
                "verifier": [f"mllm-{asked.asking.mode}"] * len(own),
                "status": found.status,
                "scores": pa.array(scores, pa.list_(pa.float32())),
                "lat": pa.array([places[:, 0] for places in own], doubles),
                "lon": pa.array([places[:, 1] for places in own], doubles),
                "confidence": pa.array(sure, doubles),
                "raw": pa.array(found.raw, pa.list_(pa.string())),
                "requests": found.requests,
                "prompt_tokens": found.prompt_tokens,
                "output_tokens": found.output_tokens,
            }
        )

    recipe: dict[str, Any] = {"model": asked.client.model, "prompts": prompts_sha256(), **asdict(asked.asking)}
    recipe |= {"encoder": geolocator.alignment.identity}
    if asked.asking.evidence:  # its words follow from these too
        recipe |= {name: getattr(geolocator.tuning, name) for name in ("alignment_scale", "search_weights")}
    if pool is not None:
        recipe["entries"] = hashlib.sha256(pool.mask.tobytes()).hexdigest()
    inputs = ["photos", "embeddings", "neighbours"] + ["pool"] * bool(pool) + ["matches"] * bool(matches)
    return run_stage(folder, f"verdicts-{name}", recipe, inputs, ids, work)


@dataclass(frozen=True)
class Told:
    """A model's verdicts read back.

    scores (N, C) over a pool; answered (N,); places (N, M, 2) of its own and their confidence (N, M), NaN for none.
    """

    scores: NDArray[np.float32]
    answered: NDArray[np.bool_]
    places: NDArray[np.float64]
    confidence: NDArray[np.float64]


def read_told(folder: Path, name: str, pool: Pool) -> Told:
    """``verdicts-NAME`` of a run, asked about that pool."""
    table = read_table(folder / f"verdicts-{name}.parquet", ["status", "confidence"])
    answered = np.array([status == "ok" for status in table["status"].to_pylist()])
    places, confidence = read_own_places(folder, name), padded(table["confidence"])
    return Told(read_verdicts(folder, pool, name), answered, places, confidence)


def decide_told(
    geolocator: Geolocator,
    photo: NDArray[np.float32],
    pool: Pool,
    scores: dict[str, NDArray[np.float32]],
    told: Told,
    mode: str,
) -> Predictions:
    """The decision with a model's verdicts beside other verifiers' scores; without, where it gave none.

    A place of its own (``free``, ``zero-shot``) is the answer where the router prefers it.
    """
    tuning, pick = geolocator.tuning, told.answered
    if mode == "pool" and pick.all():
        return selection.decide(pool, {**scores, "mllm": told.scores}, tuning)
    without = selection.decide(pool, scores, tuning)
    if mode == "pool":
        decided = selection.decide(pool, {**scores, "mllm": told.scores}, tuning)
    elif mode == "diversify":
        return without  # its answers are in the pool
    else:
        own = told.places[:, 0]
        gain = gain_of(geolocator, photo, own, without)
        decided = route(pool, without, own, told.confidence[:, 0], gain, tuning, selection.verified_by(scores))
    return Predictions(
        np.where(pick[:, None], decided.lat_lon, without.lat_lon),
        np.where(pick[:, None], decided.confidence, without.confidence),
        np.where(pick, decided.source, without.source).astype(np.int8),
    )


def gain_of(
    geolocator: Geolocator, photo: NDArray[np.float32], own: NDArray[np.float64], decided: Predictions
) -> NDArray[np.float64]:
    """How much more alike photos (N, 3, dim) are to the model's places (N, 2) than to the decided ones, in cosines."""
    gps, spots = photo[:, 1], np.where(np.isfinite(own), own, 0.0)
    theirs, ours = (geolocator.alignment.embed_places(places) for places in (spots, decided.lat_lon))
    gain: NDArray[np.float64] = np.einsum("bd,bd->b", gps, theirs - ours).astype(np.float64)
    return gain


@dataclass(frozen=True)
class _Part:
    """Some photos of a run: embeddings, neighbours, pool, matches, encoded pictures."""

    photo: NDArray[np.float32]
    neighbors: Neighbors
    pool: Pool | None
    matches: Matches | None
    pictures: list[bytes]


def _ask(
    geolocator: Geolocator, part: _Part, asking: Asking, ask: verify.Ask
) -> tuple[verify.Verdicts, list[NDArray[np.float32]]]:
    """Verdicts on some photos, and the scores of their pools' entries, zeros where the mode gives none."""
    count = len(part.pictures)
    nothing = [np.zeros(n, np.float32) for n in (part.pool.mask.sum(axis=1) if part.pool else [0] * count)]
    if asking.mode == "zero-shot":
        prompts = [[verify.zero_shot_request(picture)] for picture in part.pictures]
        return verify.ask_place(prompts, ask, 1), nothing
    if asking.mode == "diversify":
        far = geolocator.index.search(part.photo, verify.SIMILAR[-1], geolocator.tuning.search_weights, dissimilar=True)
        prompts = [
            verify.diverse_requests(picture, near, away, asking.answers)
            for picture, near, away in zip(part.pictures, part.neighbors.lat_lon, far.lat_lon, strict=True)
        ]
        return verify.ask_place(prompts, ask, asking.answers * len(verify.SIMILAR)), nothing
    assert part.pool is not None
    chosen = shortlist(part.pool)
    shown, near = _shown(geolocator, part, chosen, asking)
    if asking.mode == "free":
        prompts = [
            [verify.free_request(picture, places, seen)]
            for picture, places, seen in zip(part.pictures, shown, near, strict=True)
        ]
        return verify.ask_place(prompts, ask, 1), nothing
    found = verify.ask_pool(part.pictures, chosen, shown, ask, near)
    log_probs = found.log_probs.astype(np.float32)
    scores = chosen.spread(log_probs[:, :-1], log_probs[:, -1])
    return found, [row[kept] for row, kept in zip(scores, part.pool.mask, strict=True)]


def _shown(
    geolocator: Geolocator, part: _Part, chosen: Shortlist, asking: Asking
) -> tuple[list[list[dict[str, Any]]], list[dict[str, bytes]]]:
    """Each photo's candidates as prompts show them, and the pictures that they name."""
    places = place_texts(chosen)
    known: Evidence | None = None
    if asking.evidence and part.pool is not None:
        aligned = geolocator.verify("alignment", part.photo, part.neighbors, part.pool)
        known = evidence(chosen, part.pool, part.neighbors, aligned, geolocator.tuning, part.matches)
    shown = [candidates(chosen, i, texts, known) for i, texts in enumerate(places)]
    near: list[dict[str, bytes]] = [{} for _ in shown]
    if asking.pictures:
        rows = nearby_rows(chosen, part.neighbors)
        wanted = np.unique(rows[rows >= 0])
        encoded, _ = encode_pictures(geolocator.index.picture_files(wanted), asking.size)
        by_row = {row: picture for row, picture in zip(wanted.tolist(), encoded, strict=True) if picture}
        for i, j in zip(*np.nonzero(rows >= 0), strict=True):
            if rows[i, j] in by_row:
                shown[i][j]["picture"] = f"near {j}"
                near[i][f"near {j}"] = by_row[int(rows[i, j])]
    return shown, near


def _images(folder: Path) -> list[str]:
    """The references of a run's readable photos."""
    good = read_table(folder / "embeddings.parquet", ["error"])["error"].is_null()
    images: list[str] = read_table(folder / "photos.parquet", ["image"]).filter(good)["image"].to_pylist()
    return images
