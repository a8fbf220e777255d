"""These functions make the requests to a multimodal model about a photo's pool, and read its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.geo.sphere import Floats
from rag_geotoken.mllm.parse import parse_place
from rag_geotoken.mllm.prompts import render
from rag_geotoken.mllm.request import Reply, Request
from rag_geotoken.types import MllmVerdict
from rag_geotoken.verifiers.shortlist import Shortlist

LETTERS, NONE = "ABCDEFGHIJ", "Z"
TURNS = (0.0, 0.5, 0.25, 0.75)  # cyclic orders of the candidates, as parts of a whole turn: one output token each
SIMILAR = (0, 5, 10, 15)  # numbers of places of similar photos in G3's prompts, and as many of dissimilar ones
TEMPERATURE = 0.7  # of the answers that are to differ
MAX_TOKENS = 96  # of a place in JSON
PLACE_SCHEMA = {
    "type": "object",
    "properties": {
        "latitude": {"type": "number", "minimum": -90, "maximum": 90},
        "longitude": {"type": "number", "minimum": -180, "maximum": 180},
        "confidence": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["latitude", "longitude", "confidence"],
    "additionalProperties": False,
}
Ask = Callable[[Sequence[Request]], list[Reply]]
Shown = Sequence[Mapping[str, Any]]  # candidates as a prompt shows them
Images = Mapping[str, bytes]  # by the names that a prompt uses
Mask = NDArray[np.bool_]


def ask_pool(
    photos: Sequence[bytes], chosen: Shortlist, ask: Ask, *, shown: Sequence[Shown], near: Sequence[Images], mask: Mask
) -> MllmVerdict:
    """Ask which place of its shortlist is each photo's, one token per request, the candidates in several orders.

    Models prefer a letter or a position whatever is listed there, so the log-probabilities are averaged over cyclic
    orders that begin with a random one, never that of the weights: two orders, and where these choose differently two
    more. They become the scores of the pool's entries, mask (B, C), that the places stand for. shown: each photo's
    places as :func:`.candidates` makes them; near: pictures that they name.
    """
    verdict = _empty_verdict(mask)
    orders = [_orders(photo, len(places)) for photo, places in zip(photos, shown, strict=True)]
    # Of each place of the shortlist and, last, of none of them.
    sums, turns = np.zeros((len(photos), chosen.entries.shape[1] + 1)), np.zeros(len(photos), int)
    picks: list[set[int]] = [set() for _ in photos]
    unsettled = list(range(len(photos)))
    for first in (0, 2):
        pending = [(i, order) for i in unsettled for order in orders[i][first : first + 2]]
        requests = [_pool_request(photos[i], [shown[i][c] for c in order], near[i]) for i, order in pending]
        for (i, order), reply in zip(pending, ask(requests), strict=True):
            _record(verdict, i, reply)
            if reply.error is None:
                options = [*order.tolist(), -1]
                sums[i, options] += reply.log_probs
                turns[i] += 1
                picks[i].add(options[int(np.argmax(reply.log_probs))])
        unsettled = [i for i in unsettled if verdict.status[i] == "ok" and len(picks[i]) > 1]
    sums /= np.maximum(turns, 1)[:, None]
    sums[~verdict.answered] = 0.0
    log_probs = sums.astype(np.float32)
    verdict.scores[:] = np.where(mask, chosen.spread(log_probs[:, :-1], log_probs[:, -1]), 0.0)
    return verdict


def ask_place(prompts: Sequence[Sequence[Request]], ask: Ask, places: int, *, mask: Mask) -> MllmVerdict:
    """Ask each photo's requests, whose answers are places, at most so many in order; no score over a mask (B, C).

    A photo's status is "ok" when one of its answers is a place, else why the last was none.
    """
    verdict = _empty_verdict(mask, places)
    pending = [(i, request) for i, requests in enumerate(prompts) for request in requests]
    counts, reasons = [0] * len(prompts), ["not asked"] * len(prompts)
    for (i, _), reply in zip(pending, ask([request for _, request in pending]), strict=True):
        _record(verdict, i, reply)
        reasons[i] = reply.error or reasons[i]
        for text in reply.texts:
            place = parse_place(text)
            if place.lat is not None and place.lon is not None:
                verdict.lat_lon[i, counts[i]] = place.lat, place.lon
                verdict.confidence[i, counts[i]] = np.nan if place.confidence is None else place.confidence
                counts[i] += 1
            else:
                reasons[i] = place.status
    verdict.status[:] = ["ok" if count else reason for count, reason in zip(counts, reasons, strict=True)]
    return verdict


def free_request(photo: bytes, shown: Shown, near: Images) -> Request:
    """Make GeoToken's free generation: the candidates as hints, the answer any place."""
    order = _orders(photo, len(shown))[0]
    parts = render("free", {"photo": photo, **near}, candidates=[shown[i] for i in order])
    return Request(parts, schema=PLACE_SCHEMA, max_tokens=MAX_TOKENS)


def zero_shot_request(photo: bytes) -> Request:
    """Make a request with the photo alone."""
    return _similar_request(photo, (), ())


def diverse_requests(photo: bytes, similar: Floats, dissimilar: Floats, n: int) -> list[Request]:
    """Make G3's geo-diversification: 0, 5, 10, 15 places (K, 2) of similar and of dissimilar photos, n answers each."""
    return [
        _similar_request(photo, similar[:count], dissimilar[:count], temperature=TEMPERATURE, n=n)
        for count in SIMILAR
        if count <= len(similar)
    ]


def _similar_request(photo: bytes, similar: Iterable[Floats], dissimilar: Iterable[Floats], **options: Any) -> Request:
    near, far = ([{"lat": float(lat), "lon": float(lon)} for lat, lon in places] for places in (similar, dissimilar))
    parts = render("diversify", {"photo": photo}, similar=near, dissimilar=far)
    return Request(parts, schema=PLACE_SCHEMA, max_tokens=MAX_TOKENS, **options)


def _pool_request(photo: bytes, places: Shown, near: Images) -> Request:
    letters = LETTERS[: len(places)]
    lettered = [{**place, "letter": letter} for place, letter in zip(places, letters, strict=True)]
    return Request(render("pool", {"photo": photo, **near}, candidates=lettered), options=(*letters, NONE))


def _orders(photo: bytes, count: int) -> list[NDArray[np.int64]]:
    """Return the different cyclic orders by ``TURNS`` of a random order, seeded by the photo."""
    first = np.random.default_rng(list(sha256(photo).digest()[:8])).permutation(count)
    shifts = dict.fromkeys(round(turn * count) % max(count, 1) for turn in TURNS)
    return [np.roll(first, shift) for shift in shifts]


def _empty_verdict(mask: Mask, places: int = 1) -> MllmVerdict:
    """Make a verdict of zeros over a pool's mask (B, C), with room for places of the model's own and no costs yet."""
    photos = len(mask)
    return MllmVerdict(
        scores=np.zeros(mask.shape, np.float32),
        mask=mask,
        status=["ok"] * photos,
        lat_lon=np.full((photos, places, 2), np.nan),
        confidence=np.full((photos, places), np.nan),
        raw=[[] for _ in range(photos)],
        **{name: np.zeros(photos, np.int64) for name in MllmVerdict.COSTS},
    )


def _record(verdict: MllmVerdict, i: int, reply: Reply) -> None:
    verdict.requests[i] += 1
    verdict.prompt_tokens[i] += reply.prompt_tokens
    verdict.output_tokens[i] += reply.output_tokens
    verdict.raw[i].extend(reply.texts)
    if reply.error is not None:
        verdict.status[i] = reply.error
