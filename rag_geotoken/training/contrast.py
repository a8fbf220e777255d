"""The two contrastive losses of G3 (Jia et al., NeurIPS 2024): image with GPS and image with text."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from rag_geotoken.encoders.alignment import GeoAlignment

LARGEST = math.log(100.0)  # of a logit scale, as in CLIP


def gps_loss(gps: Tensor, places: Tensor, scale: Tensor) -> Tensor:
    """Photos' gps parts (B, dim) and places (B + W, dim), of which the first B are the photos' own and W are wrong.

    Symmetric cross-entropy; photos are told from the wrong places too, but these have no photo.
    """
    logits = scale.clamp(max=LARGEST).exp() * gps @ places.T
    target = torch.arange(len(gps), device=gps.device)
    return (cross_entropy(logits, target) + cross_entropy(logits[:, : len(gps)].T, target)) / 2


def text_loss(text: Tensor, words: Tensor, names: Tensor, scale: Tensor) -> Tensor:
    """Photos' text parts and the embeddings of their texts (B, dim), names (B,) which text it is, -1 for none.

    Symmetric cross-entropy; photos of one city share its text, so each of them counts as right. A photo without text
    neither has a loss nor is wrong for others.
    """
    logits = scale.clamp(max=LARGEST).exp() * text @ words.T
    there = names >= 0
    logits = logits.masked_fill(~there[None, :], -1e4)
    same = ((names[:, None] == names[None, :]) & there[:, None]).float()
    same = same / same.sum(dim=1, keepdim=True).clamp(min=1.0)
    back = logits.T.masked_fill(~there[None, :], -1e4)
    lost = -(same * logits.log_softmax(1)).sum() - (same * back.log_softmax(1)).sum()
    return lost / (2 * there.sum().clamp(min=1))


def gathered(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Every process's values (b, ...) in one (b * processes, ...), with the gradient of this process's own."""
    if accelerator.num_processes == 1:
        return values
    everyone = list(accelerator.gather(values.detach()).chunk(accelerator.num_processes))
    everyone[accelerator.process_index] = values
    return torch.cat(everyone)


class Losses(nn.Module):
    """The two losses of a batch of photos, from all of it or from each process's part."""

    def __init__(self, alignment: GeoAlignment, accelerator: Accelerator) -> None:
        super().__init__()
        self.alignment, self.accelerator = alignment, accelerator

    def forward(
        self, photos: Tensor, places: Tensor, texts: Tensor | list[str], names: Tensor
    ) -> tuple[Tensor, Tensor]:
        """B photos, their places (B, 2) in degrees, texts and names (B,) -> gps loss, text loss.

        Photos and texts: what a frozen backbone makes of them (B, dim); or pixels (B, 64, 64, 3) and strings. One
        process alone may add wrong places behind the photos' own.
        """
        model, accelerator = self.alignment, self.accelerator
        _, gps, text = model.parts(photos) if model.frozen else model(photos)
        place, words = normalize(model.location(places).float(), dim=-1), normalize(model.text(texts).float(), dim=-1)
        world = accelerator.num_processes if self.training else 1
        if world > 1:
            gps, place, text, words, names = (gathered(accelerator, x) for x in (gps, place, text, words, names))
        with torch.autocast(gps.device.type, enabled=False):
            first = gps_loss(gps, place, _shared(model.gps_scale, world))
            second = text_loss(text, words, names, _shared(model.text_scale, world))
        # Every process has the whole loss and the gradient of its own part; the mean over all is a part too small.
        return first * world, second * world


def _shared(scale: Tensor, world: int) -> Tensor:
    """The same number with a part of its gradient: every process sees all of it."""
    return scale / world + (1 - 1 / world) * scale.detach() if world > 1 else scale
