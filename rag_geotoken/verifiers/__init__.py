"""Verifiers give every place of a pool a score, each by one kind of evidence.

A verifier is a module with an object ``VERIFIER``; a new one is its file and its line in ``options.VERIFIERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from rag_geotoken.models import Models
from rag_geotoken.options import VERIFIERS, Options
from rag_geotoken.types import Pool, Tables, Verdict


@dataclass(frozen=True)
class Verifier:
    """This class describes one kind of evidence for the places of a pool.

    scores: computes a verdict of type ``kind``, a score for every entry of the pools (B, C), zero where there is none.
    reads, models, tuning: the tables besides the pool, the models and the numbers of the tuning that its scores depend
    on. version: raised when its code gives other scores.
    """

    scores: Callable[[Models, Options, Tables, Pool], Verdict]
    kind: type[Verdict]
    reads: tuple[str, ...]
    models: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()
    version: int = 1


def load_verifier(name: str) -> Verifier:
    """Return the verifier of a name; its module is imported only then."""
    return cast(Verifier, import_module(f"{__name__}.{VERIFIERS[name]}").VERIFIER)
