"""GeoToken's reward head as a verifier: how far the truth may be from a cell, by the decoder's last state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rag_geotoken.types import Pool, Tables, Verdict

if TYPE_CHECKING:
    from rag_geotoken.options import Options
    from rag_geotoken.run.models import Models


class Reward:
    """The log of the utility that the head expects of a place's cell."""

    reads, models, tuning, version, kind = ("embeddings", "neighbours"), ("reward", "index"), (), 1, Verdict

    def scores(self, models: Models, options: Options, tables: Tables, pool: Pool) -> Verdict:
        """(B, C) logarithms."""
        head = models.reward_head
        states = models.states(tables.embeddings, tables.neighbours, pool)
        scores = head.scores(states).numpy()
        return Verdict(np.where(pool.mask, scores, 0.0).astype(np.float32), pool.mask)


VERIFIER = Reward()
