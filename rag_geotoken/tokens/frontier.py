"""Frontier search: the likeliest prefixes are opened first, and what stays closed keeps its mass.

Prefix probabilities of an autoregressive model are exact, so at any moment the closed prefixes are disjoint cells,
coarse and fine, that cover the Earth and share out a mass of one: an anytime posterior.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rag_geotoken.geo.cells import S2Tokenizer, parent_ids
from rag_geotoken.tokens.decoding import pick
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.tokens.prefix_tree import PrefixTree
from rag_geotoken.types import Posterior


@torch.inference_mode()
def frontier(model: TokenModel, memory: Tensor, openings: int = 64, at_once: int = 8) -> Posterior:
    """Open ``openings`` prefixes a photo beside the root, the ``at_once`` likeliest together -> the posterior.

    memory (B, S, d_model); the cells are of the levels that the model's tokens reach.
    """
    batch, length = len(memory), len(model.vocab_sizes)
    tree = PrefixTree(model, memory)
    root = torch.zeros(batch, 1, dtype=torch.int64, device=memory.device)
    whole = torch.zeros(batch, 1, device=memory.device)
    closed = _children(model, tree.states, root, _Prefixes(root, root[..., None].expand(-1, -1, length), root, whole))
    while openings > 0:
        likely = closed.mass.masked_fill(closed.depth == length, -torch.inf)
        ready = int(likely.isfinite().sum(dim=1).max())
        if not ready:
            break
        best, which = likely.topk(min(at_once, openings, ready))
        openings -= which.shape[1]
        # Where a photo has nothing left to open, a finished cell stands in: it keeps its mass and gets no children.
        finished = best.isneginf()
        opened = closed.pick(which)
        at = (opened.depth - 1).clamp(max=length - 2)
        node = tree.grow(opened.parent, opened.tokens.gather(-1, at[..., None])[..., 0], at)
        within = opened.mass.masked_fill(finished, -torch.inf)
        found = _children(model, tree.states, node, _Prefixes(opened.parent, opened.tokens, at + 1, within))
        left = closed.mass.scatter(1, which, opened.mass.masked_fill(~finished, -torch.inf))
        closed = _Prefixes(closed.parent, closed.tokens, closed.depth, left).join(found)
    kept = int(closed.mass.isfinite().sum(dim=1).max())
    mass, order = closed.mass.sort(dim=1, descending=True)
    closed = closed.pick(order[:, :kept])
    tokenizer = S2Tokenizer(model.config.level, model.config.group)
    levels = np.array(tokenizer.levels)[closed.depth.cpu().numpy() - 1]
    cells = parent_ids(tokenizer.tokens_to_ids(closed.tokens.cpu().numpy()), levels)
    return Posterior(cells, mass[:, :kept].exp().cpu().numpy())


@dataclass(frozen=True)
class _Prefixes:
    """Prefixes (B, N) of ``depth`` tokens (B, N, T), zeros behind them: the tree's node they hang from, log mass."""

    parent: Tensor
    tokens: Tensor
    depth: Tensor
    mass: Tensor

    def pick(self, order: Tensor) -> _Prefixes:
        return _Prefixes(*(pick(x, order) for x in (self.parent, self.tokens, self.depth, self.mass)))

    def join(self, other: _Prefixes) -> _Prefixes:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Prefixes(*(torch.cat(pair, dim=1) for pair in pairs))


def _children(model: TokenModel, states: Tensor, node: Tensor, opened: _Prefixes) -> _Prefixes:
    """All that follow opened prefixes (B, N), now nodes of the tree with decoder states -> (B, N * V)."""
    sizes = torch.tensor(model.vocab_sizes, device=states.device)
    token = torch.arange(int(sizes.max()), device=states.device)
    every = torch.cat([layer(states) for layer in model.output_layers], dim=-1).float()
    column = (model.offsets[opened.depth][..., None] + token).clamp(max=every.shape[-1] - 1)
    known = token < sizes[opened.depth][..., None]
    chances = every.gather(-1, column).masked_fill(~known, -torch.inf).log_softmax(-1)
    shape = (*node.shape, len(token))
    tokens = opened.tokens[:, :, None].expand(*shape, -1)
    at = opened.depth[..., None, None].expand(*shape, 1)
    # A token beyond the vocabulary has no mass; any valid one stands in for it.
    tokens = tokens.scatter(-1, at, (token * known)[..., None])
    deeper, mass = opened.depth[..., None].expand(shape) + 1, opened.mass[..., None] + chances
    return _Prefixes(*(x.flatten(1, 2) for x in (node[..., None].expand(shape), tokens, deeper, mass)))
