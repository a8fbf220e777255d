"""How fast do we decode against a plain decode: `python eval/bench_decoding.py [--full] [--json OUT]`.

GeoToken's configuration with random weights, 32 photos of 15 neighbours, the encoder included. The plain decode is
what one writes first with PyTorch's own transformer layers, sequence first: no cache, so that at every step the whole
prefix and the memory, copied for every beam, go through all decoder layers; samples are drawn one after another. It
holds the same weights and draws with the same random numbers: exits 1 when a token differs in float32, or when beam
search on a CPU is not 8 times and sampling 20 times as fast. The floor is what the multiplications alone would take at
the speed of one large product of matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rag_geotoken import decoding
from rag_geotoken.decoding import Decoded, pick
from rag_geotoken.frontier import frontier
from rag_geotoken.prefix_tree import PrefixTree
from rag_geotoken.tables import versions
from rag_geotoken.token_model import GEOTOKEN, TokenModel

WIDTH, SAMPLES, TEMPERATURE, OPENINGS = 4, 30, 0.7, 64
BARS = {"beam": 8.0, "sample": 20.0}


class Plain:
    """The plain decode: PyTorch's layers with the weights of a :class:`TokenModel`, dropout off."""

    def __init__(self, model: TokenModel) -> None:
        c = model.config
        # Without encoder layers, its memory is what goes into the encoder.
        self.model = TokenModel(replace(c, encoder_layers=0))
        self.model.load_state_dict(model.state_dict(), strict=False)
        sizes = c.d_model, c.heads, c.ff, c.dropout
        with torch.device(model.positions.device):
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(*sizes), c.encoder_layers, enable_nested_tensor=False
            )
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes), c.decoder_layers)
        self.encoder.load_state_dict(model.encoder.state_dict())
        self.decoder.load_state_dict(model.decoder.state_dict())
        for module in (self.model, self.encoder, self.decoder):
            module.to(model.positions).eval()

    def memory(self, *inputs: Tensor) -> Tensor:
        """As :meth:`TokenModel.memory_of`, but (S, B, d_model)."""
        memory: Tensor = self.encoder(self.model.memory_of(*inputs).transpose(0, 1).contiguous())
        return memory

    def logits(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """Memory (S, N, d_model), the tokens so far (N, t) -> logits of the next one (N, V_t)."""
        model, (n, t) = self.model, tokens.shape
        start = model.start_token_embedding.expand(n, 1, -1)
        states = torch.cat([start, model.embedding(tokens + model.offsets[:t])], dim=1) + model.positions[: t + 1]
        mask = nn.Transformer.generate_square_subsequent_mask(t + 1, memory.device, memory.dtype)
        heard = self.decoder(states.transpose(0, 1), memory, tgt_mask=mask, tgt_is_causal=True)
        logits: Tensor = model.output_layers[t](heard[-1])
        return logits.float()

    @torch.inference_mode()
    def beam(self, memory: Tensor, width: int) -> Decoded:
        """Beam search with all beams of all photos in one batch, the first step with one beam a photo."""
        batch = memory.shape[1]
        tokens = torch.zeros(batch, 1, 0, dtype=torch.int64, device=memory.device)
        log_prob = torch.zeros(batch, 1, device=memory.device)
        for size in self.model.vocab_sizes:
            kept = tokens.shape[1]
            logits = self.logits(memory.repeat_interleave(kept, dim=1), tokens.flatten(0, 1))
            step = log_prob[..., None] + logits.log_softmax(-1).view(batch, kept, size)
            log_prob, flat = step.flatten(1).topk(width)
            tokens = torch.cat([pick(tokens, flat // size), flat[..., None] % size], dim=-1)
        return Decoded(tokens, log_prob)

    @torch.inference_mode()
    def sample(self, memory: Tensor, drawn: Tensor, temperature: float) -> Tensor:
        """One sample a photo from random numbers (B, T) -> tokens (B, T)."""
        tokens = torch.zeros(memory.shape[1], 0, dtype=torch.int64, device=memory.device)
        for t in range(len(self.model.vocab_sizes)):
            ladder = (self.logits(memory, tokens) / temperature).softmax(-1).cumsum(-1)
            token = (ladder <= drawn[:, t, None] * ladder[:, -1:]).sum(-1).clamp(max=ladder.shape[-1] - 1)
            tokens = torch.cat([tokens, token[:, None]], dim=-1)
        return tokens


def gigaflops(model: TokenModel, nodes: dict[str, int], drawn: int) -> dict[str, float]:
    """10^9 floating-point operations a photo by phase, a multiplication and an addition each one.

    nodes: how many prefixes of a photo go through our decoder, by way of decoding. ``drawn`` samples by the plain way.
    Products of matrices alone: norms, softmax and the like are left out on both sides.
    """
    c, d = model.config, model.config.d_model
    length, vocabulary = len(model.vocab_sizes), sum(model.vocab_sizes) / len(model.vocab_sizes)
    positions = 4 + c.neighbors * (3 + length)
    around, think, look = 4 * d * d, 2 * d * c.ff, 2 * d * d + 2 * positions * d
    projections = 3 * (1 + c.neighbors) * (c.dim * d + d * d)
    encoder = projections + c.encoder_layers * positions * (around + 2 * positions * d + think)
    keys = c.decoder_layers * positions * 2 * d * d

    def decoder(count: int, before: float) -> float:
        """``count`` prefixes that each look at ``before`` positions on average; one in each has an output layer."""
        return count * c.decoder_layers * (around + 2 * before * d + look + think)

    ours = {f"ours {way}": decoder(n, length / 2) + n * d * vocabulary for way, n in nodes.items()}
    # At step t the plain decode computes t + 1 positions, each looking at all of them, and the memory's keys again.
    steps = sum(decoder(t + 1, t + 1) + keys + d * vocabulary for t in range(length))
    first = decoder(1, 1) + keys + d * vocabulary
    plain = {"plain beam": WIDTH * (steps - first) + first, "plain sample": drawn * steps}
    return {name: 2e-9 * n for name, n in {"encoder": encoder, "memory keys": keys, **ours, **plain}.items()}
