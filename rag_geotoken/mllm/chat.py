"""These functions write requests and read replies in the OpenAI chat protocol, for servers and vLLM in process."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from rag_geotoken.mllm.pictures import media_type
from rag_geotoken.mllm.request import Reply, Request, normalized_log_probs

LISTED = 20  # log-probabilities a token that a server gives at most
# Stated explicitly, or a server takes the defaults from the model's generation_config.json.
SAMPLING = {"top_k": 0, "repetition_penalty": 1.0}


def messages(request: Request) -> list[dict[str, Any]]:
    """Return the one user message; pictures as data URLs, each named by its SHA-256 for the server's cache."""
    content: list[dict[str, Any]] = []
    for part in request.parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            url = f"data:{media_type(part)};base64,{base64.b64encode(part).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}, "uuid": hashlib.sha256(part).hexdigest()})
    return [{"role": "user", "content": content}]


def with_log_probs(reply: Reply, options: tuple[str, ...], top: Iterable[tuple[str, float]]) -> Reply:
    """Add the options' log-probabilities to a reply, from the first token's (text, log-probability) pairs.

    An option is one letter, so only tokens that spell exactly it count, all of them together. One that is not listed
    gets the least of what is listed: it is no more than that. A model that leaves the options is an error: its
    log-probabilities would be those of another question.
    """
    if not options:
        return reply
    for text in reply.texts:
        if text not in options:
            error = f"the model answered {text[:40]!r}, none of the options: its server must support structured_outputs"
            return replace(reply, texts=(), error=error)
    probabilities: dict[str, float] = defaultdict(float)
    for text, log_prob in top:
        if text in options and math.isfinite(log_prob):
            probabilities[text] += math.exp(log_prob)
    log_probs = {text: math.log(value) for text, value in probabilities.items() if value > 0.0}
    if not log_probs:
        return replace(reply, texts=(), error="the server gave no log-probabilities of the options")
    least = min(log_probs.values())
    return replace(reply, log_probs=normalized_log_probs([log_probs.get(option, least) for option in options]))
