"""Train the Geo-alignment on satellite views, drawn afresh at every step from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.geo import Floats, destination
from rag_geotoken.places import place_text
from rag_geotoken.sources import view_source
from rag_geotoken.training.contrast import gps_loss, text_loss
from rag_geotoken.training.loop import Kept, Log, run_steps
from rag_geotoken.training.processes import make_accelerator
from rag_geotoken.training.schedule import one_cycle

CHECKS = 36  # weights and a checkpoint are kept so often
NEARBY = 3  # wrong places near the right one, a photo: they make the embedding sharp below the batch's spacing
TEXT_WEIGHT = 0.2
Unseen = Callable[[Floats, Floats], NDArray[np.bool_]]


def train_alignment(
    out: Path, identity: str, *, source: str, steps: int, batch: int, rate: float, seed: int, log: Log
) -> GeoAlignment:
    """Train from nothing on ``steps * batch`` views of a source, write the weights into ``out`` -> them.

    No view lies in a cell kept for ``unseen``, and no test or validation photo is drawn. AdamW, one cosine cycle.
    ``OUT-alignment-checkpoint.safetensors`` lets a stopped training with the same identity go on, to the same weights.
    """
    torch.manual_seed(seed)
    views_of, split = view_source(source)
    views = views_of.draw_views(split, steps * batch, seed)
    model = _Losses(GeoAlignment()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    adam = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    draws = enumerate(_draws(views, batch, np.random.default_rng(seed), views_of.is_unseen))
    last: dict[str, float] = {}

    def loss(model: nn.Module, step: int) -> Tensor:
        drawn, wrong = next(
            draw for at, draw in draws if at == step
        )  # what is behind a resumed training is drawn again
        pixels, places = torch.from_numpy(views_of.cut(drawn)), drawn[:, :2]
        texts = place_text(places[:, 0], places[:, 1])
        gps, text = model(pixels, torch.from_numpy(places), torch.from_numpy(wrong), texts)
        last.update(step=step, gps=gps.item(), text=text.item())
        total: Tensor = gps + TEXT_WEIGHT * text
        return total

    def look() -> tuple[float, str]:
        # The latest weights are the best: the cycle ends low, and views drawn afresh need no validation.
        return -last["step"], f"gps loss {last['gps']:.3f}, text loss {last['text']:.3f}"

    run_steps(
        make_accelerator(cpu=True),
        model,
        adam,
        lambda done: one_cycle(adam, rate, steps, done),
        steps,
        {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)},
        loss,
        look,
        lambda: model.alignment.save_pretrained(out, half=True),
        Kept(out / "alignment.safetensors", out.with_name(f"{out.name}-alignment-checkpoint.safetensors"), identity),
        log,
    )
    return GeoAlignment.from_pretrained(out)


def _draws(views: Floats, batch: int, rng: np.random.Generator, unseen: Unseen) -> Iterator[tuple[Floats, Floats]]:
    """The views (batch, 5) of each step, and wrong places near them (batch * NEARBY, 2)."""
    for start in range(0, len(views), batch):
        drawn = views[start : start + batch]
        yield drawn, nearby_places(drawn[:, :2], NEARBY, rng, unseen)


def nearby_places(places: Floats, count: int, rng: np.random.Generator, unseen: Unseen) -> Floats:
    """Places (N, 2) -> (N * count, 2): log-uniformly 10 to 1,000 km away, none in a cell kept for ``unseen``.

    One that falls into such a cell is replaced by another, so that nothing is ever taught about these cells.
    """
    lat, lon = np.repeat(places, count, axis=0).T
    distance = np.exp(rng.uniform(math.log(10.0), math.log(1000.0), lat.size))
    there = np.column_stack(destination(lat, lon, rng.uniform(0.0, 360.0, lat.size), distance))
    allowed = np.flatnonzero(~unseen(there[:, 0], there[:, 1]))
    return there[np.where(np.isin(np.arange(lat.size), allowed), np.arange(lat.size), rng.choice(allowed, lat.size))]


class _Losses(nn.Module):
    """The two contrastive losses on views."""

    def __init__(self, alignment: GeoAlignment) -> None:
        super().__init__()
        self.alignment = alignment

    def forward(self, pixels: Tensor, places: Tensor, wrong: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Views (B, 64, 64, 3), their places (B, 2), wrong ones (W, 2), B texts -> gps loss, text loss."""
        model = self.alignment
        _, gps, text = model(pixels)
        place = normalize(model.location(torch.cat([places, wrong])).float(), dim=-1)
        words = normalize(model.text(texts).float(), dim=-1)
        names = torch.from_numpy(np.unique(texts, return_inverse=True)[1]).to(gps.device)
        with torch.autocast("cpu", enabled=False):
            return gps_loss(gps, place, model.gps_scale), text_loss(text, words, names, model.text_scale)
