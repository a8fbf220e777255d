"""The verifier ``visual``: how well the places that neighbors' pictures move a photo to support each place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.types import Places, Pool, Tables, Verdict
from rag_geotoken.verifiers import Verifier

if TYPE_CHECKING:
    from rag_geotoken.models import Models
    from rag_geotoken.options import Options

NO_MATCH = 0.05  # support of a place by matches that are no better than chance: below it nothing is told apart


def support(pool: Pool, matches: Places, within_km: float) -> NDArray[np.float32]:
    """How well the matches of each photo support its pool's entries -> (B, C), zero where there is none.

    ``log(NO_MATCH + sum over neighbors k of score_k exp(-(distance to the moved place k / within_km)^2 / 2))``.
    """
    here, there = pool.lat_lon[:, :, None], matches.lat_lon[:, None]
    km = haversine_km(here[..., 0], here[..., 1], there[..., 0], there[..., 1])
    near = (matches.scores[:, None] * np.exp(-0.5 * (km / within_km) ** 2)).sum(axis=2)
    return np.where(pool.mask, np.log(NO_MATCH + near), 0.0).astype(np.float32)


def supports(models: Models, options: Options, tables: Tables, pool: Pool) -> Verdict:
    """How well the matches support each place: :func:`support` within the tuning's distance."""
    return Verdict(support(pool, tables.matches, models.tuning.visual_km), pool.mask)


VERIFIER = Verifier(supports, Verdict, reads=("matches",), tuning=("visual_km",))
