"""These are the two contrastive losses of G3 (Jia et al., NeurIPS 2024): image with GPS and image with text."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from rag_geotoken.encoders.alignment import GeoAlignment

MAX_LOG_SCALE = math.log(100.0)  # as in CLIP


def gps_loss(gps: Tensor, places: Tensor, log_scale: Tensor) -> Tensor:
    """Return the symmetric cross-entropy between photos' gps parts (B, dim) and places (B + W, dim).

    The first B places belong to the photos. The W behind them are negatives of every photo, and have no photo.
    """
    logits = log_scale.clamp(max=MAX_LOG_SCALE).exp() * gps @ places.T
    target = torch.arange(len(gps), device=gps.device)
    return (cross_entropy(logits, target) + cross_entropy(logits[:, : len(gps)].T, target)) / 2


def text_loss(text: Tensor, words: Tensor, text_of: Tensor, log_scale: Tensor) -> Tensor:
    """Return the symmetric cross-entropy between photos' text parts and the embeddings of their texts, both (B, dim).

    text_of (B,): which text each photo has, -1 for none. Photos of one city share its text, so each of them counts as
    right. A photo without text neither has a loss nor is a negative.
    """
    logits = log_scale.clamp(max=MAX_LOG_SCALE).exp() * text @ words.T
    mask = text_of >= 0
    logits = logits.masked_fill(~mask[None, :], -1e4)
    target = ((text_of[:, None] == text_of[None, :]) & mask[:, None]).float()
    target = target / target.sum(dim=1, keepdim=True).clamp(min=1.0)
    transposed = logits.T.masked_fill(~mask[None, :], -1e4)
    total = -(target * logits.log_softmax(1)).sum() - (target * transposed.log_softmax(1)).sum()
    return total / (2 * mask.sum().clamp(min=1))


class Losses(nn.Module):
    """This module computes the two losses of a batch of photos, all of it or one process's part."""

    def __init__(self, alignment: GeoAlignment, accelerator: Accelerator) -> None:
        super().__init__()
        self.alignment, self.accelerator = alignment, accelerator

    def forward(
        self, photos: Tensor, places: Tensor, texts: Tensor | list[str], text_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gps loss and the text loss of B photos.

        Args:
            photos: A frozen backbone's embeddings (B, dim), or pixels (B, 64, 64, 3).
            places: Degrees (B, 2); a single process may add negatives behind those of the photos.
            texts: A frozen backbone's embeddings (B, dim), or strings.
            text_of: See :func:`text_loss` (B,).
        """
        model = self.alignment
        _, gps, text = model.parts(photos) if model.frozen else model(photos)
        place, words = normalize(model.location(places).float(), dim=-1), normalize(model.text(texts).float(), dim=-1)
        world = self.accelerator.num_processes if self.training else 1
        scales: list[Tensor] = [model.gps_scale, model.text_scale]
        if world > 1:
            gps, place, text, words, text_of = map(self._gather, (gps, place, text, words, text_of))
            # Every process uses the whole scale: each has its part of the gradient.
            scales = [scale / world + (1 - 1 / world) * scale.detach() for scale in scales]
        with torch.autocast(gps.device.type, enabled=False):
            losses = gps_loss(gps, place, scales[0]), text_loss(text, words, text_of, scales[1])
        # Each process has the gradient of its part alone, and the mean over all divides by their number.
        return losses[0] * world, losses[1] * world

    def _gather(self, values: Tensor) -> Tensor:
        """Join all processes' values (b, ...) to (b * processes, ...); only this process's part has a gradient."""
        parts = list(self.accelerator.gather(values.detach()).chunk(self.accelerator.num_processes))
        parts[self.accelerator.process_index] = values
        return torch.cat(parts)
