"""Requests in the words of the OpenAI chat protocol, which a server and vLLM in process share."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable
from typing import Any

from rag_geotoken.mllm.pictures import media_type
from rag_geotoken.mllm.request import Reply, Request, normalized_log_probs

LISTED = 20  # log-probabilities a token that a server gives at most
# Said outright, or a server takes the habits from the model's generation_config.json.
SAMPLING = {"top_k": 0, "repetition_penalty": 1.0}


def messages(request: Request) -> list[dict[str, Any]]:
    """The one user message; pictures as data URLs, each named by its SHA-256 for the server's cache."""
    return [{"role": "user", "content": [_part(part) for part in request.parts]}]


def _part(part: str | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    url = f"data:{media_type(part)};base64,{base64.b64encode(part).decode()}"
    return {"type": "image_url", "image_url": {"url": url}, "uuid": hashlib.sha256(part).hexdigest()}


def make_reply(
    request: Request,
    texts: tuple[str, ...],
    listed: Iterable[tuple[str, float]],
    spent: tuple[int, int],
    seconds: float,
) -> Reply:
    """A reply from the n texts, the first token's (text, log-probability) pairs, and tokens in and out.

    A model that leaves the options is an error: its log-probabilities would be those of another question.
    """
    if not request.options:
        return Reply(texts, (), *spent, seconds)
    strayed = next((text for text in texts if text not in request.options), None)
    if strayed is not None:
        error = f"the model answered {strayed[:40]!r}, none of the options: its server must support structured_outputs"
        return Reply((), (), *spent, seconds, error)
    log_probs = _option_log_probs(request.options, listed)
    if log_probs is None:
        return Reply((), (), *spent, seconds, "the server gave no log-probabilities of the options")
    return Reply(texts, log_probs, *spent, seconds)


def _option_log_probs(options: tuple[str, ...], listed: Iterable[tuple[str, float]]) -> tuple[float, ...] | None:
    """Log-probabilities over the options; None where none is listed.

    An option is one letter, so only tokens that spell exactly it count, all of them together. One that is not listed
    gets the least of what is listed: it is no more than that.
    """
    spelled: dict[str, float] = {}
    for text, log_prob in listed:
        if text in options and math.isfinite(log_prob):
            spelled[text] = math.exp(log_prob) + spelled.get(text, 0.0)
    chances = {text: math.log(value) for text, value in spelled.items() if value > 0.0}
    if not chances:
        return None
    least = min(chances.values())
    return normalized_log_probs([chances.get(option, least) for option in options])
