"""RANGE's estimate of an image embedding where there is no photo, and how alike a photo is to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from rag_geotoken.encoders.dense import affine
from rag_geotoken.geo.sphere import to_unit
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.types import Pool, Tables, Verdict
from rag_geotoken.verifiers import Verifier

if TYPE_CHECKING:
    from rag_geotoken.models import Models
    from rag_geotoken.options import Options

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]
BANK = 100_000  # rows at most
BATCH = 128  # places at a time


@dataclass(frozen=True)
class RangeBank:
    """A bank of places whose look is known: lat_lon (N, 2) degrees, place and image embeddings (N, dim), length one."""

    lat_lon: Floats
    place: Vectors
    image: Vectors

    def of(
        self, lat_lon: Floats, place: Vectors, beta: float = 0.5, semantic: float = 12.0, spatial: float = 40.0
    ) -> Vectors:
        """Places (M, 2) and their embeddings (M, dim) -> estimated image embeddings (M, dim).

        RANGE+ (Dhakal et al., CVPR 2025): the bank's image embeddings averaged by
        ``beta * softmax(semantic * cosine of place embeddings) + (1 - beta) * softmax(spatial * cosine of the angle
        between the places)``; beta = 1 is RANGE. The defaults are the released code's: exp(40 cos) is a bell of about
        1000 km, exp(s cos) one of 6371 / sqrt(s) km.
        """
        count, dim = self.image.shape
        keys, images = torch.from_numpy(self.place), torch.from_numpy(np.ascontiguousarray(self.image.T))
        there, here = torch.from_numpy(to_unit(*self.lat_lon.T)), torch.from_numpy(to_unit(*lat_lon.T))
        query, result = torch.from_numpy(np.float32(semantic) * place), torch.empty(len(lat_lon), dim)
        with torch.inference_mode():
            for start in range(0, len(lat_lon), BATCH):
                at = slice(start, start + BATCH)
                weight = torch.zeros(len(here[at]), count)
                if beta > 0:
                    weight.add_(affine(query[at], keys, torch.zeros(count)).softmax(dim=1), alpha=beta)
                if beta < 1:
                    # In double precision: at 10 km 1 - cos is 1e-6, which single precision does not see.
                    weight.add_((here[at] @ there.T).mul_(spatial).softmax(dim=1).float(), alpha=1 - beta)
                result[at] = affine(weight, images, torch.zeros(dim))
        return result.numpy()


def likeness(photo: Vectors, looks: Vectors) -> Vectors:
    """The cosine (N,) of each image embedding (N, dim) of length one with an estimated one (N, dim)."""
    cosine: Vectors = np.einsum("nd,nd->n", photo, looks) / np.linalg.norm(looks, axis=1)
    return cosine


def bank_of(index: GeoIndex, embed: Callable[[Floats], Vectors]) -> RangeBank:
    """A gallery as a bank, a seeded draw of it where it is large; ``embed``: places -> embeddings."""
    count = len(index.rows)
    rows = np.sort(np.random.default_rng(0).choice(count, min(count, BANK), replace=False))
    return RangeBank(index.lat_lon[rows], embed(index.lat_lon[rows]), index.image_parts(rows))


def bank(models: Models) -> RangeBank:
    """The gallery of the models as RANGE's bank, made once."""
    return models.kept("range", lambda: bank_of(models.index, models.alignment.embed_places))


def cosines(models: Models, options: Options, tables: Tables, pool: Pool) -> Verdict:
    """The cosine (B, C) of each photo's image embedding with what RANGE makes of each place."""
    scores, tuning, spots = np.zeros(pool.mask.shape, np.float32), models.tuning, pool.lat_lon[pool.mask]
    embedded = models.alignment.embed_places(spots)
    looks = bank(models).of(spots, embedded, tuning.look_beta, tuning.look_semantic, tuning.look_spatial)
    scores[pool.mask] = likeness(tables.embeddings.image[np.nonzero(pool.mask)[0]], looks)
    return Verdict(scores, pool.mask)


VERIFIER = Verifier(
    cosines,
    Verdict,
    reads=("embeddings",),
    models=("encoder", "index"),
    tuning=("look_beta", "look_semantic", "look_spatial"),
)
