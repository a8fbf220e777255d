"""Verification by a multimodal model: what it is asked of a photo's pool, and what its answers say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
TURNS = (0.0, 0.5, 0.25, 0.75)  # orders of the candidates, far apart in parts of a whole turn: one output token each
SIMILAR = (0, 5, 10, 15)  # G3's prompts: so many places of similar photos, and as many of dissimilar ones
WARM = 0.7  # temperature of the answers that are to differ
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
Mask = NDArray[np.bool_]


def ask_pool(
    photos: Sequence[bytes],
    chosen: Shortlist,
    shown: Sequence[Sequence[Mapping[str, Any]]],
    ask: Ask,
    near: Sequence[Mapping[str, bytes]],
    mask: Mask,
) -> MllmVerdict:
    """Which place of its shortlist is each photo's? One token a request, the candidates in several orders.

    Models prefer a letter or a position whatever stands there, so the log-probabilities are averaged over cyclic
    orders that begin with a random one, never that of the weights: two orders, and where these choose differently two
    more. They become the scores of the pool's entries, mask (B, C), that the places stand for. shown: each photo's
    places as :func:`.candidates` makes them; near: pictures that they name.
    """
    found = _nothing(mask)
    first = [
        np.random.default_rng(_seed(photo)).permutation(len(places))
        for photo, places in zip(photos, shown, strict=True)
    ]
    # Of each place of the shortlist and, last, of none of them.
    sums, turns = np.zeros((len(photos), chosen.entries.shape[1] + 1)), np.zeros(len(photos), int)
    picks: list[set[int]] = [set() for _ in photos]
    unsettled = list(range(len(photos)))
    for round_ in range(2):
        orders = [(i, order) for i in unsettled for order in _orders(first[i])[2 * round_ : 2 * round_ + 2]]
        requests = [_pool_request(photos[i], [shown[i][c] for c in order], near[i]) for i, order in orders]
        for (i, order), reply in zip(orders, ask(requests), strict=True):
            _count(found, i, reply)
            if reply.error is None:
                said = np.array(reply.log_probs)
                sums[i, order] += said[:-1]
                sums[i, -1] += said[-1]
                turns[i] += 1
                picks[i].add([*order.tolist(), -1][int(said.argmax())])
        unsettled = [i for i in unsettled if found.status[i] == "ok" and len(picks[i]) > 1]
    sums /= np.maximum(turns, 1)[:, None]
    sums[~found.answered] = 0.0
    log_probs = sums.astype(np.float32)
    found.scores[:] = np.where(mask, chosen.spread(log_probs[:, :-1], log_probs[:, -1]), 0.0)
    return found


def ask_place(prompts: Sequence[Sequence[Request]], ask: Ask, places: int, mask: Mask) -> MllmVerdict:
    """Requests of each photo whose answers are places -> at most so many, in order, and no score over a mask (B, C).

    A photo's status is "ok" when one of its answers is a place, else why the last was none.
    """
    found = _nothing(mask, places)
    flat = [(i, request) for i, requests in enumerate(prompts) for request in requests]
    told = [0] * len(prompts)
    reasons = ["not asked"] * len(prompts)
    for (i, _), reply in zip(flat, ask([request for _, request in flat]), strict=True):
        _count(found, i, reply)
        reasons[i] = reply.error or reasons[i]
        for text in reply.texts:
            place = parse_place(text)
            if place.lat is not None and place.lon is not None:
                found.lat_lon[i, told[i]] = place.lat, place.lon
                found.confidence[i, told[i]] = np.nan if place.confidence is None else place.confidence
                told[i] += 1
            else:
                reasons[i] = place.status
    found.status[:] = ["ok" if count else reason for count, reason in zip(told, reasons, strict=True)]
    return found


def free_request(photo: bytes, shown: Sequence[Mapping[str, Any]], near: Mapping[str, bytes]) -> Request:
    """The candidates as hints, the answer any place: GeoToken's free generation."""
    order = np.random.default_rng(_seed(photo)).permutation(len(shown))
    parts = render("free", {"photo": photo, **near}, candidates=[shown[i] for i in order])
    return Request(parts, schema=PLACE_SCHEMA, max_tokens=MAX_TOKENS)


def zero_shot_request(photo: bytes) -> Request:
    """The photo alone."""
    return Request(_similar(photo, [], []), schema=PLACE_SCHEMA, max_tokens=MAX_TOKENS)


def diverse_requests(photo: bytes, similar: Floats, dissimilar: Floats, n: int) -> list[Request]:
    """G3's geo-diversification: 0, 5, 10, 15 places (K, 2) of similar and of dissimilar photos, n answers each."""
    return [
        Request(_similar(photo, similar[:count], dissimilar[:count]), (), PLACE_SCHEMA, MAX_TOKENS, WARM, n)
        for count in SIMILAR
        if count <= len(similar)
    ]


def _similar(photo: bytes, similar: Any, dissimilar: Any) -> tuple[str | bytes, ...]:
    said = {
        name: [{"lat": float(lat), "lon": float(lon)} for lat, lon in places]
        for name, places in (("similar", similar), ("dissimilar", dissimilar))
    }
    return render("diversify", {"photo": photo}, **said)


def _pool_request(photo: bytes, places: list[Mapping[str, Any]], near: Mapping[str, bytes]) -> Request:
    letters = LETTERS[: len(places)]
    lettered = [{**place, "letter": letter} for place, letter in zip(places, letters, strict=True)]
    return Request(render("pool", {"photo": photo, **near}, candidates=lettered), options=(*letters, NONE))


def _orders(first: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The different cyclic orders of a first one by ``TURNS``."""
    count = len(first)
    shifts = dict.fromkeys(round(turn * count) % max(count, 1) for turn in TURNS)
    return [np.roll(first, shift) for shift in shifts]


def _seed(photo: bytes) -> list[int]:
    return list(sha256(photo).digest()[:8])


def _nothing(mask: Mask, own: int = 1) -> MllmVerdict:
    """Zeros over a pool's mask (B, C), room for so many places of the model's own, no costs yet."""
    photos = len(mask)
    return MllmVerdict(
        np.zeros(mask.shape, np.float32),
        mask,
        ["ok"] * photos,
        np.full((photos, own, 2), np.nan),
        np.full((photos, own), np.nan),
        [[] for _ in range(photos)],
        *(np.zeros(photos, np.int64) for _ in range(3)),
    )


def _count(found: MllmVerdict, i: int, reply: Reply) -> None:
    found.requests[i] += 1
    found.prompt_tokens[i] += reply.prompt_tokens
    found.output_tokens[i] += reply.output_tokens
    found.raw[i].extend(reply.texts)
    if reply.error is not None:
        found.status[i] = reply.error
