"""This verifier scores each place by the places to which the neighbors' pictures move the photo."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.types import Places, Pool, Tables, Verdict
from rag_geotoken.verifiers import Verifier

NO_MATCH = 0.05  # support by matches that are no better than chance, which tells no places apart


def support(pool: Pool, matches: Places, within_km: float) -> NDArray[np.float32]:
    """Return how well the matches of each photo support its pool's entries (B, C), zero where there is none.

    ``log(NO_MATCH + sum over neighbors k of score_k exp(-(distance to the moved place k / within_km)^2 / 2))``.
    """
    entry, moved = pool.lat_lon[:, :, None], matches.lat_lon[:, None]
    km = haversine_km(entry[..., 0], entry[..., 1], moved[..., 0], moved[..., 1])
    near = (matches.scores[:, None] * np.exp(-0.5 * (km / within_km) ** 2)).sum(axis=2)
    return np.where(pool.mask, np.log(NO_MATCH + near), 0.0).astype(np.float32)


def supports(models: Models, options: Options, tables: Tables, pool: Pool) -> Verdict:
    """Return the :func:`support` (B, C) of each place within the tuning's distance."""
    return Verdict(support(pool, tables.matches, models.tuning.visual_km), pool.mask)


VERIFIER = Verifier(supports, Verdict, reads=("matches",), tuning=("visual_km",))
