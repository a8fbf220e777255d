"""Geo-alignment puts photos, places and place text into one space, after G3 (Jia et al., NeurIPS 2024).

The image encoder's features go through two heads, one towards the embedding of places and one towards that of text. The
encoder is the small one for satellite views, or a frozen CLIP: then the heads are G3's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from rag_geotoken.encoders import Backbone, load_backbone
from rag_geotoken.encoders.clip import CLIP_LARGE
from rag_geotoken.encoders.dense import in_blocks
from rag_geotoken.encoders.earth import EarthEncoder
from rag_geotoken.encoders.location import HarmonicEncoder, LocationConfig, UnitVectorEncoder, embed_places, mlp
from rag_geotoken.encoders.location import LocationEncoder as LocationEncoder
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.storage.files import file_sha256
from rag_geotoken.storage.weights import Pretrained, fingerprint
from rag_geotoken.types import Picture

EARTH_BACKBONE = "earth"


@dataclass(frozen=True)
class AlignmentConfig:
    """This class holds the sizes of a :class:`GeoAlignment`, and what encodes photos and places.

    dim: of every embedding. backbone: ``earth``, trained with the rest, or a frozen model (``load_backbone``) of as
    many numbers. location_dim: of the location encoder, which a head then leads to ``dim``, as in G3; 0 for neither.
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
    backbone: str = EARTH_BACKBONE
    location_dim: int = 0


G3 = AlignmentConfig(
    dim=768,
    sigmas=(1.0, 16.0, 256.0),
    frequencies=256,
    hidden=1024,
    location="mercator",
    backbone=CLIP_LARGE,
    location_dim=512,
)


class TextEncoder(nn.Module):
    """This encoder averages a bag of hashed words and character trigrams, and passes it through a small network.

    No pretrained text model is needed, so a fresh machine without a hub has one, and unknown names share trigrams.
    """

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(config.text_buckets, config.text_dim, mode="mean")
        self.layers = nn.Sequential(nn.LayerNorm(config.text_dim), mlp(config.text_dim, config.hidden, config.dim))

    def forward(self, texts: list[str]) -> Tensor:
        """Return the embeddings (N, dim) of N texts."""
        bags = [torch.tensor(_hashes(text, self.bag.num_embeddings)) for text in texts]
        offsets = torch.tensor([0, *map(len, bags[:-1])]).cumsum(0)
        device = self.bag.weight.device
        embedding: Tensor = self.layers(self.bag(torch.cat(bags).to(device), offsets.to(device)))
        return embedding


class GeoAlignment(Pretrained):
    """This model holds the encoders of images, places and texts, two heads, and the scales of two contrastive losses.

    A frozen backbone is no part of the weights: it is opened when a picture or a text is first embedded.
    """

    file, config_type = "alignment", AlignmentConfig
    config: AlignmentConfig
    encoder: EarthEncoder
    folder: Path | None = None  # where it was read from
    backbone_name: str | None = None  # a backbone in another place than the config's

    def __init__(self, config: AlignmentConfig | None = None) -> None:
        super().__init__()
        self.config = config or AlignmentConfig()
        if not self.frozen:
            self.encoder = EarthEncoder(self.config.dim)
        head = partial(mlp, *[self.config.dim] * 3, between=nn.ReLU if self.frozen else nn.GELU)
        self.to_gps, self.to_text = head(), head()
        self.location = _location_encoder(self.config)
        self.text = head() if self.frozen else TextEncoder(self.config)
        scale = 3.99 if self.frozen else math.log(1 / 0.07)
        self.gps_scale, self.text_scale = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(scale))

    @property
    def frozen(self) -> bool:
        """Return whether photos are encoded by a backbone that is not trained here."""
        return self.config.backbone != EARTH_BACKBONE

    @property
    def size(self) -> int:
        """Return the side of the square pictures that the encoder takes, in pixels."""
        return self.backbone.size if self.frozen else 64

    @cached_property
    def backbone(self) -> Backbone:
        """Open the frozen backbone. Raises GeoError when it is not there or does not fit."""
        backbone = load_backbone(self.backbone_name or self.config.backbone)
        backbone.check_dim(self.config.dim, self.config.backbone, "the alignment")
        return backbone

    @cached_property
    def identity(self) -> str:
        """Return what embeddings follow from: the folder's name, and 12 digits of a SHA-256 of the weights."""
        if self.folder is None:
            return f"unsaved-{fingerprint(self)[:12]}"
        name = f"{self.folder.name}-{file_sha256(self.folder / 'alignment.safetensors')[:12]}"
        return f"{name} on {self.encoder_identity}" if self.frozen else name

    @cached_property
    def encoder_identity(self) -> str:
        """Return what :meth:`project` follows from: with a frozen backbone, the same however the heads are trained."""
        if not self.frozen:
            return self.identity
        facts = json.dumps(self.backbone.identity(), sort_keys=True)
        return f"{self.backbone.folder.name}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"

    def load(self, references: Sequence[Picture]) -> tuple[NDArray[np.uint8], list[str | None]]:
        """Read N pictures as the encoder takes them (N, size, size, 3), and what is wrong: see ``load_pictures``."""
        return self.backbone.load(references) if self.frozen else load_pictures(references, self.size)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image, gps and text embeddings of pixels (N, size, size, 3) uint8, each (N, dim) of length one."""
        return self.parts(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """Return the encoder's features (N, dim), of any length, of pixels (N, size, size, 3) uint8."""
        return self.backbone.images(pixels.numpy()) if self.frozen else self.encoder(pixels)

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image, gps and text embeddings, each (N, dim) of length one, of the encoder's features (N, dim)."""
        vectors = features, self.to_gps(features), self.to_text(features)
        image, gps, text = (normalize(vector.float(), dim=-1) for vector in vectors)
        return image, gps, text

    @torch.inference_mode()
    def project(self, pixels: NDArray[np.uint8], batch: int = 32) -> NDArray[np.float32]:
        """Return the encoder's features (N, dim), of any length, before its heads, of pixels (N, size, size, 3)."""
        if self.frozen:  # a large model has batches of its own
            return self.features(torch.from_numpy(pixels)).float().numpy()
        return in_blocks(self.features, torch.from_numpy(pixels), batch).float().numpy()

    @torch.inference_mode()
    def heads(self, features: NDArray[np.float32], batch: int = 256) -> NDArray[np.float32]:
        """Return what :meth:`embed` makes of photos (N, 3, dim), of their features (N, dim) by :meth:`project`."""
        return in_blocks(lambda rows: torch.stack(self.parts(rows), 1), torch.from_numpy(features), batch).numpy()

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the image, gps and text embedding of each photo (N, 3, dim), of pixels (N, size, size, 3)."""
        return self.heads(self.project(pixels))

    def embed_places(self, lat_lon: NDArray[np.float64]) -> NDArray[np.float32]:
        """Embed places (N, 2) in degrees as (N, dim) of length one, to be compared with the gps part of photos."""
        return embed_places(self.location, lat_lon)

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Embed N texts as (N, dim) of length one, to be compared with the text part of photos."""
        return normalize(self.text(self.backbone.texts(texts) if self.frozen else texts), dim=-1).numpy()

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: str | None = None) -> Self:
        """Read the weights of a folder; ``backbone``: the frozen one's own place. Raises GeoError for a misfit."""
        loaded = super().from_pretrained(folder)
        loaded.folder, loaded.backbone_name = Path(folder), backbone
        return loaded


def _location_encoder(config: AlignmentConfig) -> nn.Module:
    dim = config.location_dim or config.dim
    sizes = config.sigmas, config.frequencies, config.hidden
    if config.location == "unit_vector":
        encoder: nn.Module = UnitVectorEncoder(dim, *sizes)
    elif config.location == "harmonics":
        encoder = HarmonicEncoder(config.degrees, config.hidden, dim=dim)
    else:
        encoder = LocationEncoder(LocationConfig(config.location, *sizes, dim=dim))
    return nn.Sequential(encoder, mlp(dim, dim, config.dim, between=nn.ReLU)) if config.location_dim else encoder


def _hashes(text: str, buckets: int) -> list[int]:
    """Return the buckets of a text's words and of their trigrams, the spaces around a word counted as letters."""
    words = re.findall(r"\w+", text.lower()) or [""]
    pieces = [*words, *(f" {word} "[i : i + 3] for word in words for i in range(len(word)))]
    return [zlib.crc32(piece.encode()) % buckets for piece in pieces]
