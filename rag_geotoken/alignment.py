"""Geo-alignment after G3 (Jia et al., NeurIPS 2024): photos, places and place text in one space.

The image encoder's features go through two heads, one towards the embedding of places and one towards that of text.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from rag_geotoken.encoders.earth import EarthEncoder
from rag_geotoken.weights import load_weights, save_weights


@dataclass(frozen=True)
class AlignmentConfig:
    """Sizes of a :class:`GeoAlignment`: ``dim`` of every embedding, spreads of the location encoder's frequencies."""

    dim: int = 256
    sigmas: tuple[float, ...] = (2.0, 12.0, 60.0, 250.0)
    frequencies: int = 96
    hidden: int = 512
    text_buckets: int = 4096
    text_dim: int = 64


class LocationEncoder(nn.Module):
    """Places (N, 2) in degrees, latitude first -> embeddings (N, dim).

    Random Fourier features (Tancik et al., NeurIPS 2020) of the unit vector, so that poles and the date line are
    places like all others; a frequency of spread sigma resolves about 6371 / sigma km.
    """

    frequencies: Tensor

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(len(config.sigmas), config.frequencies, 3, generator=generator)
        self.register_buffer("frequencies", (draws * torch.tensor(config.sigmas)[:, None, None]).flatten(0, 1))
        self.layers = _mlp(2 * len(self.frequencies), config.hidden, config.hidden, config.dim)

    def forward(self, lat_lon: Tensor) -> Tensor:
        """(N, 2) degrees -> (N, dim)."""
        lat, lon = torch.deg2rad(lat_lon.double()).unbind(-1)
        unit = torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=-1).float()
        with torch.autocast("cpu", enabled=False):  # a phase of hundreds of radians does not survive bfloat16
            phase = unit @ self.frequencies.T
        embedding: Tensor = self.layers(torch.cat([phase.sin(), phase.cos()], dim=-1))
        return embedding


class TextEncoder(nn.Module):
    """Texts -> embeddings (N, dim): a bag of hashed words and character trigrams, averaged, then a small network.

    No pretrained text model is needed, so a fresh machine without a hub has one, and unknown names share trigrams.
    """

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__()
        self.buckets = config.text_buckets
        self.bag = nn.EmbeddingBag(config.text_buckets, config.text_dim, mode="mean")
        self.layers = nn.Sequential(nn.LayerNorm(config.text_dim), _mlp(config.text_dim, config.hidden, config.dim))

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
        self.to_gps, self.to_text = _mlp(dim, dim, dim), _mlp(dim, dim, dim)
        self.location, self.text = LocationEncoder(self.config), TextEncoder(self.config)
        self.gps_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.text_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (N, 64, 64, 3) uint8 -> image, gps and text embeddings, each (N, dim) of length one."""
        features = self.encoder(pixels)
        vectors = features, self.to_gps(features), self.to_text(features)
        image, gps, text = (normalize(vector.float(), dim=-1) for vector in vectors)
        return image, gps, text

    @torch.inference_mode()
    def embed(self, pixels: NDArray[np.uint8], batch: int = 256) -> NDArray[np.float32]:
        """Pixels (N, 64, 64, 3) -> (N, 3, dim): image, gps and text embedding of each photo."""
        blocks = [torch.stack(self(torch.from_numpy(pixels[i : i + batch])), 1) for i in range(0, len(pixels), batch)]
        vectors: NDArray[np.float32] = torch.cat(blocks).numpy()
        return vectors

    @torch.inference_mode()
    def embed_places(self, lat_lon: NDArray[np.float64], batch: int = 16_384) -> NDArray[np.float32]:
        """Places (N, 2) in degrees -> (N, dim) of length one."""
        places = torch.from_numpy(np.asarray(lat_lon, np.float64).reshape(-1, 2))
        blocks = [places[i : i + batch] for i in range(0, len(places), batch)]
        result: NDArray[np.float32] = torch.cat([normalize(self.location(block), dim=-1) for block in blocks]).numpy()
        return result

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GeoAlignment:
        """Read ``alignment.json`` and ``alignment.safetensors`` of a folder. Raises GeoError when they do not fit."""
        return load_weights(cls, AlignmentConfig, Path(folder), "alignment")

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write ``alignment.json`` and ``alignment.safetensors``, parameters in half precision if asked."""
        save_weights(self, asdict(self.config), Path(folder), "alignment", half)


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def _hashes(text: str, buckets: int) -> list[int]:
    """Buckets of a text's words and of the trigrams of each word, spaces around it counted as letters."""
    words = re.findall(r"\w+", text.lower()) or [""]
    pieces = [*words, *(f" {word} "[i : i + 3] for word in words for i in range(len(word)))]
    return [zlib.crc32(piece.encode()) % buckets for piece in pieces]
