"""Here stands what each stage of the road does with a block of photos."""

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
    BEAM,
    GREEDY,
    RADII_KM,
    SAMPLE,
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
    """Embed pictures, as zeros where one cannot be read."""
    return embed_pictures(models.alignment, tables.photos.images)


def embed_pictures(alignment: GeoAlignment, images: Sequence[Picture]) -> Embeddings:
    """Embed pictures without an index: an index is made of these."""
    pixels, errors = alignment.load(images)
    vectors = alignment.embed(pixels)
    vectors[[error is not None for error in errors]] = 0.0
    return Embeddings(vectors, digests(pixels), errors)


def digests(pixels: NDArray[np.uint8]) -> list[str]:
    """Name each picture's pixels (B, H, W, 3) by 32 hexadecimal digits, by which a photo knows itself."""
    return [blake2b(picture.tobytes(), digest_size=16).hexdigest() for picture in pixels]


def search(models: Models, options: Options, tables: Tables) -> Neighbors:
    """Search the k gallery photos nearest to each embedding; a photo never finds its own pixels.

    Within a region, where fewer photos lie than asked for, the nearest to its middle are taken.
    """
    k, embeddings = options.neighbors, tables.embeddings
    return models.index.search(
        embeddings.vectors,
        k,
        models.tuning.search_weights,
        embeddings.digests,
        models.region(options.within, at_least=k + COPIES),
        exact=options.exact,
        authors=tables.photos.authors if options.other_authors else None,
    )


@torch.inference_mode()
def propose(models: Models, options: Options, tables: Tables) -> Candidates:
    """Decode cells from embeddings and neighbors, in every way that is asked for."""
    tokens, memory = models.tokens, models.memory(tables.embeddings, tables.neighbors)
    region = Region.within(models.tokenizer, *options.within) if options.within else None
    decoded: list[tuple[int, decoding.Decoded]] = []
    for name in options.propose:
        if name == "greedy":
            decoded.append((GREEDY, decoding.greedy(tokens, memory, region)))
        elif name == "beam":
            decoded.append((BEAM, decoding.beam(tokens, memory, options.beam_width, region)))
        else:
            drawn = decoding.sample(
                tokens,
                memory,
                options.samples,
                temperature=options.temperature,
                seed=options.seed,
                keys=tables.embeddings.keys,
                top_p=options.top_p,
                epsilon=options.epsilon,
                region=region,
            )
            decoded.append((SAMPLE, drawn))
    cells = torch.cat([d.tokens for _, d in decoded], dim=1).numpy()
    source = [np.full(d.log_prob.shape, name, np.int8) for name, d in decoded]
    lat, lon = models.tokenizer.decode(cells.reshape(-1, cells.shape[-1]))
    return Candidates(
        cells,
        torch.cat([d.log_prob for _, d in decoded], dim=1).numpy(),
        np.concatenate(source, axis=1),
        np.stack([lat, lon], axis=-1).reshape(*cells.shape[:2], 2),
    )


def find_places(models: Models, options: Options, tables: Tables) -> Places:
    """Find the places most like each photo's GPS embedding."""
    return models.gps_search(tables.embeddings.gps, options.gps_places)


def believe(models: Models, options: Options, tables: Tables) -> Posterior:
    """Ask the token model what it believes of each photo as a whole."""
    return frontier(models.tokens, models.memory(tables.embeddings, tables.neighbors), options.openings)


def match(models: Models, options: Options, tables: Tables) -> Places:
    """Compare pictures: where does each neighbor's picture put the photo, and how well do the two fit?"""
    pixels, errors = load_pictures(tables.photos.images, models.matcher.size)
    if any(errors):
        raise GeoError(f"a picture is gone since it was encoded: {next(filter(None, errors))}")
    matcher, near = models.matcher, tables.neighbors
    lat_lon, scores = near.lat_lon.copy(), np.zeros(near.scores.shape, np.float32)
    for start in range(0, len(pixels), matcher.photos):
        at = slice(start, start + matcher.photos)
        pictures = models.index.pictures(near.rows[at], matcher.size)
        found = matcher.match(pixels[at], pictures, near.lat_lon[at])
        lat_lon[at], scores[at] = found.lat_lon, found.scores
    return Places(lat_lon, scores)


def diversify(models: Models, options: Options, tables: Tables) -> MllmVerdict:
    """Ask a multimodal model G3's prompts; its answers join the pool."""
    from rag_geotoken.verifiers.mllm import diverse_places

    return diverse_places(models, options, tables)


def pool(models: Models, options: Options, tables: Tables) -> Pool:
    """Pool the tables so far into the places that verifiers score."""
    return pool_of(tables, options, models.tokenizer, models.tuning)


def verdict(verifier: Verifier, models: Models, options: Options, tables: Tables) -> Verdict:
    """Score every place by a verifier; a multimodal model sees those alone that may be the answer."""
    asks_model = verifier.kind is MllmVerdict
    return verifier.scores(models, options, tables, chosen_pool(options, tables.pool) if asks_model else tables.pool)


def decide(models: Models, options: Options, tables: Tables) -> Answers:
    """Decide each readable photo by its pool and verdicts; those that are too unsure abstain, and say so."""
    chosen = chosen_pool(options, tables.pool)
    scores = {name: found.over(tables.pool.mask) for name, found in tables.verdicts.items() if name != "mllm"}
    given = strategies.Given(scores, models.tuning, tables.neighbors, models.tokenizer)
    answers = Answers.of(tables.photos, [None] * len(tables.photos))
    answers.verified[:] = bool(options.verify)
    asked = tables.verdicts.get("mllm")
    if isinstance(asked, MllmVerdict):
        from rag_geotoken.verifiers.mllm import decide_with_mllm

        decided = decide_with_mllm(models, options, tables.embeddings, chosen, given, asked)
        answers.verified[:] = asked.answered
    else:
        decided = strategies.decide(chosen, given, options.select)
    for name, values in vars(decided).items():
        getattr(answers, name)[:] = values
    if options.frontier:
        answers.area_km2[:] = effective_area_km2(tables.posterior)
    return _abstaining(answers, options)


def _abstaining(answers: Answers, options: Options) -> Answers:
    most = np.inf if options.max_area_km2 is None else options.max_area_km2
    for i in np.flatnonzero(answers.area_km2 > most).tolist():
        answers.errors[i] = f"abstained: the posterior is spread over more than {most:g} km2"
    for i in np.flatnonzero(answers.confidence[:, RADII_KM.index(200)] < options.least_confidence).tolist():
        answers.errors[i] = f"abstained: the chance to be within 200 km is below {options.least_confidence:g}"
    return answers
