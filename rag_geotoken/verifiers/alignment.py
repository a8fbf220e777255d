"""G3's geo-verification: how alike a photo and a place are in the space that both are embedded in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rag_geotoken.types import Pool, Tables, Verdict
from rag_geotoken.verifiers import Verifier

if TYPE_CHECKING:
    from rag_geotoken.models import Models
    from rag_geotoken.options import Options


def cosines(models: Models, options: Options, tables: Tables, pool: Pool) -> Verdict:
    """The cosine (B, C) of each photo's GPS embedding with each place's."""
    scores = np.zeros(pool.mask.shape, np.float32)
    places = models.alignment.embed_places(pool.lat_lon[pool.mask])
    scores[pool.mask] = np.einsum("nd,nd->n", tables.embeddings.gps[np.nonzero(pool.mask)[0]], places)
    return Verdict(scores, pool.mask)


VERIFIER = Verifier(cosines, Verdict, reads=("embeddings",), models=("encoder",))
