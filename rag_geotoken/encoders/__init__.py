"""Image encoders: one file a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from rag_geotoken.encoders.clip import ClipEncoder
    from rag_geotoken.encoders.open_clip import OpenClipEncoder
    from rag_geotoken.pictures import Picture

OPEN_CLIP = "open_clip:"


class Backbone(Protocol):
    """A frozen model that puts pictures and texts into one space: ``dim`` numbers, squares of ``size`` pixels.

    Its pictures go through its own ``load``, since one model crops what another squashes.
    """

    folder: Path
    dim: int
    size: int

    def load(self, references: Sequence[Picture]) -> tuple[NDArray[np.uint8], list[str | None]]:
        """N references -> pixels (N, size, size, 3), and for each None or what is wrong: see ``load_pictures``."""

    def images(self, pixels: NDArray[np.uint8], batch: int = ...) -> Tensor:
        """Pixels (N, size, size, 3) -> (N, dim) float32 on the CPU, of any length."""

    def texts(self, texts: Sequence[str], batch: int = ...) -> Tensor:
        """N texts -> (N, dim) float32 on the CPU, of any length."""

    def identity(self) -> dict[str, Any]:
        """All that the embeddings of pictures follow from, as JSON values."""


def load_backbone(name: str) -> ClipEncoder | OpenClipEncoder:
    """``open_clip:REST`` is a model of open_clip, anything else a CLIP of transformers: a folder or a hub's name.

    REST is a folder, ``hf-hub:OWNER/NAME`` or ``MODEL/TAG``. Raises GeoError, in one line, when it cannot be had.
    """
    if name.startswith(OPEN_CLIP):
        from rag_geotoken.encoders.open_clip import OpenClipEncoder

        return OpenClipEncoder.from_pretrained(name.removeprefix(OPEN_CLIP))
    from rag_geotoken.encoders.clip import ClipEncoder

    return ClipEncoder.from_pretrained(name)
