"""This tree holds the prefixes of a photo that decoding has visited: each goes through the decoder once.

Beams, samples and frontier search differ only in which prefixes they grow. Keys and values of the memory are computed
once a photo, those of a prefix once and for all that begin with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rag_geotoken.tokens.model import TokenModel, attention


class PrefixTree:
    """This class holds nodes (B, count) of a decoder over a memory (B, S, d_model); node 0 is the empty prefix.

    states (B, N, d_model): the decoder's outcome for the nodes of the last growth.
    """

    def __init__(self, model: TokenModel, memory: Tensor) -> None:
        self.model = model
        self.memory = [block.memory_keys(memory) for block in model.blocks]
        self.past: list[tuple[Tensor, Tensor]] = []  # keys and values of all nodes, by layer
        # For each node, true for those on the way from the root to it, itself included.
        self.paths = torch.zeros(len(memory), 0, 0, dtype=torch.bool, device=memory.device)
        start = model.start_token_embedding.expand(len(memory), 1, -1) + model.positions[0]
        self.states = self._add(start, self.paths.new_zeros(len(memory), 1, 0))

    def grow(self, parent: Tensor, token: Tensor, depth: int | Tensor) -> Tensor:
        """Add a prefix for each parent node, next token and parent's depth (B, N); return the new nodes (B, N).

        One depth may stand for all.
        """
        model = self.model
        inputs = model.embedding(token + model.offsets[depth]) + model.positions[depth + 1]
        first = self.paths.shape[1]
        batch = torch.arange(len(parent), device=parent.device)[:, None]
        self.states = self._add(inputs, self.paths[batch, parent])
        return torch.arange(first, self.paths.shape[1], device=parent.device).expand_as(parent)

    def logits(self, depth: int) -> Tensor:
        """Return logits (B, N, V_depth) of the next token for the nodes of the last growth, all at one depth."""
        logits: Tensor = self.model.output_layers[depth](self.states)
        return logits

    def _add(self, states: Tensor, above: Tensor) -> Tensor:
        """Add nodes with inputs (B, N, d_model) below the paths (B, N, count); return their states."""
        batch, n, _ = states.shape
        own = torch.eye(n, dtype=torch.bool, device=states.device).expand(batch, n, n)
        paths = torch.cat([above, own], dim=-1)
        self.paths = torch.cat([pad(self.paths, (0, n)), paths], dim=1)
        past, self.past = self.past, []

        def self_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """Let each prefix attend to those it begins with and to itself."""
            if past:
                past_key, past_value = past[len(self.past)]
                key, value = torch.cat([past_key, key], dim=1), torch.cat([past_value, value], dim=1)
            self.past.append((key, value))
            return attention(query, key, value, heads=self.model.config.heads, mask=paths[:, None])

        for block, memory in zip(self.model.blocks, self.memory, strict=True):
            states = block(states, self_attention, memory)
        return states
