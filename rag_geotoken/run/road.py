"""The road from photos to predictions has every stage once, in order; who walks it is in :mod:`.walk`.

photos -> embeddings -> neighbors -> candidates -> pool -> verdicts -> predictions
                     -> places     -> posterior
                                   -> matches
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.run import stages as do
from rag_geotoken.types import (
    Answers,
    Candidates,
    Embeddings,
    MllmVerdict,
    Neighbors,
    Places,
    Pool,
    Posterior,
    Tables,
)  # fmt: skip
from rag_geotoken.verifiers import load_verifier

NEAR = ("embeddings", "neighbors")
DECODING = ("propose", "beam_width", "samples", "temperature", "top_p", "epsilon", "seed", "within")
ASKING = ("sources", "mllm_mode", "evidence", "near_pictures", "picture_size")
DECIDING = ("sources", "verify", "select", "mllm_mode", "area", "max_area_km2", "least_confidence")
# The table that the places of a source come from.
SOURCE_TABLES = {
    "neighbor": "neighbors",
    "greedy": "candidates",
    "beam": "candidates",
    "sample": "candidates",
    "frontier": "posterior",
    "gps": "places",
    "visual": "matches",
}
SHARES = ("neighbor_share", "neighbor_scale", "gps_share", "visual_share", "match_scale", "mllm_share")


@dataclass(frozen=True)
class Stage:
    """A stage makes of a block of photos, with the tables that it ``reads``, a result of ``kind``.

    depends, models, tuning: the options, the models (see :meth:`.Models.identity`) and the numbers of the tuning that
    it follows from besides; all of the tuning where it is ``*``. version: raised when the code gives other results, so
    that no old table is taken for a new one. own: whether it follows from which places of the pool may be the answer,
    so that variants of an ablation have one each. whole: whether photos that cannot be read have a line too.
    """

    name: str
    work: Callable[[Models, Options, Tables], Any]
    kind: type[Any]
    reads: tuple[str, ...]
    depends: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()
    version: int = 1
    own: bool = False
    whole: bool = False

    def settings(self, models: Models, options: Options) -> dict[str, Any]:
        """Return all that the result follows from besides the tables read, as JSON values."""
        tuned = asdict(models.tuning)
        found = {name: value for name, value in asdict(options).items() if name in self.depends}
        found |= {"pooled": list(options.pooled)} if "sources" in self.depends else {}
        found |= {name: models.identity(name) for name in self.models} | {"version": self.version}
        return found | {name: tuned[name] for name in (tuned if self.tuning == ("*",) else self.tuning)}


def road(options: Options) -> list[Stage]:
    """Return the stages that the options ask for, in order; the last one decides."""
    alone = options.sources[0] if len(options.sources) == 1 else None
    pool = f"pool-{alone}" if alone else "pool"
    verdicts = [_verdict(name, pool, options) for name in sorted(options.verify)]
    authors, compared = ("photos",) * options.other_authors, ("matches",) * options.visual
    pooled: tuple[str, ...] = ("neighbors",) + ("candidates",) * bool(options.propose)
    pooled += ("places",) * bool(options.gps_places) + compared + ("verdicts-mllm-diversify",) * options.diverse
    decided = ("photos", *NEAR, pool, *(verdict.name for verdict in verdicts), *("posterior",) * options.frontier)
    every = [
        Stage("embeddings", do.embed, Embeddings, ("photos",), (), ("encoder",), whole=True),
        Stage("neighbors", do.search, Neighbors, ("embeddings", *authors),
              ("neighbors", "within", "other_authors", "exact"), ("index",), ("search_weights",)),
        Stage("candidates", do.propose, Candidates, NEAR, DECODING, ("tokens", "index")),
        Stage("places", do.find_places, Places, ("embeddings",), ("gps_places",), ("encoder", "index")),
        Stage("posterior", do.believe, Posterior, NEAR, ("openings",), ("tokens", "index")),
        Stage("matches", do.match, Places, ("photos", *NEAR), (), ("matcher", "index")),
        Stage("verdicts-mllm-diversify", do.diversify, MllmVerdict, ("photos", *NEAR), ("answers", "picture_size"),
              ("mllm", "index"), ("search_weights",)),
        Stage(pool, do.pool, Pool, (SOURCE_TABLES[alone],) if alone else pooled, ("within",), (),
              (*SHARES, "density_scale") if alone else SHARES, own=alone is not None),
        *verdicts,
        Stage("predictions", do.decide, Answers, decided, DECIDING, ("encoder",), ("*",), 2,
              own=True, whole=True),
    ]  # fmt: skip
    needed = {"predictions", *NEAR}
    for stage in reversed(every):
        needed |= {*stage.reads} if stage.name in needed else set()
    return [stage for stage in every if stage.name in needed]


def _verdict(name: str, pool: str, options: Options) -> Stage:
    """The stage of a verifier's scores of the places in a pool."""
    by = load_verifier(name)
    work, reads = partial(do.verdict, by), ("photos", *by.reads, pool)
    if by.kind is MllmVerdict:  # it sees only what may be the answer
        mode = "pool" if options.diverse else options.mllm_mode
        reads += ("matches",) * options.visual
        return Stage(f"verdicts-{name}-{mode}", work, by.kind, reads, ASKING, by.models, by.tuning, by.version, True)
    own = pool != "pool"
    return Stage(f"verdicts-{name}", work, by.kind, reads[1:], (), by.models, by.tuning, by.version, own)
