"""Comparing pictures as a verifier: a place is supported by the neighbours whose pictures put the photo near it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_geotoken.types import Pool, Tables, Verdict
from rag_geotoken.verifiers.agreement import support

if TYPE_CHECKING:
    from rag_geotoken.options import Options
    from rag_geotoken.run.models import Models


class Visual:
    """How well the matches support a place (:func:`.support`)."""

    reads, models, tuning, version, kind = ("matches",), (), ("visual_km",), 1, Verdict

    def scores(self, models: Models, options: Options, tables: Tables, pool: Pool) -> Verdict:
        """(B, C) logarithms."""
        return Verdict(support(pool, tables.matches, models.tuning.visual_km), pool.mask)


VERIFIER = Visual()
