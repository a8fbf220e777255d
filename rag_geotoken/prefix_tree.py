"""The prefixes that decoding has visited, as one tree a photo: each prefix goes through the decoder once.

Beams, samples and frontier search differ only in which prefixes they grow. Keys and values of the memory are computed
once a photo, those of a prefix once and for all that begin with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rag_geotoken.token_model import TokenModel, merge, split


class PrefixTree:
    """Nodes (B, count) of a decoder over a memory (B, S, d_model); node 0 is the empty prefix.

    states (B, N, d_model): the decoder's outcome for the nodes of the last growth.
    """

    def __init__(self, model: TokenModel, memory: Tensor) -> None:
        self.model = model
        self.batch = torch.arange(len(memory), device=memory.device)[:, None]
        self.memory = [block.memory_keys(memory) for block in model.blocks]
        self.past: list[tuple[Tensor, Tensor]] = []
        # The nodes from the root to each node, itself included; what lies beyond its depth is filled up with zeros.
        self.paths = torch.zeros(len(memory), 0, len(model.vocab_sizes) + 1, dtype=torch.int64, device=memory.device)
        start = model.start_token_embedding.expand(len(memory), 1, -1) + model.positions[0]
        self.states = self._add(start, self.paths.new_zeros(len(memory), 1, self.paths.shape[-1]), 0)

    def grow(self, parent: Tensor, token: Tensor, depth: int | Tensor) -> Tensor:
        """Add prefixes: parent node, next token and the parent's depth, each (B, N) -> the new nodes (B, N).

        One depth for all is quicker than one each.
        """
        model = self.model
        inputs = model.embedding(token + model.offsets[depth]) + model.positions[depth + 1]
        first = self.paths.shape[1]
        self.states = self._add(inputs, self.paths[self.batch, parent], depth + 1)
        return torch.arange(first, self.paths.shape[1], device=parent.device).expand_as(parent)

    def logits(self, depth: int) -> Tensor:
        """Of the next token, for the nodes (B, N) of the last growth, all at one depth -> (B, N, V_depth)."""
        logits: Tensor = self.model.output_layers[depth](self.states)
        return logits

    def _add(self, states: Tensor, paths: Tensor, depth: int | Tensor) -> Tensor:
        batch, n, _ = states.shape
        first = self.paths.shape[1]
        own = torch.arange(first, first + n, device=states.device).expand(batch, n)
        mask = None
        if isinstance(depth, int):
            longest = depth + 1
            paths[..., depth] = own
        else:
            longest = int(depth.max()) + 1
            paths = paths.scatter(-1, depth[..., None], own[..., None])
            mask = torch.arange(longest, device=states.device) <= depth[..., None]
            mask = mask.flatten(0, 1)[:, None, None]
        self.paths = torch.cat([self.paths, paths], dim=1)
        rows = (paths[..., :longest] + self.batch[..., None] * self.paths.shape[1]).flatten()
        heads, present = self.model.config.heads, list[tuple[Tensor, Tensor]]()

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """Each prefix looks at those it begins with and at itself."""
            if self.past:
                before = self.past[len(present)]
                key, value = torch.cat([before[0], key], dim=1), torch.cat([before[1], value], dim=1)
            present.append((key, value))
            key, value = (x.flatten(0, 1)[rows].view(batch * n, longest, -1) for x in (key, value))
            query = split(query.reshape(batch * n, 1, -1), heads)
            heard = scaled_dot_product_attention(query, split(key, heads), split(value, heads), attn_mask=mask)
            return merge(heard).view(batch, n, -1)

        for block, memory in zip(self.model.blocks, self.memory, strict=True):
            states = block(states, attend, memory)
        self.past = present
        return states
