"""This is GeoCLIP (Vivanco Cepeda et al., NeurIPS 2023): which of many places is most like a photo, or a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from rag_geotoken.encoders import Backbone, load_backbone
from rag_geotoken.encoders.clip import CLIP_LARGE
from rag_geotoken.encoders.location import LocationEncoder, mlp
from rag_geotoken.errors import GeoError
from rag_geotoken.peers.gallery import Gallery, Matches, open_gallery
from rag_geotoken.storage.weights import Pretrained
from rag_geotoken.types import GALLERY, Answers, Photos, Prediction


@dataclass(frozen=True)
class GeoCLIPConfig:
    """This class holds the sizes of a :class:`GeoCLIPHead`, and the CLIP whose ``features`` it was trained on."""

    features: int = 768
    hidden: int = 768
    dim: int = 512
    backbone: str = CLIP_LARGE


class GeoCLIPHead(Pretrained):
    """This head leads CLIP's embeddings of pictures or texts to the space in which places are embedded."""

    file, config_type = "geoclip", GeoCLIPConfig
    config: GeoCLIPConfig

    def __init__(self, config: GeoCLIPConfig | None = None) -> None:
        super().__init__()
        self.config = config or GeoCLIPConfig()
        self.mlp = mlp(self.config.features, self.config.hidden, self.config.dim, between=nn.ReLU)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings (N, dim) of length one of CLIP's features (N, features)."""
        return normalize(self.mlp(features), dim=-1)


class GeoCLIP:
    """This class holds backbone, head and gallery, loaded once; call it with pictures."""

    def __init__(self, backbone: Backbone, head: GeoCLIPHead, gallery: Gallery) -> None:
        config, dim = head.config, gallery.vectors.shape[1]
        backbone.check_dim(config.features, config.backbone, "the head")
        if dim != config.dim:
            raise GeoError(f"a gallery of {dim} numbers a place, a head of {config.dim}: convert again")
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
        """Return the predictions of pictures in order; one that cannot be read has an error and no coordinates."""
        references = [str(p) for p in ([pictures] if isinstance(pictures, str | Path) else pictures)]
        pixels, errors = self.backbone.load(references)
        return answers(Photos.of(references, references), errors, self.search(self.embed(pixels), 1)).rows()

    @torch.inference_mode()
    def embed(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Return the embeddings (B, dim) of length one of pictures (B, size, size, 3) uint8."""
        vectors: Tensor = self.head(self.backbone.images(pixels))
        return vectors

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (B, dim) of length one of texts, by CLIP and the head that pictures go through."""
        vectors: Tensor = self.head(self.backbone.texts(texts))
        return vectors

    def search(self, queries: Tensor, k: int) -> Matches:
        """Return the k likeliest places of embeddings (B, dim). Raises GeoError when the gallery has fewer."""
        return self.gallery.search(queries, self.head.logit_scale.exp().item(), k)


def answers(photos: Photos, errors: Sequence[str | None], matches: Matches) -> Answers:
    """Return the likeliest place of each photo, none where there is an error."""
    result = Answers.of(photos, errors)
    result.lat_lon[:], result.confidence[:], result.source[:] = matches.lat_lon[:, 0], matches.confidence, GALLERY
    return result
