"""The prefixes that decoding has visited, as one tree a photo: each prefix goes through the decoder once.

Beams, samples and frontier search differ only in which prefixes they grow. Keys and values of the memory are computed
once a photo, those of a prefix once and for all that begin with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rag_geotoken.tokens.model import TokenModel, attention


class PrefixTree:
    """Nodes (B, count) of a decoder over a memory (B, S, d_model); node 0 is the empty prefix.

    states (B, N, d_model): the decoder's outcome for the nodes of the last growth.
    """

    def __init__(self, model: TokenModel, memory: Tensor) -> None:
        self.model = model
        self.batch = torch.arange(len(memory), device=memory.device)[:, None]
        self.memory = [block.memory_keys(memory) for block in model.blocks]
        self.past: list[tuple[Tensor, Tensor]] = []
        # For each node, true for those on the way from the root to it, itself included.
        self.paths = torch.zeros(len(memory), 0, 0, dtype=torch.bool, device=memory.device)
        start = model.start_token_embedding.expand(len(memory), 1, -1) + model.positions[0]
        self.states = self._add(start, self.paths.new_zeros(len(memory), 1, 0))

    def grow(self, parent: Tensor, token: Tensor, depth: int | Tensor) -> Tensor:
        """Add prefixes: parent node, next token and the parent's depth, each (B, N) -> the new nodes (B, N).

        One depth may stand for all.
        """
        model = self.model
        inputs = model.embedding(token + model.offsets[depth]) + model.positions[depth + 1]
        first = self.paths.shape[1]
        self.states = self._add(inputs, self.paths[self.batch, parent])
        return torch.arange(first, self.paths.shape[1], device=parent.device).expand_as(parent)

    def logits(self, depth: int) -> Tensor:
        """Of the next token, for the nodes (B, N) of the last growth, all at one depth -> (B, N, V_depth)."""
        logits: Tensor = self.model.output_layers[depth](self.states)
        return logits

    def _add(self, states: Tensor, above: Tensor) -> Tensor:
        """Add nodes with inputs (B, N, d_model), below the nodes (B, N, count) -> their states."""
        batch, n, _ = states.shape
        own = torch.eye(n, dtype=torch.bool, device=states.device).expand(batch, n, n)
        paths = torch.cat([above, own], dim=-1)
        self.paths = torch.cat([pad(self.paths, (0, n)), paths], dim=1)
        heads, present = self.model.config.heads, list[tuple[Tensor, Tensor]]()

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """Each prefix looks at those it begins with and at itself."""
            if self.past:
                before = self.past[len(present)]
                key, value = torch.cat([before[0], key], dim=1), torch.cat([before[1], value], dim=1)
            present.append((key, value))
            return attention(query, key, value, heads, paths[:, None])

        for block, memory in zip(self.model.blocks, self.memory, strict=True):
            states = block(states, attend, memory)
        self.past = present
        return states
