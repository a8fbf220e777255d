"""GeoToken's model (ICDM 2025): S2 cells as token sequences, conditioned on a photo and its neighbors.

Memory: [CLS, image, gps, text] of the photo, then [image, gps, text, one position a token] of each neighbor.
Parameters bear the names of the released code, so that its checkpoints load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, normalize, relu, scaled_dot_product_attention

from rag_geotoken.encoders.dense import Dense, affine
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.storage.weights import Pretrained
from rag_geotoken.tokens.spherical import rotate, rotations

# Positions of the memory that a CPU encodes at once.
CPU_POSITIONS = 2048

# Queries, keys and values (B, L, d_model) -> what each query heard (B, L, d_model).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TokenConfig:
    """Sizes of a :class:`TokenModel`: S2 level and levels a token, neighbors, widths and depths.

    neighbor_positions: how the memory knows its neighbors apart. ``sequence`` is GeoToken's: sinusoidal positions
    along the whole memory. ``none`` gives every neighbor the same positions, so that their order says nothing;
    ``spherical`` does too and turns attention by their places (see :mod:`rag_geotoken.tokens.spherical`).
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
    """Encoder over the memory, decoder over the cell's tokens, one output layer a position."""

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
        """The decoder's layers."""
        return cast(list[Block], list(cast(nn.ModuleList, self.decoder["layers"])))

    def memory(
        self,
        image: Tensor,
        gps: Tensor,
        text: Tensor,
        neighbor_image: Tensor,
        neighbor_gps: Tensor,
        neighbor_text: Tensor,
        neighbor_tokens: Tensor,
        neighbor_places: Tensor | None = None,
    ) -> Tensor:
        """:meth:`memory_of` embeddings part by part: (B, dim) of the photo, (B, K, dim) of its neighbors."""
        photo, near = (image, gps, text), (neighbor_image, neighbor_gps, neighbor_text)
        return self.memory_of(torch.stack(photo, dim=-2), torch.stack(near, dim=-2), neighbor_tokens, neighbor_places)

    def memory_of(
        self, photo: Tensor, neighbors: Tensor, neighbor_tokens: Tensor, neighbor_places: Tensor | None = None
    ) -> Tensor:
        """Encode what the decoder may look at.

        photo (B, 3, dim): its image, GPS and text embedding; of its neighbors the same, neighbors (B, K, 3, dim),
        neighbor_tokens (B, K, T) int64 and, with spherical positions, neighbor_places (B, K, 2) degrees
        -> (B, 4 + K * (3 + T), d_model). K may be less than the configured number. Raises GeoError when there are more
        neighbors, or no places where they are needed.
        """
        batch, k, length = neighbor_tokens.shape
        if k > self.config.neighbors:
            raise GeoError(f"the token model takes {self.config.neighbors} neighbors at most, not {k}")
        cells = self.retrieval_embedding(neighbor_tokens + self.offsets)
        near = torch.cat([self._project(neighbors), cells], dim=2).flatten(1, 2)
        states = torch.cat([self.cls_token.expand(batch, 1, -1), self._project(photo), near], dim=1)
        # Without an order, every neighbor has the positions of the first.
        each = 3 + length
        place = torch.arange(4 + k * each, device=states.device)
        if self.config.neighbor_positions != "sequence":
            place = torch.where(place < 4, place, 4 + (place - 4) % each)
        states = dropout(states + self.positions[place], self.config.dropout, self.training)
        turns = self._turns(neighbor_places, each)
        # On a CPU a few photos go through all layers before the next, so that they stay in its cache.
        parts = -(-batch * states.shape[1] // CPU_POSITIONS) if states.device.type == "cpu" else 1
        turned = [None] * parts if turns is None else turns.chunk(parts)
        return torch.cat([self._encode(*some) for some in zip(states.chunk(parts), turned, strict=False)])

    def _project(self, vectors: Tensor) -> Tensor:
        """Image, GPS and text embeddings (..., 3, dim) -> unit vectors (..., 3, d_model)."""
        parts = zip((self.image_proj, self.loc_proj, self.text_proj), vectors.unbind(-2), strict=True)
        return torch.stack([normalize(layer(part), dim=-1) for layer, part in parts], dim=-2)

    def _encode(self, states: Tensor, turns: Tensor | None) -> Tensor:
        attend = self._attend(turns=turns)
        for block in cast(nn.ModuleList, self.encoder["layers"]):
            states = block(states, attend)
        return states

    def _turns(self, places: Tensor | None, each: int) -> Tensor | None:
        """The rotation (B, S, 3, 3) of each memory position: its neighbor's place, none for the photo itself."""
        if self.config.neighbor_positions != "spherical":
            return None
        if places is None:
            raise GeoError("spherical neighbor positions need neighbor_places: give the neighbors' coordinates")
        turns = rotations(places).repeat_interleave(each, dim=1)
        return torch.cat([torch.eye(3, device=turns.device).expand(len(turns), 4, 3, 3), turns], dim=1)

    def logits(self, memory: Tensor, tokens: Tensor) -> list[Tensor]:
        """Teacher forcing: memory (B, S, d_model), tokens (B, T) -> for each position t logits (B, V_t)."""
        states = self.states(memory, tokens[:, :-1])
        return [layer(states[:, t]) for t, layer in enumerate(self.output_layers[: states.shape[1]])]

    def states(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """Decoder states after the start and after each of the tokens (B, t) -> (B, t + 1, d_model)."""
        batch, length = tokens.shape
        words = self.embedding(tokens + self.offsets[:length])
        states = torch.cat([self.start_token_embedding.expand(batch, 1, -1), words], dim=1)
        states = dropout(states + self.positions[: length + 1], self.config.dropout, self.training)
        attend = self._attend(mask=torch.ones(length + 1, length + 1, dtype=torch.bool, device=tokens.device).tril())
        for block in self.blocks:
            states = block(states, attend, block.memory_keys(memory))
        return states

    def _attend(self, mask: Tensor | None = None, turns: Tensor | None = None) -> Attend:
        rate = self.config.dropout if self.training else 0.0
        return partial(attention, heads=self.config.heads, mask=mask, turns=turns, rate=rate)


class Attention(nn.Module):
    """The projections of multi-head attention; who attends to whom is the caller's."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * d, d)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = Dense(d, d)

    def project(self, states: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """States (..., d) -> parts ``first`` to ``last`` of query, key and value, each (..., d)."""
        d = self.in_proj_weight.shape[1]
        rows = slice(first * d, last * d)
        return affine(states, self.in_proj_weight[rows], self.in_proj_bias[rows]).chunk(last - first, dim=-1)


class Block(nn.Module):
    """Self-attention, attention to the memory where there is one, feed-forward."""

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

    def forward(self, states: Tensor, attend: Attend, memory: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, L, d) -> (B, L, d); ``attend`` does the self-attention, memory is of :meth:`memory_keys`."""
        heard = self.self_attn.out_proj(attend(*self.self_attn.project(states, 0, 3)))
        states, last = self.norm1(states + self.dropout(heard)), self.norm2
        if memory is not None:
            query = split(self.multihead_attn.project(states, 0, 1)[0], self.n_heads)
            seen = heed(query, *memory, rate=self.dropout.p if self.training else 0.0)
            seen = self.multihead_attn.out_proj(merge(seen))
            states, last = self.norm2(states + self.dropout(seen)), self.norm3
        thought = self.linear2(self.dropout(relu(self.linear1(states))))
        states = last(states + self.dropout(thought))
        return states

    def memory_keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of the memory, computed once a photo: each (B, heads, S, d / heads)."""
        key, value = self.multihead_attn.project(memory, 1, 3)
        return split(key, self.n_heads), split(value, self.n_heads)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    turns: Tensor | None = None,
    rate: float = 0.0,
) -> Tensor:
    """Multi-head attention: (B, L, d), (B, S, d), (B, S, d) -> (B, L, d).

    mask: true where a query may look. turns (B, L, 3, 3): rotations of the places of queries and keys alike.
    """
    query, key, value = split(query, heads), split(key, heads), split(value, heads)
    if turns is not None:
        query, key = rotate(query, turns), rotate(key, turns)
    return merge(heed(query, key, value, mask, rate))


def heed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, rate: float = 0.0) -> Tensor:
    """Scaled dot-product attention over (B, heads, L, d / heads)."""
    if not (torch.is_grad_enabled() and query.device.type == "cpu"):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
    # The fused kernel's backward pass in bf16 takes six times as long on a CPU as these products.
    weights = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return dropout(weights.softmax(-1), rate, rate > 0) @ value


def split(states: Tensor, heads: int) -> Tensor:
    """(B, L, d) -> (B, heads, L, d / heads)."""
    return states.view(*states.shape[:-1], heads, -1).transpose(-3, -2)


def merge(states: Tensor) -> Tensor:
    """(B, heads, L, d / heads) -> (B, L, d)."""
    return states.transpose(-3, -2).flatten(-2)


def _sinusoids(length: int, d: int) -> Tensor:
    """Positions (length, d) of Vaswani et al. (2017): sines and cosines of growing wavelength, in turn."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, d, 2) * (-math.log(10_000.0) / d))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
