"""This verifier is GeoToken's reward head: how far the truth may be from a cell, by the decoder's last state."""

from __future__ import annotations

import numpy as np

from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.types import Pool, Tables, Verdict
from rag_geotoken.verifiers import Verifier


def utilities(models: Models, options: Options, tables: Tables, pool: Pool) -> Verdict:
    """Return the log (B, C) of the utility that the head predicts for each place's cell."""
    scores = models.reward_head.scores(models.states(tables.embeddings, tables.neighbors, pool)).numpy()
    return Verdict(np.where(pool.mask, scores, 0.0).astype(np.float32), pool.mask)


VERIFIER = Verifier(utilities, Verdict, reads=("embeddings", "neighbors"), models=("reward", "index"))
