"""These functions list the stages from photos to predictions, each once and in order; :mod:`.walk` runs them.

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
from rag_geotoken.options import PROPOSERS, Options
from rag_geotoken.run import stages as do
from rag_geotoken.types import Answers, Candidates, Embeddings, MllmVerdict, Neighbors, Places, Pool, Posterior, Tables
from rag_geotoken.verifiers import load_verifier

NEAR = ("embeddings", "neighbors")
DECODING = ("propose", "beam_width", "samples", "temperature", "top_p", "epsilon", "seed", "within")
ASKING = ("sources", "mllm_mode", "evidence", "near_pictures", "picture_size")
DECIDING = ("sources", "verify", "select", "mllm_mode", "area", "max_area_km2", "least_confidence")
# The table that the places of a source come from.
SOURCE_TABLES = {"neighbor": "neighbors", "frontier": "posterior", "gps": "places", "visual": "matches"}
SOURCE_TABLES |= dict.fromkeys(PROPOSERS, "candidates")
SHARES = ("neighbor_share", "neighbor_scale", "gps_share", "visual_share", "match_scale", "mllm_share")


@dataclass(frozen=True)
class Stage:
    """This class describes one step of the road: ``work`` makes a result of ``kind`` from the tables it ``reads``.

    depends, models, tuning: the options, the models (see :meth:`.Models.identity`) and the numbers of the tuning that
    its result depends on besides; all of the tuning where it is ``*``. version: raised when the code gives other
    results, so that no old table is taken for a new one. own: whether it depends on which places of the pool may be
    the answer, so that variants of an ablation have one each. whole: whether unreadable photos have a line too.
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
        """Return all that the result depends on besides the tables read, as JSON values."""
        tuning = asdict(models.tuning)
        settings = {name: value for name, value in asdict(options).items() if name in self.depends}
        settings |= {"pooled": list(options.pooled)} if "sources" in self.depends else {}
        settings |= {name: models.identity(name) for name in self.models} | {"version": self.version}
        return settings | {name: tuning[name] for name in (tuning if self.tuning == ("*",) else self.tuning)}


def road(options: Options) -> list[Stage]:
    """Return the stages that the options need, in order; the last one decides."""
    alone = options.sources[0] if len(options.sources) == 1 else None
    pool = f"pool-{alone}" if alone else "pool"
    verdicts = [_verdict(name, pool, options) for name in sorted(options.verify)]
    authors = ("photos",) * options.other_authors
    pooled = ("neighbors", *("candidates",) * bool(options.propose), *("places",) * bool(options.gps_places),
              *("matches",) * options.visual, *("verdicts-mllm-diversify",) * options.diverse)  # fmt: skip
    decided = ("photos", *NEAR, pool, *(verdict.name for verdict in verdicts), *("posterior",) * options.frontier)
    stages = [
        Stage("embeddings", do.embed, Embeddings, ("photos",), models=("encoder",), whole=True),
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
    for stage in reversed(stages):
        needed |= {*stage.reads} if stage.name in needed else set()
    return [stage for stage in stages if stage.name in needed]


def _verdict(name: str, pool: str, options: Options) -> Stage:
    """Return the stage in which a verifier scores the places of a pool."""
    verifier = load_verifier(name)
    stage, reads, depends, own = f"verdicts-{name}", (*verifier.reads, pool), tuple[str, ...](), pool != "pool"
    if verifier.kind is MllmVerdict:  # it scores only what may be the answer
        stage += "-pool" if options.diverse else f"-{options.mllm_mode}"
        reads, depends, own = ("photos", *reads, *("matches",) * options.visual), ASKING, True
    work, basis = partial(do.verdict, verifier), (verifier.models, verifier.tuning, verifier.version)
    return Stage(stage, work, verifier.kind, reads, depends, *basis, own=own)
