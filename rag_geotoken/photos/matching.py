"""These classes compare a photo's picture with the pictures of its neighbors.

:class:`Matcher` is the interface of them all; :class:`AerialMatcher` is for pictures from straight above.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rag_geotoken.geo.sphere import Floats
from rag_geotoken.photos.agreement import moved_places
from rag_geotoken.photos.registration import PIXELS, register
from rag_geotoken.types import Places

Pixels = NDArray[np.uint8]


class Matcher(Protocol):
    """This interface is what every matcher of pictures offers.

    size: Side of the square pictures in pixels. photos: The batch size. identity: What the scores depend on.
    """

    size: int
    photos: int
    identity: str

    def match(self, pixels: Pixels, near: Pixels, places: Floats) -> Places:
        """Match photos (B, S, S, 3) with neighbors' pictures (B, K, S', S', 3) and places (B, K, 2)."""


class AerialMatcher:
    """This class matches pictures of the ground from straight above, north mostly up.

    width_km: The median width of the views, see :func:`.moved_places`.
    """

    size, photos = PIXELS, 64

    def __init__(self, width_km: float) -> None:
        self.width_km, self.identity = width_km, f"from above, {width_km:g} km"

    def match(self, pixels: Pixels, near: Pixels, places: Floats) -> Places:
        """Return where each neighbor says the photo was taken, by how the two overlap, and their similarity."""
        registration = register(pixels, near)
        return Places(moved_places(registration, places, self.width_km), registration.alike.numpy())
