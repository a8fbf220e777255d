"""This module holds what the frozen backbones share: their interface, and the statistics of their colors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.storage.files import file_sha256
from rag_geotoken.types import Picture

# Mean and standard deviation of CLIP's training pictures, where a model does not tell its own.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Backbone(ABC):
    """This class is a frozen model that puts pictures and texts into one space, on a GPU if there is one.

    ``dim`` numbers an embedding, from squares of ``size`` pixels. ``mean`` and ``std`` (3, 1, 1) of its colors,
    ``weights`` its files.
    """

    folder: Path
    weights: Sequence[Path]
    dim: int
    size: int
    mean: Tensor
    std: Tensor

    def load(self, references: Sequence[Picture]) -> tuple[NDArray[np.uint8], list[str | None]]:
        """Read N pictures as pixels (N, size, size, 3), and for each None or what is wrong: see ``load_pictures``.

        Every model has its own way, since one crops what another squashes.
        """
        return load_pictures(references, self.size)

    def normalized(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Return the (N, 3, size, size) that the model's own processor makes of pixels (N, size, size, 3)."""
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0 - self.mean) / self.std

    def images(self, pixels: NDArray[np.uint8], batch: int = 32) -> Tensor:
        """Embed pixels (N, size, size, 3) of ``load`` as (N, dim) float32 on the CPU, of any length."""
        return self._in_batches(lambda part: self._embed_images(self.normalized(part)), pixels, batch)

    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Embed N texts, cut after the model's own number of tokens, as (N, dim) float32 on the CPU, of any length."""
        return self._in_batches(self._embed_texts, list(texts), batch)

    def identity(self) -> dict[str, Any]:
        """Return all that the embeddings of pictures follow from, as JSON values."""
        statistics = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return {"weights": [file_sha256(path) for path in self.weights], "size": self.size, **statistics}

    def check_dim(self, dim: int, name: str, what: str) -> None:
        """Raise GeoError unless embeddings have the ``dim`` of the model ``name``, which ``what`` was trained on."""
        if self.dim != dim:
            raise GeoError(
                f"the backbone {self.folder} gives {self.dim} numbers a picture, and {what} was trained on "
                f"the {dim} of {name}: name that backbone"
            )

    @torch.inference_mode()
    def _in_batches(self, embed: Callable[[Any], Tensor], items: Any, batch: int) -> Tensor:
        blocks = [embed(items[i : i + batch]).float().cpu() for i in range(0, len(items), batch)]
        return torch.cat(blocks) if blocks else torch.zeros(0, self.dim)

    @abstractmethod
    def _embed_images(self, pixels: Tensor) -> Tensor:
        """Embed a batch of normalized pixels (B, 3, size, size) as (B, dim)."""

    @abstractmethod
    def _embed_texts(self, texts: list[str]) -> Tensor:
        """Embed a batch of texts as (B, dim)."""


def color_statistics(mean: Any, std: Any, path: Path) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of three colors, each (3, 1, 1). Raises GeoError when they are none."""
    try:
        values = np.array([mean, std], np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (2, 3) or not np.isfinite(values).all() or values[1].min() <= 0:
        raise GeoError(f"{path} has no usable mean and deviation of the colors: get the file again")
    statistics = torch.from_numpy(values).float()[..., None, None]
    return statistics[0], statistics[1]
