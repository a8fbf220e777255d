"""What the frozen backbones share: how they are asked, and the statistics of their colors."""

from __future__ import annotations

import math
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


class Backbone:
    """A frozen model that puts pictures and texts into one space: ``dim`` numbers, squares of ``size`` pixels.

    On a GPU where there is one. ``mean`` and ``std`` (3, 1, 1) of its colors, ``weights`` its files.
    """

    folder: Path
    weights: Sequence[Path]
    dim: int
    size: int
    mean: Tensor
    std: Tensor

    def load(self, references: Sequence[Picture]) -> tuple[NDArray[np.uint8], list[str | None]]:
        """N references -> pixels (N, size, size, 3), and for each None or what is wrong: see ``load_pictures``.

        Every model has its own way, since one crops what another squashes.
        """
        return load_pictures(references, self.size)

    def normalized(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Pixels (N, size, size, 3) -> (N, 3, size, size), what the model's own processor makes of the pictures."""
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0 - self.mean) / self.std

    def images(self, pixels: NDArray[np.uint8], batch: int = 32) -> Tensor:
        """Pixels (N, size, size, 3) as ``load`` gives them -> (N, dim) float32 on the CPU, of any length."""
        return self._in_batches(lambda part: self._embed_images(self.normalized(part)), pixels, batch)

    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """N texts, cut after the model's own number of tokens -> (N, dim) float32 on the CPU, of any length."""
        return self._in_batches(self._embed_texts, list(texts), batch)

    def identity(self) -> dict[str, Any]:
        """All that the embeddings of pictures follow from, as JSON values."""
        statistics = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return {"weights": [file_sha256(path) for path in self.weights], "size": self.size, **statistics}

    def check_dim(self, dim: int, name: str, what: str) -> None:
        """Raises GeoError unless there are ``dim`` numbers, as of the model ``name``, which ``what`` was trained on."""
        if self.dim != dim:
            raise GeoError(
                f"the backbone {self.folder} gives {self.dim} numbers a picture, and {what} was trained on "
                f"the {dim} of {name}: name that backbone"
            )

    @torch.inference_mode()
    def _in_batches(self, embed: Callable[[Any], Tensor], items: Any, batch: int) -> Tensor:
        blocks = [embed(items[i : i + batch]).float().cpu() for i in range(0, len(items), batch)]
        return torch.cat(blocks) if blocks else torch.zeros(0, self.dim)

    def _embed_images(self, pixels: Tensor) -> Tensor:
        """A batch of normalized pixels (B, 3, size, size) -> (B, dim)."""
        raise NotImplementedError

    def _embed_texts(self, texts: list[str]) -> Tensor:
        """A batch of texts -> (B, dim)."""
        raise NotImplementedError


def color_statistics(mean: Any, std: Any, path: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of three colors, each (3, 1, 1). Raises GeoError when they are none."""
    try:
        values = torch.tensor([[float(v) for v in mean], [float(v) for v in std]], dtype=torch.float64)
        usable = values.shape == (2, 3) and all(map(math.isfinite, values.flatten())) and values[1].min() > 0
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise GeoError(f"{path} has no usable mean and deviation of the colors: get the file again")
    return values[0].float()[:, None, None], values[1].float()[:, None, None]
