"""The two contrastive losses of G3 (Jia et al., NeurIPS 2024): image with GPS and image with text."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

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
