"""These functions are the stages of the road: each computes one result of a block of photos from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray

from rag_geotoken.decision import strategies
from rag_geotoken.decision.pool import chosen_pool, pool_of
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.index.geo_index import COPIES
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.tokens import decoding
from rag_geotoken.tokens.frontier import frontier
from rag_geotoken.tokens.posterior import effective_area_km2
from rag_geotoken.tokens.region import Region
from rag_geotoken.types import (
    RADII_KM,
    SOURCES,
    Answers,
    Candidates,
    Embeddings,
    MllmVerdict,
    Neighbors,
    Picture,
    Places,
    Pool,
    Posterior,
    Tables,
    Verdict,
)  # fmt: skip
from rag_geotoken.verifiers import Verifier


def embed(models: Models, options: Options, tables: Tables) -> Embeddings:
    """Return the photos' embeddings, zeros where a picture cannot be read."""
    return embed_pictures(models.alignment, tables.photos.images)


def embed_pictures(alignment: GeoAlignment, images: Sequence[Picture]) -> Embeddings:
    """Return the embeddings of pictures, which needs no index yet."""
    pixels, errors = alignment.load(images)
    vectors = alignment.embed(pixels)
    vectors[[error is not None for error in errors]] = 0.0
    return Embeddings(vectors, digests(pixels), errors)


def digests(pixels: NDArray[np.uint8]) -> list[str]:
    """Return a name for each picture's pixels (B, H, W, 3), 32 hexadecimal digits, by which copies are recognized."""
    return [blake2b(picture.tobytes(), digest_size=16).hexdigest() for picture in pixels]


def search(models: Models, options: Options, tables: Tables) -> Neighbors:
    """Return the k nearest gallery photos; a photo never finds its own pixels.

    Within a region that holds fewer photos, the nearest to its middle are taken.
    """
    k, embeddings = options.neighbors, tables.embeddings
    return models.index.search(
        embeddings.vectors,
        k,
        weights=models.tuning.search_weights,
        digests=embeddings.digests,
        keep=models.region(options.within, at_least=k + COPIES),
        exact=options.exact,
        authors=tables.photos.authors if options.other_authors else None,
    )


@torch.inference_mode()
def propose(models: Models, options: Options, tables: Tables) -> Candidates:
    """Return the cells that the token model decodes in every way that the options name."""
    tokens, memory = models.tokens, models.memory(tables.embeddings, tables.neighbors)
    region = Region.within(models.tokenizer, *options.within) if options.within else None
    decoded: list[decoding.Decoded] = []
    for name in options.propose:
        if name == "greedy":
            decoded.append(decoding.greedy(tokens, memory, region))
        elif name == "beam":
            decoded.append(decoding.beam(tokens, memory, options.beam_width, region))
        else:
            drawn = {name: getattr(options, name) for name in ("temperature", "seed", "top_p", "epsilon")}
            keys, count = tables.embeddings.keys, options.samples
            decoded.append(decoding.sample(tokens, memory, count, keys=keys, region=region, **drawn))
    cells = torch.cat([part.tokens for part in decoded], dim=1).numpy()
    log_prob = torch.cat([part.log_prob for part in decoded], dim=1).numpy()
    counts = [part.log_prob.shape[1] for part in decoded]
    source = np.repeat([SOURCES.index(name) for name in options.propose], counts).astype(np.int8)
    centers = np.stack(models.tokenizer.decode(cells.reshape(-1, cells.shape[-1])), axis=-1)
    return Candidates(cells, log_prob, np.tile(source, (len(cells), 1)), centers.reshape(*cells.shape[:2], 2))


def find_places(models: Models, options: Options, tables: Tables) -> Places:
    """Return the places most similar to each photo's GPS embedding."""
    return models.gps_search(tables.embeddings.gps, options.gps_places)


def believe(models: Models, options: Options, tables: Tables) -> Posterior:
    """Return the token model's posterior of each photo over disjoint cells."""
    return frontier(models.tokens, models.memory(tables.embeddings, tables.neighbors), options.openings)


def match(models: Models, options: Options, tables: Tables) -> Places:
    """Return where each neighbor's picture puts the photo, and how well the two pictures fit."""
    pixels, errors = load_pictures(tables.photos.images, models.matcher.size)
    if any(errors):
        raise GeoError(f"a picture is gone since it was encoded: {next(filter(None, errors))}")
    matcher, near = models.matcher, tables.neighbors
    lat_lon, scores = near.lat_lon.copy(), np.zeros(near.scores.shape, np.float32)
    for start in range(0, len(pixels), matcher.photos):
        at = slice(start, start + matcher.photos)
        pictures = models.index.pictures(near.rows[at], matcher.size)
        matches = matcher.match(pixels[at], pictures, near.lat_lon[at])
        lat_lon[at], scores[at] = matches.lat_lon, matches.scores
    return Places(lat_lon, scores)


def diversify(models: Models, options: Options, tables: Tables) -> MllmVerdict:
    """Return a multimodal model's answers to G3's prompts, whose places join the pool."""
    from rag_geotoken.verifiers.mllm import diverse_places

    return diverse_places(models, options, tables)


def pool(models: Models, options: Options, tables: Tables) -> Pool:
    """Return the places that verifiers score."""
    return pool_of(tables, options, models.tokenizer, models.tuning)


def verdict(verifier: Verifier, models: Models, options: Options, tables: Tables) -> Verdict:
    """Return a verifier's score of every place; a multimodal model scores only those that may be the answer."""
    scored = chosen_pool(options, tables.pool) if verifier.kind is MllmVerdict else tables.pool
    return verifier.scores(models, options, tables, scored)


def decide(models: Models, options: Options, tables: Tables) -> Answers:
    """Return the answers of readable photos by the pool and its verdicts; an answer that is too unsure is an error."""
    chosen = chosen_pool(options, tables.pool)
    scores = {name: given.over(tables.pool.mask) for name, given in tables.verdicts.items() if name != "mllm"}
    given = strategies.Given(scores, models.tuning, tables.neighbors, models.tokenizer)
    answers = Answers.of(tables.photos, [None] * len(tables.photos))
    by_mllm = tables.verdicts.get("mllm")
    if isinstance(by_mllm, MllmVerdict):
        from rag_geotoken.verifiers.mllm import decide_with_mllm

        decided = decide_with_mllm(models, options, tables.embeddings, chosen, given, by_mllm)
        answers.verified[:] = by_mllm.answered
    else:
        decided = strategies.decide(chosen, given, options.select)
        answers.verified[:] = bool(options.verify)
    for name, values in vars(decided).items():
        getattr(answers, name)[:] = values
    if options.frontier:
        answers.area_km2[:] = effective_area_km2(tables.posterior)
    most, least = np.inf if options.max_area_km2 is None else options.max_area_km2, options.least_confidence
    for i in np.flatnonzero(answers.area_km2 > most).tolist():
        answers.errors[i] = f"abstained: the posterior is spread over more than {most:g} km2"
    for i in np.flatnonzero(answers.confidence[:, RADII_KM.index(200)] < least).tolist():
        answers.errors[i] = f"abstained: the chance to be within 200 km is below {least:g}"
    return answers
