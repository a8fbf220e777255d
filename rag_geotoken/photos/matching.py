"""A photo's picture compared with its neighbors': what a way to compare offers, and the one for views from above."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.photos.agreement import moved_places
from rag_geotoken.photos.registration import PIXELS, register
from rag_geotoken.types import Places

Pixels = NDArray[np.uint8]


class Matcher(Protocol):
    """size: pixels of the squares it wants. photos: how many at a time. identity: what its scores follow from."""

    size: int
    photos: int
    identity: str

    def match(self, pixels: Pixels, near: Pixels, places: NDArray[np.float64]) -> Places:
        """Photos (B, S, S, 3), their neighbors' pictures (B, K, S', S', 3) and places (B, K, 2) -> matches."""


class AerialMatcher:
    """Pictures of the ground seen from straight above, north mostly up, ``width_km`` wide in the middle."""

    size, photos = PIXELS, 64

    def __init__(self, width_km: float) -> None:
        """width_km: see :func:`.moved_places`."""
        self.width_km, self.identity = width_km, f"from above, {width_km:g} km"

    def match(self, pixels: Pixels, near: Pixels, places: NDArray[np.float64]) -> Places:
        """Every neighbor moves the photo to where, by how the two overlap, it was taken."""
        found = register(pixels, near)
        return Places(moved_places(found, places, self.width_km), found.alike.numpy())
