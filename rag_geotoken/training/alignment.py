"""Train the Geo-alignment on Blue Marble views, drawn afresh at every step from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.geo import destination
from rag_geotoken.places import place_text
from rag_geotoken.sources import blue_marble
from rag_geotoken.training.processes import descend, make_accelerator
from rag_geotoken.training.schedule import one_cycle

NEARBY = 3  # wrong places near the right one, a photo: they make the embedding sharp below the batch's spacing
TEXT_WEIGHT = 0.2


def train_alignment(steps: int, batch: int, rate: float, seed: int, log: Callable[[str], None]) -> GeoAlignment:
    """Train from nothing on ``steps * batch`` views of the split ``train`` -> the model in evaluation mode.

    No view lies in a cell kept for ``unseen``, and no test or validation photo is drawn. AdamW, one cosine cycle.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    views = blue_marble.draw_views("train", steps * batch, seed)
    accelerator = make_accelerator(cpu=True)
    model = _Losses(GeoAlignment()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = one_cycle(optimizer, rate, steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    for step in range(steps):
        drawn = views[step * batch : (step + 1) * batch]
        places = drawn[:, :2]
        wrong = nearby_places(places, NEARBY, rng)
        pixels = torch.from_numpy(blue_marble.cut(drawn))
        texts = place_text(places[:, 0], places[:, 1])
        loss, gps_loss, text_loss = model(pixels, torch.from_numpy(places), torch.from_numpy(wrong), texts)
        descend(accelerator, loss, model, optimizer, schedule)
        if step % 50 == 0 or step == steps - 1:
            log(f"step {step + 1} of {steps}: gps loss {gps_loss.item():.3f}, text loss {text_loss.item():.3f}")
    trained: GeoAlignment = accelerator.unwrap_model(model).alignment
    return trained.eval()


def nearby_places(places: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Places (N, 2) -> (N * count, 2): log-uniformly 10 to 1,000 km away, none in a cell kept for ``unseen``.

    One that falls into such a cell is replaced by another, so that nothing is ever taught about these cells.
    """
    lat, lon = np.repeat(places, count, axis=0).T
    distance = np.exp(rng.uniform(math.log(10.0), math.log(1000.0), lat.size))
    there = np.column_stack(destination(lat, lon, rng.uniform(0.0, 360.0, lat.size), distance))
    allowed = np.flatnonzero(~blue_marble.is_unseen(there[:, 0], there[:, 1]))
    return there[np.where(np.isin(np.arange(lat.size), allowed), np.arange(lat.size), rng.choice(allowed, lat.size))]


class _Losses(nn.Module):
    """The two symmetric contrastive losses of G3: image with GPS and image with text."""

    def __init__(self, alignment: GeoAlignment) -> None:
        super().__init__()
        self.alignment = alignment

    def forward(self, pixels: Tensor, places: Tensor, wrong: Tensor, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        model = self.alignment
        _, gps, text = model(pixels)
        place = normalize(model.location(torch.cat([places, wrong])).float(), dim=-1)
        words = normalize(model.text(texts).float(), dim=-1)
        with torch.autocast("cpu", enabled=False):
            logits = model.gps_scale.clamp(max=math.log(100.0)).exp() * gps @ place.T
            target = torch.arange(len(gps), device=gps.device)
            gps_loss = (cross_entropy(logits, target) + cross_entropy(logits[:, : len(gps)].T, target)) / 2
            logits = model.text_scale.clamp(max=math.log(100.0)).exp() * text @ words.T
            # Photos of one city share its text: each counts as right.
            names = torch.from_numpy(np.unique(texts, return_inverse=True)[1]).to(gps.device)
            same = (names[:, None] == names[None, :]).float()
            same = same / same.sum(dim=1, keepdim=True)
            text_loss = (cross_entropy(logits, same) + cross_entropy(logits.T, same)) / 2
        return gps_loss + TEXT_WEIGHT * text_loss, gps_loss, text_loss
