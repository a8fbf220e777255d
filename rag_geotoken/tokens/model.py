"""These classes are GeoToken's model (ICDM 2025): S2 cells as tokens, given a photo and its neighbors.

Memory: [CLS, image, gps, text] of the photo, then [image, gps, text, one position a token] of each neighbor.
Parameters bear the names of the released code, so that its checkpoints load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, normalize, relu

from rag_geotoken.encoders.dense import Dense, affine
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.storage.weights import Pretrained
from rag_geotoken.tokens.spherical import place_rotations, rotate

# Positions of the memory that a CPU encodes at once.
CPU_POSITIONS = 2048

# Self-attention over queries, keys and values (B, L, d_model), with result (B, L, d_model).
SelfAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TokenConfig:
    """This class holds the sizes of a :class:`TokenModel`.

    level and group: S2 level of the cells, and levels a token. neighbor_positions: how the memory knows its neighbors
    apart. ``sequence`` is GeoToken's: sinusoidal positions along the whole memory. ``none`` gives every neighbor the
    same positions, so that their order says nothing; ``spherical`` does too and rotates queries and keys by the
    neighbors' places (see :mod:`rag_geotoken.tokens.spherical`).
    """

    level: int = 10
    group: int = 2
    neighbors: int = 8
    dim: int = 256
    d_model: int = 192
    heads: int = 6
    ff: int = 384
    encoder_layers: int = 1
    decoder_layers: int = 3
    dropout: float = 0.0
    neighbor_positions: Literal["sequence", "none", "spherical"] = "sequence"


GEOTOKEN = TokenConfig(
    level=20, neighbors=15, dim=768, d_model=512, heads=8, ff=1024, encoder_layers=10, decoder_layers=10, dropout=0.1
)
"""The configuration of the paper: 214 memory positions, 11 tokens, 54.8 M parameters."""


class TokenModel(Pretrained):
    """This model has an encoder for the memory, a decoder for a cell's tokens and one output layer a token."""

    file, config_type = "tokens", TokenConfig
    config: TokenConfig
    offsets: Tensor
    positions: Tensor

    def __init__(self, config: TokenConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TokenConfig()
        self.vocab_sizes = S2Tokenizer(config.level, config.group).vocab_sizes
        d, vocabulary = config.d_model, sum(self.vocab_sizes)
        if config.heads < 1 or d % config.heads or d % 2:
            raise GeoError(f"{config.heads} heads cannot share a width of {d}: choose an even width and a divisor")
        if config.neighbor_positions not in ("sequence", "none", "spherical"):
            raise GeoError(f"neighbor_positions {config.neighbor_positions!r}: choose sequence, none or spherical")
        self.image_proj, self.loc_proj, self.text_proj = (
            nn.Sequential(nn.Linear(config.dim, d), nn.ReLU(), nn.Linear(d, d)) for _ in range(3)
        )
        # One table for all positions' tokens, each position's at its own offset.
        self.register_buffer("offsets", torch.tensor([0, *self.vocab_sizes]).cumsum(0)[:-1], persistent=False)
        self.retrieval_embedding, self.embedding = nn.Embedding(vocabulary, d), nn.Embedding(vocabulary, d)
        self.cls_token = nn.Parameter(torch.randn(1, d))
        self.start_token_embedding = nn.Parameter(torch.randn(1, d))
        encoder = nn.ModuleList(Block(config, cross=False) for _ in range(config.encoder_layers))
        decoder = nn.ModuleList(Block(config, cross=True) for _ in range(config.decoder_layers))
        self.encoder, self.decoder = nn.ModuleDict({"layers": encoder}), nn.ModuleDict({"layers": decoder})
        self.output_layers = nn.ModuleList(nn.Linear(d, size) for size in self.vocab_sizes)
        size = 4 + config.neighbors * (3 + len(self.vocab_sizes))
        self.register_buffer("positions", _sinusoids(max(size, len(self.vocab_sizes) + 1), d), persistent=False)

    @property
    def blocks(self) -> list[Block]:
        """Return the decoder's layers."""
        return list(cast(list[Block], self.decoder["layers"]))

    def memory(
        self, photo: Tensor, neighbors: Tensor, neighbor_tokens: Tensor, neighbor_places: Tensor | None = None
    ) -> Tensor:
        """Encode a photo and its neighbors as the memory (B, 4 + K * (3 + T), d_model) that the decoder attends to.

        photo (B, 3, dim): its image, GPS and text embedding; neighbors (B, K, 3, dim) the same of its neighbors,
        neighbor_tokens (B, K, T) int64 and, with spherical positions, neighbor_places (B, K, 2) degrees. K may be less
        than the configured number. Raises GeoError for more neighbors, or without places where they are needed.
        """
        batch, k, length = neighbor_tokens.shape
        if k > self.config.neighbors:
            raise GeoError(f"the token model takes {self.config.neighbors} neighbors at most, not {k}")
        cells = self.retrieval_embedding(neighbor_tokens + self.offsets)
        neighbor_states = torch.cat([self._project(neighbors), cells], dim=2).flatten(1, 2)
        states = torch.cat([self.cls_token.expand(batch, 1, -1), self._project(photo), neighbor_states], dim=1)
        # Without an order, every neighbor has the positions of the first.
        per_neighbor = 3 + length
        position = torch.arange(states.shape[1], device=states.device)
        if self.config.neighbor_positions != "sequence":
            position = torch.where(position < 4, position, 4 + (position - 4) % per_neighbor)
        states = dropout(states + self.positions[position], self.config.dropout, self.training)
        # On a CPU a few photos go through all layers before the next, so that they stay in its cache.
        count = -(-batch * states.shape[1] // CPU_POSITIONS) if states.device.type == "cpu" else 1
        rotations: Sequence[Tensor | None] = [None] * count
        if self.config.neighbor_positions == "spherical":
            rotations = self._rotations(neighbor_places, per_neighbor).chunk(count)
        return torch.cat([self._encode(*part) for part in zip(states.chunk(count), rotations, strict=False)])

    def _project(self, vectors: Tensor) -> Tensor:
        """Project image, GPS and text embeddings (..., 3, dim) to unit vectors (..., 3, d_model)."""
        layers = self.image_proj, self.loc_proj, self.text_proj
        parts = zip(layers, vectors.unbind(-2), strict=True)
        return torch.stack([normalize(layer(part), dim=-1) for layer, part in parts], dim=-2)

    def _encode(self, states: Tensor, rotations: Tensor | None) -> Tensor:
        self_attention = self._self_attention(rotations=rotations)
        for block in cast(list[Block], self.encoder["layers"]):
            states = block(states, self_attention)
        return states

    def _rotations(self, places: Tensor | None, per_neighbor: int) -> Tensor:
        """Return the rotation (B, S, 3, 3) of each memory position: its neighbor's place, none for the photo itself."""
        if places is None:
            raise GeoError("spherical neighbor positions need neighbor_places: give the neighbors' coordinates")
        rotations = place_rotations(places).repeat_interleave(per_neighbor, dim=1)
        return torch.cat([torch.eye(3, device=rotations.device).expand(len(rotations), 4, 3, 3), rotations], dim=1)

    def logits(self, memory: Tensor, tokens: Tensor) -> list[Tensor]:
        """Return the logits (B, V_t) of each token t of tokens (B, T), given those before it and a memory."""
        states = self.states(memory, tokens[:, :-1])
        return [layer(states[:, t]) for t, layer in enumerate(self.output_layers[: states.shape[1]])]

    def states(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """Return the decoder's states (B, t + 1, d_model) after the start and after each of the tokens (B, t)."""
        batch, length = tokens.shape
        embedded = self.embedding(tokens + self.offsets[:length])
        states = torch.cat([self.start_token_embedding.expand(batch, 1, -1), embedded], dim=1)
        states = dropout(states + self.positions[: length + 1], self.config.dropout, self.training)
        mask = torch.ones(length + 1, length + 1, dtype=torch.bool, device=tokens.device).tril()
        for block in self.blocks:
            states = block(states, self._self_attention(mask=mask), block.memory_keys(memory))
        return states

    def _self_attention(self, mask: Tensor | None = None, rotations: Tensor | None = None) -> SelfAttention:
        rate = self.config.dropout if self.training else 0.0
        return partial(attention, heads=self.config.heads, mask=mask, rotations=rotations, dropout_rate=rate)


class Attention(nn.Module):
    """This layer holds the projections of multi-head attention; the caller decides who attends to whom."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * d, d)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = Dense(d, d)

    def project(self, states: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Return the parts ``first`` to ``last`` of query, key and value of states (..., d), each (..., d)."""
        d = self.in_proj_weight.shape[1]
        rows = slice(first * d, last * d)
        return affine(states, self.in_proj_weight[rows], self.in_proj_bias[rows]).chunk(last - first, dim=-1)


class Block(nn.Module):
    """This layer does self-attention, cross-attention to the memory if there is one, and feed-forward."""

    def __init__(self, config: TokenConfig, cross: bool) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads, self.dropout = config.heads, nn.Dropout(config.dropout)
        self.self_attn = Attention(d)
        if cross:
            self.multihead_attn = Attention(d)
            self.norm3 = nn.LayerNorm(d)
        self.linear1, self.linear2 = Dense(d, config.ff), Dense(config.ff, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(
        self, states: Tensor, self_attention: SelfAttention, memory: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return new states (B, L, d) for states of that shape; memory is what :meth:`memory_keys` returns."""
        attended = self_attention(*self.self_attn.project(states, 0, 3))
        states = self.norm1(states + self.dropout(self.self_attn.out_proj(attended)))
        last_norm = self.norm2
        if memory is not None:
            (query,), rate = self.multihead_attn.project(states, 0, 1), self.dropout.p if self.training else 0.0
            attended = attention(query, *memory, heads=self.n_heads, dropout_rate=rate)
            states = self.norm2(states + self.dropout(self.multihead_attn.out_proj(attended)))
            last_norm = self.norm3
        feed_forward = self.linear2(self.dropout(relu(self.linear1(states))))
        states = last_norm(states + self.dropout(feed_forward))
        return states

    def memory_keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return key and value of the memory, each (B, S, d), to be computed once a photo."""
        key, value = self.multihead_attn.project(memory, 1, 3)
        return key, value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    mask: Tensor | None = None,
    rotations: Tensor | None = None,
    dropout_rate: float = 0.0,
) -> Tensor:
    """Return the multi-head attention (B, L, d) of queries (B, L, d) to keys and values (B, S, d).

    mask: true where a query may attend. rotations (B, L, 3, 3): of the places of queries and keys alike.
    """
    # (B, L, d) as (B, heads, L, d / heads)
    query, key, value = (x.view(*x.shape[:-1], heads, -1).transpose(-3, -2) for x in (query, key, value))
    if rotations is not None:
        query, key = rotate(query, rotations), rotate(key, rotations)
    attended = scaled_dot_product_attention(query, key, value, mask=mask, dropout_rate=dropout_rate)
    return attended.transpose(-3, -2).flatten(-2)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, dropout_rate: float = 0.0
) -> Tensor:
    """Return the attention of queries (B, heads, L, d / heads), by PyTorch's own kernel except in training on a CPU."""
    if not (torch.is_grad_enabled() and query.device.type == "cpu"):
        fused = nn.functional.scaled_dot_product_attention
        return fused(query, key, value, attn_mask=mask, dropout_p=dropout_rate)
    # The fused kernel's backward pass in bf16 takes six times as long on a CPU as these products.
    weights = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return dropout(weights.softmax(-1), dropout_rate, dropout_rate > 0) @ value


def _sinusoids(length: int, d: int) -> Tensor:
    """Return positions (length, d) of Vaswani et al. (2017): sines and cosines of growing wavelength, in turn."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, d, 2) * (-math.log(10_000.0) / d))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
