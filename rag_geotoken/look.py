"""What a place looks like: RANGE's estimate of an image embedding where there is no photo."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.geo import to_unit

Vectors = NDArray[np.float32]
BANK = 100_000  # rows at most


@dataclass(frozen=True)
class Look:
    """A bank of places whose look is known: lat_lon (N, 2) degrees, place and image embeddings (N, dim), length one."""

    lat_lon: NDArray[np.float64]
    place: Vectors
    image: Vectors

    def of(
        self,
        lat_lon: NDArray[np.float64],
        place: Vectors,
        beta: float = 0.5,
        semantic: float = 12.0,
        spatial: float = 40.0,
        batch: int = 512,
    ) -> Vectors:
        """Places (M, 2) and their embeddings (M, dim) -> estimated image embeddings (M, dim).

        RANGE+ (Dhakal et al., CVPR 2025): the bank's image embeddings averaged by
        ``beta * softmax(semantic * cosine of place embeddings) + (1 - beta) * softmax(spatial * cosine of the angle
        between the places)``; beta = 1 is RANGE. The defaults are the released code's: exp(40 cos) is a bell of about
        1000 km, exp(s cos) one of 6371 / sqrt(s) km.
        """
        xyz = to_unit(*self.lat_lon.T).astype(np.float64)
        result = np.empty((len(lat_lon), self.image.shape[1]), np.float32)
        for start in range(0, len(lat_lon), batch):
            at = slice(start, start + batch)
            weight = np.zeros((len(lat_lon[at]), len(self.image)), np.float32)
            if beta > 0:
                weight += np.float32(beta) * _softmax(np.float32(semantic) * (place[at] @ self.place.T))
            if beta < 1:
                # 1 - cos in double precision: at 10 km it is 1e-6, which single precision does not see.
                near = spatial * (to_unit(*lat_lon[at].T) @ xyz.T)
                weight += np.float32(1 - beta) * _softmax(near)
            result[at] = weight @ self.image
        return result


def _softmax(values: NDArray[np.floating]) -> Vectors:
    """Over the last axis, in place."""
    values -= values.max(axis=1, keepdims=True)
    weight: Vectors = np.exp(values.astype(np.float32, copy=False))
    weight /= weight.sum(axis=1, keepdims=True)
    return weight
