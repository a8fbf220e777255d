"""Geo-alignment after G3 (Jia et al., NeurIPS 2024): photos, places and place text in one space.

The image encoder's features go through two heads, one towards the embedding of places and one towards that of text.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from rag_geotoken.encoders.earth import EarthEncoder
from rag_geotoken.location import HarmonicConfig, HarmonicEncoder, LocationConfig, UnitVectorEncoder, embed_places, mlp
from rag_geotoken.location import LocationEncoder as LocationEncoder
from rag_geotoken.weights import load_weights, save_weights


@dataclass(frozen=True)
class AlignmentConfig:
    """Sizes of a :class:`GeoAlignment`: ``dim`` of every embedding, and what encodes places.

    location: ``unit_vector``, or ``equal_earth``, ``mercator`` (with sigmas of their own: GeoCLIP's are 1, 16 and 256)
    or ``harmonics`` (of which ``degrees``). sigmas and frequencies are of the random Fourier features.
    """

    dim: int = 256
    sigmas: tuple[float, ...] = (2.0, 12.0, 60.0, 250.0)
    frequencies: int = 96
    hidden: int = 512
    text_buckets: int = 4096
    text_dim: int = 64
    location: str = "unit_vector"
    degrees: int = 40


class TextEncoder(nn.Module):
    """Texts -> embeddings (N, dim): a bag of hashed words and character trigrams, averaged, then a small network.

    No pretrained text model is needed, so a fresh machine without a hub has one, and unknown names share trigrams.
    """

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__()
        self.buckets = config.text_buckets
        self.bag = nn.EmbeddingBag(config.text_buckets, config.text_dim, mode="mean")
        self.layers = nn.Sequential(nn.LayerNorm(config.text_dim), mlp(config.text_dim, config.hidden, config.dim))

    def forward(self, texts: list[str]) -> Tensor:
        """N texts -> (N, dim)."""
        bags = [_hashes(text, self.buckets) for text in texts]
        offsets = np.cumsum([0] + [len(bag) for bag in bags[:-1]])
        device = self.bag.weight.device
        flat = torch.tensor([bucket for bag in bags for bucket in bag], device=device)
        embedding: Tensor = self.layers(self.bag(flat, torch.from_numpy(offsets).to(device)))
        return embedding


class GeoAlignment(nn.Module):
    """Image encoder, two heads, location encoder, text encoder and the logit scales of the two contrastive losses."""

    def __init__(self, config: AlignmentConfig | None = None) -> None:
        super().__init__()
        self.config = config or AlignmentConfig()
        dim = self.config.dim
        self.encoder = EarthEncoder(dim)
        self.to_gps, self.to_text = mlp(dim, dim, dim), mlp(dim, dim, dim)
        self.location, self.text = _location(self.config), TextEncoder(self.config)
        self.gps_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.text_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (N, 64, 64, 3) uint8 -> image, gps and text embeddings, each (N, dim) of length one."""
        return self.parts(self.encoder(pixels))

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's features (N, dim) -> image, gps and text embeddings, each (N, dim) of length one."""
        vectors = features, self.to_gps(features), self.to_text(features)
        image, gps, text = (normalize(vector.float(), dim=-1) for vector in vectors)
        return image, gps, text

    @torch.inference_mode()
    def project(self, pixels: NDArray[np.uint8], batch: int = 256) -> NDArray[np.float32]:
        """Pixels (N, 64, 64, 3) -> the encoder's features (N, dim), of any length, before its heads."""
        blocks = [self.encoder(torch.from_numpy(pixels[i : i + batch])) for i in range(0, len(pixels), batch)]
        features: NDArray[np.float32] = torch.cat(blocks).float().numpy()
        return features

    @torch.inference_mode()
    def heads(self, features: NDArray[np.float32], batch: int = 16_384) -> NDArray[np.float32]:
        """Features of :meth:`project` (N, dim) -> (N, 3, dim): what :meth:`embed` makes of the photos themselves."""
        blocks = [torch.from_numpy(features[i : i + batch]) for i in range(0, len(features), batch)]
        vectors: NDArray[np.float32] = torch.cat([torch.stack(self.parts(block), 1) for block in blocks]).numpy()
        return vectors

    @torch.inference_mode()
    def embed(self, pixels: NDArray[np.uint8], batch: int = 256) -> NDArray[np.float32]:
        """Pixels (N, 64, 64, 3) -> (N, 3, dim): image, gps and text embedding of each photo."""
        blocks = [torch.stack(self(torch.from_numpy(pixels[i : i + batch])), 1) for i in range(0, len(pixels), batch)]
        vectors: NDArray[np.float32] = torch.cat(blocks).numpy()
        return vectors

    def embed_places(self, lat_lon: NDArray[np.float64], batch: int = 16_384) -> NDArray[np.float32]:
        """Places (N, 2) in degrees -> (N, dim) of length one."""
        return embed_places(self.location, lat_lon, batch)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GeoAlignment:
        """Read ``alignment.json`` and ``alignment.safetensors`` of a folder. Raises GeoError when they do not fit."""
        return load_weights(cls, AlignmentConfig, Path(folder), "alignment")

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write ``alignment.json`` and ``alignment.safetensors``, parameters in half precision if asked."""
        save_weights(self, asdict(self.config), Path(folder), "alignment", half)


@dataclass(frozen=True)
class G3Config:
    """Sizes of :class:`G3Heads`: of the backbone's features and all embeddings, and of the location encoder."""

    dim: int = 768
    location_dim: int = 512


class G3Heads(nn.Module):
    """G3's heads on a frozen CLIP ViT-L/14 and on a location encoder, under the names of its state dict.

    Each turns features into embeddings of length one. What a place looks like to them is
    ``heads.places(LocationEncoder.from_pretrained(DIR)(lat_lon))``.
    """

    def __init__(self, config: G3Config | None = None) -> None:
        super().__init__()
        self.config = config or G3Config()
        dim, place = self.config.dim, self.config.location_dim
        self.vision_projection_else_1 = mlp(dim, dim, dim, between=nn.ReLU)
        self.vision_projection_else_2 = mlp(dim, dim, dim, between=nn.ReLU)
        self.text_projection_else = mlp(dim, dim, dim, between=nn.ReLU)
        self.location_projection_else = mlp(place, place, dim, between=nn.ReLU)
        self.logit_scale1 = nn.Parameter(torch.tensor(3.99))
        self.logit_scale2 = nn.Parameter(torch.tensor(3.99))
        self.logit_scale3 = nn.Parameter(torch.tensor(3.99))

    def forward(self, image: Tensor) -> Tensor:
        """CLIP's image embeddings (N, dim) -> (N, 3, dim): image, gps and text embedding."""
        parts = image, self.vision_projection_else_2(image), self.vision_projection_else_1(image)
        return normalize(torch.stack(parts, dim=1), dim=-1)

    def texts(self, text: Tensor) -> Tensor:
        """CLIP's text embeddings (N, dim) -> (N, dim), to be compared with the text part of images."""
        return normalize(self.text_projection_else(text), dim=-1)

    def places(self, location: Tensor) -> Tensor:
        """Outputs of the location encoder (N, location_dim) -> (N, dim), to be compared with the gps part of images."""
        return normalize(self.location_projection_else(location), dim=-1)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> G3Heads:
        """Read ``g3.json`` and ``g3.safetensors`` of a folder. Raises GeoError when they do not fit."""
        return load_weights(cls, G3Config, Path(folder), "g3")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``g3.json`` and ``g3.safetensors``."""
        save_weights(self, asdict(self.config), Path(folder), "g3", half=False)


def _location(config: AlignmentConfig) -> nn.Module:
    if config.location == "unit_vector":
        return UnitVectorEncoder(config.dim, config.sigmas, config.frequencies, config.hidden)
    if config.location == "harmonics":
        return HarmonicEncoder(HarmonicConfig(config.degrees, config.hidden, dim=config.dim))
    sizes = config.sigmas, config.frequencies, config.hidden, config.dim
    return LocationEncoder(LocationConfig(config.location, *sizes))


def _hashes(text: str, buckets: int) -> list[int]:
    """Buckets of a text's words and of the trigrams of each word, spaces around it counted as letters."""
    words = re.findall(r"\w+", text.lower()) or [""]
    pieces = [*words, *(f" {word} "[i : i + 3] for word in words for i in range(len(word)))]
    return [zlib.crc32(piece.encode()) % buckets for piece in pieces]
