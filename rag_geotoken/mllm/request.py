"""These classes are a request to a multimodal model and its reply, the same whichever way the model runs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Request:
    """This is one message to a model, and how it may answer.

    parts: In order: text, or the bytes of a JPEG or PNG as ``mllm.pictures`` makes them. Constant instructions first,
        then pictures, then what differs between requests about one photo, so that a prefix cache serves them all.
    options: Single letters; the answer is exactly one of them. Without any, the answer is free.
    schema: The JSON schema of a free answer.
    max_tokens, temperature, n, seed: n answers of at most so many tokens each. Temperature 0 is the likeliest answer.
    """

    parts: tuple[str | bytes, ...]
    options: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None
    max_tokens: int = 1
    temperature: float = 0.0
    n: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for what contradicts itself; no user writes requests."""
        if len(set(self.options)) != len(self.options) or any(len(option) != 1 for option in self.options):
            raise ValueError(f"options are different single letters, not {self.options}")
        if self.options and (self.schema is not None or self.max_tokens != 1):
            raise ValueError("an answer is one option, and so one token, or follows a schema: not both")
        if not self.parts or self.max_tokens < 1 or self.n < 1 or self.temperature < 0:
            raise ValueError("a request has parts, at least one token and one answer, and no negative temperature")

    @property
    def pictures(self) -> tuple[bytes, ...]:
        """Return the pictures among the parts."""
        return tuple(part for part in self.parts if isinstance(part, bytes))

    def image_hash(self) -> str:
        """Return the SHA-256 over the SHA-256 of each picture in turn, as 64 hexadecimal digits."""
        return hashlib.sha256(b"".join(hashlib.sha256(picture).digest() for picture in self.pictures)).hexdigest()

    def prompt_hash(self) -> str:
        """Return the SHA-256 of all but the pictures' bytes: where each stands, the texts, and how to answer."""
        texts = [part if isinstance(part, str) else None for part in self.parts]
        fields = {**vars(self), "parts": texts, "temperature": float(self.temperature)}
        # Properties of a schema keep their order: the answer is generated in it.
        return hashlib.sha256(json.dumps(fields, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """This is what came back for one request.

    texts: The n answers; none where there is an error.
    log_probs: Natural logarithms of the probability of each option, over the options alone; () without options.
    prompt_tokens, output_tokens: What it cost, output over all n answers.
    seconds: How long it took; in a batch, the batch's time shared out evenly.
    error: One line that says why there is no answer.
    """

    texts: tuple[str, ...] = ()
    log_probs: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None


class Client(Protocol):
    """This is what every model that answers provides. ``model`` is its identity in a journal."""

    model: str

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield (position, reply) as replies come, in any order, one for every request: a failure is a reply too."""


def normalized_log_probs(log_probs: Sequence[float]) -> tuple[float, ...]:
    """Normalize log-probabilities of some tokens to these tokens alone, rounded to 1e-6."""
    top = max(log_probs)
    total = top + math.log(sum(math.exp(value - top) for value in log_probs))
    return tuple(round(value - total, 6) + 0.0 for value in log_probs)
