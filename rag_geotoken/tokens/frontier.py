"""Frontier search opens the likeliest prefixes first, and what stays closed keeps its mass.

Prefix probabilities of an autoregressive model are exact, so at any moment the closed prefixes are disjoint cells,
coarse and fine, that cover the Earth and share out a mass of one: an anytime posterior.
"""

from __future__ import annotations

from typing import NamedTuple

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
    """Open ``openings`` prefixes a photo beside the root, the ``at_once`` likeliest together, for the posterior.

    memory (B, S, d_model); the cells are of the levels that the model's tokens reach.
    """
    length = len(model.vocab_sizes)
    tree = PrefixTree(model, memory)
    root = torch.zeros(len(memory), 1, dtype=torch.int64, device=memory.device)
    tokens, mass = root[..., None].expand(-1, -1, length), torch.zeros(root.shape, device=root.device)
    empty = _Prefixes(parent=root, tokens=tokens, depth=root, mass=mass)
    closed = _children(model, tree.states, root, opened=empty)
    while openings > 0:
        unfinished = closed.mass.masked_fill(closed.depth == length, -torch.inf)
        count = int(unfinished.isfinite().sum(dim=1).max())
        if not count:
            break
        best, which = unfinished.topk(min(at_once, openings, count))
        openings -= which.shape[1]
        # Where a photo has nothing left to open, a finished cell stands in: it keeps its mass and gets no children.
        finished = best.isneginf()
        opened = _Prefixes(*(pick(field, which) for field in closed))
        last = (opened.depth - 1).clamp(max=length - 2)
        node = tree.grow(opened.parent, opened.tokens.gather(-1, last[..., None])[..., 0], last)
        mass = opened.mass.masked_fill(finished, -torch.inf)
        children = _children(model, tree.states, node, opened=opened._replace(depth=last + 1, mass=mass))
        kept = closed.mass.scatter(1, which, opened.mass.masked_fill(~finished, -torch.inf))
        pairs = zip(closed._replace(mass=kept), children, strict=True)
        closed = _Prefixes(*(torch.cat(pair, dim=1) for pair in pairs))
    count = int(closed.mass.isfinite().sum(dim=1).max())
    mass, order = (values[:, :count] for values in closed.mass.sort(dim=1, descending=True))
    tokenizer = S2Tokenizer(model.config.level, model.config.group)
    levels = np.array(tokenizer.levels)[pick(closed.depth, order).cpu().numpy() - 1]
    cells = parent_ids(tokenizer.tokens_to_ids(pick(closed.tokens, order).cpu().numpy()), levels)
    return Posterior(cells, mass.exp().cpu().numpy())


class _Prefixes(NamedTuple):
    """Prefixes (B, N): the tree's node they hang from, tokens (B, N, T) with zeros behind ``depth``, log mass."""

    parent: Tensor
    tokens: Tensor
    depth: Tensor
    mass: Tensor


def _children(model: TokenModel, states: Tensor, node: Tensor, opened: _Prefixes) -> _Prefixes:
    """Return all (B, N * V) that follow opened prefixes (B, N), now nodes of the tree with these decoder states."""
    sizes = torch.tensor(model.vocab_sizes, device=states.device)
    token = torch.arange(int(sizes.max()), device=states.device)
    logits = torch.cat([layer(states) for layer in model.output_layers], dim=-1).float()
    column = (model.offsets[opened.depth][..., None] + token).clamp(max=logits.shape[-1] - 1)
    valid = token < sizes[opened.depth][..., None]
    log_prob = logits.gather(-1, column).masked_fill(~valid, -torch.inf).log_softmax(-1)
    shape = (*node.shape, len(token))
    depth = opened.depth[..., None].expand(shape)
    # A token beyond the vocabulary has no mass; any valid one stands in for it.
    tokens = opened.tokens[:, :, None].expand(*shape, -1).scatter(-1, depth[..., None], (token * valid)[..., None])
    children = node[..., None].expand(shape), tokens, depth + 1, opened.mass[..., None] + log_prob
    return _Prefixes(*(field.flatten(1, 2) for field in children))
