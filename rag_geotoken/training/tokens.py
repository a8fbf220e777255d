"""Train the token model on Blue Marble views with their neighbours in the gallery."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.errors import GeoError
from rag_geotoken.index import GeoIndex
from rag_geotoken.selection import Tuning
from rag_geotoken.sources import blue_marble
from rag_geotoken.token_model import TokenConfig, TokenModel
from rag_geotoken.training.schedule import one_cycle


def train_tokens(
    alignment: GeoAlignment,
    index: GeoIndex,
    views: int,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    log: Callable[[str], None],
) -> TokenModel:
    """Train on ``views`` photos of the split ``train``, drawn with another seed than the alignment's own.

    Cross-entropy a position, its weight falling linearly from 2 (face) to 1 (last), as in GeoToken. Returns the model
    in evaluation mode. The views are no gallery photos, so no photo is its own neighbour.
    """
    if views < batch:
        raise GeoError(f"views = {views} do not fill one batch of {batch}: draw more or make it smaller")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = TokenConfig(dim=alignment.config.dim)
    tokenizer = S2Tokenizer(config.level, config.group)
    photo, rows, places = embed_views(alignment, index, views, config.neighbors, seed, log)
    target = torch.from_numpy(tokenizer.encode(places[:, 0], places[:, 1]))
    gallery_tokens = torch.from_numpy(tokenizer.encode(*index.lat_lon.T))
    gallery = torch.from_numpy(index.vectors(np.arange(index.faiss_index.ntotal))).half()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = _Loss(TokenModel(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    steps = views // batch
    schedule = one_cycle(optimizer, rate, steps * epochs)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    for epoch in range(epochs):
        order = rng.permutation(views)
        for step in range(steps):
            drawn = torch.from_numpy(order[step * batch : (step + 1) * batch])
            near = rows[drawn]
            losses = model(photo[drawn].float(), gallery[near].float(), gallery_tokens[near], target[drawn])
            position_weights = torch.linspace(2.0, 1.0, losses.numel())
            optimizer.zero_grad()
            accelerator.backward((losses * position_weights).sum() / position_weights.sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0 or step == steps - 1:
                shown = " ".join(f"{loss:.3f}" for loss in losses.tolist())
                log(f"epoch {epoch + 1} of {epochs}, step {step + 1} of {steps}: loss a position {shown}")
    trained: TokenModel = accelerator.unwrap_model(model).tokens
    return trained.eval()


def embed_views(
    alignment: GeoAlignment,
    index: GeoIndex,
    count: int,
    neighbors: int,
    seed: int,
    log: Callable[[str], None],
) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """Draw views of ``train`` -> embeddings (N, 3, dim) half, rows of their neighbours (N, K), places (N, 2)."""
    views = blue_marble.draw_views("train", count, seed)
    photo = torch.empty(count, 3, alignment.config.dim, dtype=torch.float16)
    rows = torch.empty(count, neighbors, dtype=torch.int64)
    for start in range(0, count, 4096):
        part = slice(start, min(start + 4096, count))
        vectors = alignment.embed(blue_marble.cut(views[part]))
        photo[part] = torch.from_numpy(vectors).half()
        rows[part] = torch.from_numpy(index.search(vectors, neighbors, Tuning().search_weights).rows)
        if start % (4096 * 16) == 0:
            log(f"embedded {part.stop} of {count} views")
    return photo, rows, views[:, :2]


class _Loss(nn.Module):
    """Mean cross-entropy of each position."""

    def __init__(self, tokens: TokenModel) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, photo: Tensor, neighbors: Tensor, neighbor_tokens: Tensor, target: Tensor) -> Tensor:
        memory = self.tokens.memory(photo, neighbors, neighbor_tokens)
        logits = self.tokens.logits(memory, target)
        losses = [cross_entropy(logit.float(), target[:, t]) for t, logit in enumerate(logits)]
        return torch.stack(losses)
