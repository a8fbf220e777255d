"""This class says where pictures were taken, without files: pictures in, predictions out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rag_geotoken.errors import GeoError
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.run.walk import in_memory
from rag_geotoken.types import Photos, Picture, Prediction

Given = Picture | Path


class Geolocator(Models):
    """This class holds models and index, loaded once; call it with pictures to learn where they were taken.

    Example:
        >>> geolocator = Geolocator.from_pretrained("runs/demo/index")  # doctest: +SKIP
        >>> geolocator(["photo.jpg"], Options(verify=("visual", "alignment")))  # doctest: +SKIP
    """

    def __call__(
        self,
        pictures: Given | Sequence[Given],
        options: Options | None = None,
        *,
        ids: Sequence[str] | None = None,
        authors: Sequence[str | None] | None = None,
        batch: int = 256,
    ) -> list[Prediction]:
        """Return predictions of pictures in order; one that cannot be read has an error and no coordinates.

        The same picture with the same options has the same answer, whatever its name, its position and the batch.

        Args:
            pictures: One or many: paths, the bytes of files, pictures of Pillow, or pixels (H, W, 3) uint8.
            options: What is retrieved, proposed, verified and how one place is chosen.
            ids: Names of the pictures in the predictions; else their paths, or their numbers from 0.
            authors: Who took each picture, for ``other_authors``.
            batch: How many pictures go through the road together.

        Raises:
            GeoError: The models lack what the options ask for, or names and pictures differ in number.
        """
        is_one = isinstance(pictures, str | bytes | Path | Image.Image)
        is_one |= isinstance(pictures, np.ndarray) and pictures.ndim == 3
        many = [pictures] if is_one else list(pictures)  # type: ignore[arg-type]
        images: list[Picture] = [str(picture) if isinstance(picture, Path) else picture for picture in many]  # type: ignore[misc]
        names = [image if isinstance(image, str) else str(i) for i, image in enumerate(images)]
        for given in (ids, authors):
            if given is not None and len(given) != len(images):
                raise GeoError(f"{len(given)} names for {len(images)} pictures: give one for each")
        photos = Photos.of(images, names if ids is None else ids, authors or ())
        return in_memory(self, options or Options(), photos, block=batch).rows()
