"""This verifier is G3's geo-verification: the similarity of a photo and a place in their common embedding space."""

from __future__ import annotations

import numpy as np

from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.storage.parquet import spread
from rag_geotoken.types import Pool, Tables, Verdict
from rag_geotoken.verifiers import Verifier


def cosines(models: Models, options: Options, tables: Tables, pool: Pool) -> Verdict:
    """Return the cosine (B, C) of each photo's GPS embedding with each place's."""
    places = models.alignment.embed_places(pool.lat_lon[pool.mask])
    similarity = np.einsum("nd,nd->n", tables.embeddings.gps[np.nonzero(pool.mask)[0]], places)
    return Verdict(spread(similarity, pool.mask, 0.0), pool.mask)


VERIFIER = Verifier(cosines, Verdict, reads=("embeddings",), models=("encoder",))
