"""The road on one screen: encode, search, propose, pool, verify, decide, each a method from arrays to arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken import decoding, selection
from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.errors import GeoError
from rag_geotoken.files import file_sha256, read_json
from rag_geotoken.index import GeoIndex
from rag_geotoken.pictures import load_pictures
from rag_geotoken.token_model import TokenModel
from rag_geotoken.types import BEAM, GREEDY, SAMPLE, Candidates, Neighbors, Pool, Prediction, Predictions
from rag_geotoken.weights import EARTH

Verify = Literal["none", "alignment"]


@dataclass(frozen=True)
class Options:
    """What a run may change: neighbours searched, how cells are proposed, and who verifies the pool."""

    neighbors: int = 20
    propose: tuple[str, ...] = ("greedy", "beam", "sample")
    beam_width: int = 10
    samples: int = 40
    temperature: float = 1.0
    seed: int = 0
    verify: Verify = "alignment"


class Geolocator:
    """Models and index, loaded once; call it with pictures."""

    def __init__(
        self, alignment: GeoAlignment, tokens: TokenModel, index: GeoIndex, tuning: selection.Tuning, encoder: str
    ) -> None:
        index.check_encoder(encoder)
        self.alignment, self.tokens, self.index, self.tuning, self.encoder = alignment, tokens, index, tuning, encoder
        self.tokenizer = S2Tokenizer(tokens.config.level, tokens.config.group)
        self.gallery_tokens = torch.from_numpy(self.tokenizer.encode(*index.lat_lon.T))

    @classmethod
    def from_pretrained(cls, index: str | Path, weights: str | Path = EARTH) -> Geolocator:
        """Open an index folder and a weights folder. Raises GeoError when a file is missing, broken or does not fit."""
        weights = Path(weights)
        tokens = TokenModel.from_pretrained(weights)
        tuning = load_tuning(weights)
        return cls(GeoAlignment.from_pretrained(weights), tokens, GeoIndex.load(index), tuning, encoder_id(weights))

    def __call__(self, pictures: str | Path | Sequence[str | Path], options: Options | None = None) -> list[Prediction]:
        """Pictures -> predictions in order; one that cannot be read has an error and no coordinates."""
        options = options or Options()
        references = [str(p) for p in ([pictures] if isinstance(pictures, str | Path) else pictures)]
        pixels, errors = load_pictures(references, 64)
        good = [i for i, error in enumerate(errors) if error is None]
        found = [Prediction(reference, error=error) for reference, error in zip(references, errors, strict=True)]
        if good:
            decided = self.locate(pixels[good], options)
            for i, prediction in zip(good, decided.rows([references[i] for i in good]), strict=True):
                found[i] = prediction
        return found

    def locate(self, pixels: NDArray[np.uint8], options: Options) -> Predictions:
        """Pixels (B, 64, 64, 3) uint8 -> the decision on each: the method, start to end."""
        photo = self.encode(pixels)
        neighbors = self.search(photo, options.neighbors, digests(pixels))
        candidates = self.propose(photo, neighbors, options) if options.propose else None
        pool = self.pool(neighbors, candidates)
        similarity = self.verify(photo, pool) if options.verify == "alignment" else None
        return selection.decide(pool, similarity, self.tuning)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels (B, 64, 64, 3) -> (B, 3, dim) image, GPS and text embedding."""
        return self.alignment.embed(pixels)

    def search(self, photo: NDArray[np.float32], k: int, own: list[str] | None = None) -> Neighbors:
        """Embeddings (B, 3, dim) -> the k nearest gallery photos, those with a digest of ``own`` passed over."""
        return self.index.search(photo, k, self.tuning.search_weights, own)

    @torch.inference_mode()
    def memory(self, photo: NDArray[np.float32], neighbors: Neighbors) -> Tensor:
        """What the token model's decoder looks at, for photos (B, 3, dim) and their neighbours."""
        rows = neighbors.rows[:, : self.tokens.config.neighbors].copy()
        query, near = torch.from_numpy(photo), torch.from_numpy(self.index.vectors(rows))
        places = torch.from_numpy(self.index.lat_lon[rows])
        return self.tokens.memory_of(query, near, self.gallery_tokens[rows], places)

    @torch.inference_mode()
    def propose(
        self, photo: NDArray[np.float32], neighbors: Neighbors, options: Options, keys: list[int] | None = None
    ) -> Candidates:
        """Decode cells for photos (B, 3, dim) with their neighbours; ``keys`` name the photos' random streams.

        Raises GeoError for an unknown way to propose.
        """
        memory = self.memory(photo, neighbors)
        decoded: list[tuple[int, decoding.Decoded]] = []
        for name in options.propose:
            if name == "greedy":
                decoded.append((GREEDY, decoding.greedy(self.tokens, memory)))
            elif name == "beam":
                decoded.append((BEAM, decoding.beam(self.tokens, memory, options.beam_width)))
            elif name == "sample":
                drawn = decoding.sample(self.tokens, memory, options.samples, options.temperature, options.seed, keys)
                decoded.append((SAMPLE, drawn))
            else:
                raise GeoError(f"cells cannot be proposed by {name!r}: choose greedy, beam or sample")
        source = [np.full(d.log_prob.shape, name, np.int8) for name, d in decoded]
        return Candidates(
            torch.cat([d.tokens for _, d in decoded], dim=1).numpy(),
            torch.cat([d.log_prob for _, d in decoded], dim=1).numpy(),
            np.concatenate(source, axis=1),
        )

    def pool(self, neighbors: Neighbors | None, candidates: Candidates | None) -> Pool:
        """Generated and retrieved places together, one entry a cell."""
        return selection.make_pool(neighbors, candidates, self.tokenizer, self.tuning)

    def verify(self, photo: NDArray[np.float32], pool: Pool) -> NDArray[np.float32]:
        """G3's geo-verification: the cosine of each photo's GPS embedding with each place of its pool -> (B, C)."""
        similarity = np.zeros(pool.mask.shape, np.float32)
        places = self.alignment.embed_places(pool.lat_lon[pool.mask])
        similarity[pool.mask] = np.einsum("nd,nd->n", photo[np.nonzero(pool.mask)[0], 1], places)
        return similarity


def digests(pixels: NDArray[np.uint8]) -> list[str]:
    """A name for each picture's pixels (B, H, W, 3), 32 hexadecimal digits, by which a photo knows itself."""
    return [blake2b(picture.tobytes(), digest_size=16).hexdigest() for picture in pixels]


def encoder_id(weights: Path) -> str:
    """Which encoder made an embedding: the folder's name and the start of the SHA-256 of its alignment weights."""
    return f"{weights.name}-{file_sha256(weights / 'alignment.safetensors')[:12]}"


def load_tuning(weights: Path) -> selection.Tuning:
    """Read ``tuning.json`` of a weights folder. Raises GeoError when it is missing or not what it should be."""
    values = read_json(weights / "tuning.json")
    try:
        return selection.Tuning(**values | {"search_weights": tuple(values["search_weights"])})
    except (TypeError, KeyError) as error:
        raise GeoError(f"tuning.json in {weights.name} is not a tuning: {error}") from None
