"""The road from photos to predictions: every stage once, in order. Who walks it is in :mod:`.walk`.

photos -> embeddings -> neighbours -> candidates -> pool -> verdicts -> predictions
                     -> places     -> posterior
                                   -> matches
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rag_geotoken.options import Options
from rag_geotoken.run import stages as do
from rag_geotoken.run.models import Models
from rag_geotoken.types import Answers, Candidates, Embeddings, MllmVerdict, Neighbors, Places, Pool, Posterior, Tables
from rag_geotoken.types import Verdict as Verdict
from rag_geotoken.verifiers import load_verifier

Identity = Callable[[Models, Options], dict[str, Any]]
DECODING = ("propose", "beam_width", "samples", "temperature", "top_p", "epsilon", "seed", "within")
ASKING = ("mllm_mode", "evidence", "near_pictures", "picture_size")
DECIDING = ("sources", "verify", "select", "mllm_mode", "area", "max_area_km2", "least_confidence")


@dataclass(frozen=True)
class Stage:
    """One step of the road.

    reads: the tables that it is made from. depends: the options that it follows from besides. identity: what it follows
    from of the models. work: a block of photos with these tables -> a result of ``kind``. version: raised when the code
    gives other results, so that no old table is taken for a new one. own: whether it follows from which places of the
    pool may be the answer, so that variants of an ablation have one each. whole: whether photos that cannot be read
    have a line too.
    """

    name: str
    reads: tuple[str, ...]
    depends: tuple[str, ...]
    identity: Identity
    work: Callable[[Models, Options, Tables], Any]
    kind: type[Any]
    version: int = 1
    own: bool = False
    whole: bool = False

    def settings(self, models: Models, options: Options) -> dict[str, Any]:
        """All that the result follows from besides the tables read, as JSON values."""
        values = {name: value for name, value in asdict(options).items() if name in self.depends}
        return values | self.identity(models, options) | {"version": self.version}


def road(options: Options) -> list[Stage]:
    """The stages that the options ask for, in order; the last one decides."""
    near, authors = ("embeddings", "neighbours"), ("photos",) * options.other_authors
    compared, posterior = ("matches",) * options.visual, ("posterior",) * options.frontier
    added = ("candidates",) * bool(options.propose) + ("places",) * bool(options.gps_places) + compared
    added += ("verdicts-mllm-diversify",) * options.diverse
    judged = do.judged(options)
    verdicts = [_verdict(name, options) for name in sorted(options.verify)]
    decided = (judged, "embeddings", "neighbours", *(stage.name for stage in verdicts), *posterior)
    every = [
        Stage("embeddings", ("photos",), (), do.encoder_id, do.embed, Embeddings, whole=True),
        Stage("neighbours", ("embeddings", *authors), ("neighbors", "within", "other_authors", "exact"), do.search_id,
              do.search, Neighbors),
        Stage("candidates", near, DECODING, do.tokens_id, do.propose, Candidates),
        Stage("places", ("embeddings",), ("gps_places",), do.places_id, do.find_places, Places),
        Stage("posterior", near, ("openings",), do.tokens_id, do.believe, Posterior),
        Stage("matches", ("photos", *near), (), do.matcher_id, do.match, Places),
        Stage("verdicts-mllm-diversify", ("photos", *near), ("answers", "picture_size"), do.mllm_id, do.diversify,
              MllmVerdict),
        Stage("pool", ("neighbours", *added), ("within",), partial(do.pool_id, added), do.pool, Pool),
        *verdicts,
        Stage("predictions", ("photos", *dict.fromkeys(decided)), DECIDING, do.decision_id, do.decide, Answers,
              own=True, whole=True),
    ]  # fmt: skip
    wanted = {"embeddings", "neighbours", *added, *posterior, *decided, "predictions"}
    return [stage for stage in every if stage.name in wanted]


def _verdict(name: str, options: Options) -> Stage:
    """The stage of a verifier's scores."""
    verifier, judged = load_verifier(name), do.judged(options)
    identity = partial(do.verdict_id, verifier)
    work = partial(do.verdict, verifier)
    if name == "mllm":
        reads = ("photos", *verifier.reads, *("matches",) * options.visual, judged)
        mode = "pool" if options.diverse else options.mllm_mode
        return Stage(f"verdicts-mllm-{mode}", reads, ASKING, identity, work, MllmVerdict, verifier.version, own=True)
    one_source = judged != "pool"
    return Stage(
        f"verdicts-{name}", (*verifier.reads, judged), (), identity, work, Verdict, verifier.version, one_source
    )
