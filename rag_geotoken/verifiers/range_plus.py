"""This verifier is RANGE: its estimate of an image embedding of a place, and the similarity of a photo to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rag_geotoken.encoders.dense import affine
from rag_geotoken.geo.sphere import Floats, to_unit
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.storage.parquet import spread
from rag_geotoken.types import Pool, Tables, Verdict
from rag_geotoken.verifiers import Verifier

Vectors = NDArray[np.float32]
BANK = 100_000  # rows at most
BATCH = 128  # places at a time


@dataclass(frozen=True)
class RangeBank:
    """This class holds a bank of photos: lat_lon (N, 2) degrees, place and image embeddings (N, dim) of length one."""

    lat_lon: Floats
    place: Vectors
    image: Vectors

    def of(
        self, lat_lon: Floats, place: Vectors, beta: float = 0.5, semantic: float = 12.0, spatial: float = 40.0
    ) -> Vectors:
        """Estimate image embeddings (M, dim) of places (M, 2) from their place embeddings (M, dim).

        RANGE+ (Dhakal et al., CVPR 2025): the bank's image embeddings averaged by
        ``beta * softmax(semantic * cosine of place embeddings) + (1 - beta) * softmax(spatial * cosine of the angle
        between the places)``; beta = 1 is RANGE. The defaults are the released code's: exp(40 cos) is a bell of about
        1000 km, exp(s cos) one of 6371 / sqrt(s) km.
        """
        count, dim = self.image.shape
        keys, images = torch.from_numpy(self.place), torch.from_numpy(np.ascontiguousarray(self.image.T))
        bank_units, units = torch.from_numpy(to_unit(*self.lat_lon.T)), torch.from_numpy(to_unit(*lat_lon.T))
        query, result = torch.from_numpy(np.float32(semantic) * place), torch.empty(len(lat_lon), dim)
        with torch.inference_mode():
            for start in range(0, len(lat_lon), BATCH):
                at = slice(start, start + BATCH)
                weight = torch.zeros(len(units[at]), count)
                if beta > 0:
                    weight.add_(affine(query[at], keys, torch.zeros(count)).softmax(dim=1), alpha=beta)
                if beta < 1:
                    # In double precision: at 10 km 1 - cos is 1e-6, below the resolution of single precision.
                    weight.add_((units[at] @ bank_units.T).mul_(spatial).softmax(dim=1).float(), alpha=1 - beta)
                result[at] = affine(weight, images, torch.zeros(dim))
        return result.numpy()


def likeness(photo: Vectors, estimated: Vectors) -> Vectors:
    """Return the cosine (N,) of each image embedding (N, dim) of length one with an estimated one (N, dim)."""
    cosine: Vectors = np.einsum("nd,nd->n", photo, estimated) / np.linalg.norm(estimated, axis=1)
    return cosine


def bank(models: Models) -> RangeBank:
    """Return the gallery as RANGE's bank, a seeded sample of it where it is large; made once."""

    def sample() -> RangeBank:
        index = models.index
        count = len(index.rows)
        rows = np.sort(np.random.default_rng(0).choice(count, min(count, BANK), replace=False))
        lat_lon = index.lat_lon[rows]
        return RangeBank(lat_lon, models.alignment.embed_places(lat_lon), index.image_parts(rows))

    return models.kept("range", sample)


def cosines(models: Models, options: Options, tables: Tables, pool: Pool) -> Verdict:
    """Return the cosine (B, C) of each photo's image embedding with RANGE's estimate for each place."""
    tuning, lat_lon = models.tuning, pool.lat_lon[pool.mask]
    mix = {"beta": tuning.look_beta, "semantic": tuning.look_semantic, "spatial": tuning.look_spatial}
    estimated = bank(models).of(lat_lon, models.alignment.embed_places(lat_lon), **mix)
    scores = likeness(tables.embeddings.image[np.nonzero(pool.mask)[0]], estimated)
    return Verdict(spread(scores, pool.mask, 0.0), pool.mask)


VERIFIER = Verifier(
    cosines,
    Verdict,
    reads=("embeddings",),
    models=("encoder", "index"),
    tuning=("look_beta", "look_semantic", "look_spatial"),
)
