"""GeoCLIP (Vivanco Cepeda, Nayak and Shah, NeurIPS 2023): which of many places looks like a photo, or like a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from rag_geotoken.encoders import Backbone, load_backbone
from rag_geotoken.encoders.clip import CLIP_LARGE
from rag_geotoken.errors import GeoError
from rag_geotoken.gallery import Found, Gallery, open_gallery
from rag_geotoken.location import LocationEncoder, mlp
from rag_geotoken.types import Prediction
from rag_geotoken.weights import load_weights, save_weights


@dataclass(frozen=True)
class GeoCLIPConfig:
    """Sizes of a :class:`GeoCLIPHead`, and the CLIP whose ``features`` it was trained on."""

    features: int = 768
    hidden: int = 768
    dim: int = 512
    backbone: str = CLIP_LARGE


class GeoCLIPHead(nn.Module):
    """CLIP's embeddings of pictures or texts (N, features) -> (N, dim) of length one, to be compared with places'."""

    def __init__(self, config: GeoCLIPConfig | None = None) -> None:
        super().__init__()
        self.config = config or GeoCLIPConfig()
        self.mlp = mlp(self.config.features, self.config.hidden, self.config.dim, between=nn.ReLU)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, features: Tensor) -> Tensor:
        """(N, features) -> (N, dim)."""
        return normalize(self.mlp(features), dim=-1)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GeoCLIPHead:
        """Read ``geoclip.json`` and ``geoclip.safetensors`` of a folder. Raises GeoError when they do not fit."""
        return load_weights(cls, GeoCLIPConfig, Path(folder), "geoclip")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``geoclip.json`` and ``geoclip.safetensors``."""
        save_weights(self, asdict(self.config), Path(folder), "geoclip", half=False)


class GeoCLIP:
    """Backbone, head and gallery, loaded once; call it with pictures."""

    def __init__(self, backbone: Backbone, head: GeoCLIPHead, gallery: Gallery) -> None:
        sizes = head.config
        if backbone.dim != sizes.features:
            raise GeoError(
                f"the backbone {backbone.folder} gives {backbone.dim} numbers a picture, and the head was trained on "
                f"the {sizes.features} of {sizes.backbone}: name that backbone"
            )
        if gallery.vectors.shape[1] != sizes.dim:
            raise GeoError(
                f"a gallery of {gallery.vectors.shape[1]} numbers a place, a head of {sizes.dim}: convert again"
            )
        self.backbone, self.head, self.gallery = backbone, head, gallery

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: str | Path | None = None) -> GeoCLIP:
        """Open a folder of converted weights with their own backbone, or one of that name: see ``load_backbone``.

        The gallery is encoded if it is not yet. Raises GeoError when a file or the backbone is missing or does not fit.
        """
        folder = Path(folder)
        head, location = GeoCLIPHead.from_pretrained(folder), LocationEncoder.from_pretrained(folder)
        encoder = load_backbone(str(backbone or head.config.backbone))
        return cls(encoder, head, open_gallery(folder, location))

    def __call__(self, pictures: str | Path | Sequence[str | Path]) -> list[Prediction]:
        """Pictures -> predictions in order; one that cannot be read has an error and no coordinates."""
        references = [str(p) for p in ([pictures] if isinstance(pictures, str | Path) else pictures)]
        pixels, errors = self.backbone.load(references)
        good = [i for i, error in enumerate(errors) if error is None]
        predictions = [Prediction(reference, error=error) for reference, error in zip(references, errors, strict=True)]
        found = self.search(self.embed(pixels[good]), 1)
        for i, place, sure in zip(good, found.lat_lon[:, 0].tolist(), found.confidence.tolist(), strict=True):
            predictions[i] = Prediction(references[i], place[0], place[1], tuple(sure), "gallery")
        return predictions

    @torch.inference_mode()
    def embed(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Pictures (B, size, size, 3) uint8 -> (B, dim) of length one."""
        vectors: Tensor = self.head(self.backbone.images(pixels))
        return vectors

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, dim) of length one: CLIP's text embeddings through the head that its pictures' go through."""
        vectors: Tensor = self.head(self.backbone.texts(texts))
        return vectors

    def search(self, queries: Tensor, k: int) -> Found:
        """Embeddings (B, dim) -> the k likeliest places. Raises GeoError when the gallery has fewer."""
        return self.gallery.search(queries, self.head.logit_scale.exp().item(), k)
