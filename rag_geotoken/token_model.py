"""The token model after GeoToken (ICDM 2025): S2 cells as token sequences, conditioned on a photo and its neighbours.

Memory: [CLS, image, gps, text] of the photo, then [image, gps, text, one position a token] of each neighbour.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.errors import GeoError
from rag_geotoken.weights import load_weights, save_weights


@dataclass(frozen=True)
class TokenConfig:
    """Sizes of a :class:`TokenModel`: S2 level and levels a token, neighbours, widths and depths."""

    level: int = 10
    group: int = 2
    neighbors: int = 8
    dim: int = 256
    d_model: int = 192
    heads: int = 6
    ff: int = 384
    encoder_layers: int = 1
    decoder_layers: int = 3


class TokenModel(nn.Module):
    """Encoder over the memory, decoder over the cell's tokens, one output layer a position."""

    def __init__(self, config: TokenConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TokenConfig()
        self.vocab_sizes = S2Tokenizer(config.level, config.group).vocab_sizes
        length, d = len(self.vocab_sizes), config.d_model
        if config.heads < 1 or d % config.heads:
            raise GeoError(f"{config.heads} heads cannot share a width of {d}: choose a divisor")
        self.inputs = nn.ModuleList(
            nn.Sequential(nn.Linear(config.dim, d), nn.ReLU(), nn.Linear(d, d), nn.LayerNorm(d)) for _ in range(3)
        )
        # One table for all positions' tokens, each position's at its own offset; the last row starts a sequence.
        self.register_buffer("offsets", torch.tensor([0, *self.vocab_sizes]).cumsum(0)[:-1], persistent=False)
        self.neighbor_tokens = nn.Embedding(sum(self.vocab_sizes), d)
        self.tokens = nn.Embedding(sum(self.vocab_sizes) + 1, d)
        self.cls = nn.Parameter(torch.zeros(d))
        self.query_kind = nn.Parameter(torch.randn(4, d) * 0.02)
        self.neighbor_kind = nn.Parameter(torch.randn(3 + length, d) * 0.02)
        self.rank = nn.Parameter(torch.randn(config.neighbors, d) * 0.02)
        self.position = nn.Parameter(torch.randn(length, d) * 0.02)
        self.encoder = nn.ModuleList(Block(config, cross=False) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(Block(config, cross=True) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(d)
        self.heads = nn.ModuleList(nn.Linear(d, size) for size in self.vocab_sizes)

    offsets: Tensor

    @property
    def blocks(self) -> list[Block]:
        """The decoder's layers."""
        return cast(list[Block], list(self.decoder))

    def memory(self, photo: Tensor, neighbors: Tensor, neighbor_tokens: Tensor) -> Tensor:
        """Encode what the decoder may look at.

        photo (B, 3, dim) image, gps and text embedding, neighbors (B, K, 3, dim), neighbor_tokens (B, K, T) int64
        -> (B, 4 + K * (3 + T), d_model).
        """
        batch, k = neighbors.shape[:2]
        query = torch.stack([layer(photo[:, i]) for i, layer in enumerate(self.inputs)], dim=1)
        query = torch.cat([self.cls.expand(batch, 1, -1), query], dim=1) + self.query_kind
        vectors = torch.stack([layer(neighbors[:, :, i]) for i, layer in enumerate(self.inputs)], dim=2)
        cells = self.neighbor_tokens(neighbor_tokens + self.offsets)
        around = torch.cat([vectors, cells], dim=2) + self.neighbor_kind + self.rank[:k, None]
        states = torch.cat([query, around.flatten(1, 2)], dim=1)
        for block in self.encoder:
            states = block(states)
        return states

    def logits(self, memory: Tensor, tokens: Tensor) -> list[Tensor]:
        """Teacher forcing: memory (B, S, d_model), tokens (B, T) -> for each position t logits (B, V_t)."""
        length = tokens.shape[1]
        states = self.embed(tokens[:, : length - 1])
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        for block in self.blocks:
            states = block(states, mask=mask, memory=block.memory_keys(memory))
        states = self.norm(states)
        return [head(states[:, t]) for t, head in enumerate(self.heads[:length])]

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (..., t) -> decoder inputs (..., t + 1, d_model), the start first."""
        start = tokens.new_full((*tokens.shape[:-1], 1), self.tokens.num_embeddings - 1)
        ids = torch.cat([start, tokens + self.offsets[: tokens.shape[-1]]], dim=-1)
        states: Tensor = self.tokens(ids) + self.position[: ids.shape[-1]]
        return states

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TokenModel:
        """Read ``tokens.json`` and ``tokens.safetensors`` of a folder. Raises GeoError when they do not fit."""
        return load_weights(cls, TokenConfig, Path(folder), "tokens")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokens.json`` and ``tokens.safetensors``, parameters in half precision."""
        save_weights(self, asdict(self.config), Path(folder), "tokens")


class Block(nn.Module):
    """Self-attention, attention to the memory where there is one, feed-forward; pre-norm."""

    def __init__(self, config: TokenConfig, cross: bool) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads = config.heads
        self.norm_self, self.norm_ff = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.ff = nn.Sequential(nn.Linear(d, config.ff), nn.ReLU(), nn.Linear(config.ff, d))
        if cross:
            self.norm_cross = nn.LayerNorm(d)
            self.query, self.keys, self.out_cross = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)

    def forward(
        self, states: Tensor, mask: Tensor | None = None, memory: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """(B, L, d) -> (B, L, d); mask (L, L) true where a position may look; memory as :meth:`memory_keys`."""
        query, key, value = self.self_keys(states)
        return self.look_and_think(self.attend(states, query, key, value, mask), memory)

    def attend(self, states: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Self-attention's outcome added to the states (..., L, d)."""
        heard: Tensor = self.out(_merge(scaled_dot_product_attention(query, key, value, attn_mask=mask)))
        return states + heard

    def look_and_think(self, states: Tensor, memory: tuple[Tensor, Tensor] | None) -> Tensor:
        """What follows self-attention: states (B, L, d) look at the memory, then the feed-forward layer."""
        if memory is not None:
            query = _split(self.query(self.norm_cross(states)), self.n_heads)
            states = states + self.out_cross(_merge(scaled_dot_product_attention(query, *memory)))
        thought: Tensor = self.ff(self.norm_ff(states))
        return states + thought

    def self_keys(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of self-attention, each (B, heads, L, d / heads)."""
        query, key, value = self.qkv(self.norm_self(states)).chunk(3, dim=-1)
        return _split(query, self.n_heads), _split(key, self.n_heads), _split(value, self.n_heads)

    def memory_keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of the memory, computed once a photo: each (B, heads, S, d / heads)."""
        key, value = self.keys(memory).chunk(2, dim=-1)
        return _split(key, self.n_heads), _split(value, self.n_heads)


def _split(states: Tensor, heads: int) -> Tensor:
    return states.view(*states.shape[:-1], heads, -1).transpose(-3, -2)


def _merge(states: Tensor) -> Tensor:
    return states.transpose(-3, -2).flatten(-2)
