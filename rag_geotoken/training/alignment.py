"""These functions train the Geo-alignment on satellite views, drawn afresh at every step from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.geo.gazetteer import place_text
from rag_geotoken.geo.sphere import Floats, destination
from rag_geotoken.photos.sources import view_source
from rag_geotoken.training.contrast import Losses
from rag_geotoken.training.loop import Kept, Log, one_cycle, run_steps
from rag_geotoken.training.processes import make_accelerator
from rag_geotoken.training.setup import Setup

CHECKS = 36  # weights and a checkpoint are kept so often
NEGATIVES = 3  # wrong places near the right one, a photo: they make the embedding sharp below the batch's spacing
TEXT_WEIGHT = 0.2


def train(setup: Setup) -> None:
    """Train the alignment with a recipe's settings."""
    train_alignment(setup.out, setup.identity(), **setup.settings, log=setup.log)


def train_alignment(
    out: Path, identity: str, *, source: str, steps: int, batch: int, rate: float, seed: int, log: Log
) -> None:
    """Train an alignment from random weights on ``steps * batch`` views of a source and write it into ``out``.

    No view lies in a cell kept for ``unseen``, and no test or validation photo is drawn. AdamW, one cosine cycle.
    ``OUT-alignment-checkpoint.safetensors`` lets a stopped training with the same identity go on, to the same weights.
    """
    torch.manual_seed(seed)
    earth, split = view_source(source)
    views = earth.draw_views(split, steps * batch, seed).reshape(steps, batch, -1)
    rng = np.random.default_rng(seed)
    negatives = [nearby_places(drawn[:, :2], rng, earth.is_unseen) for drawn in views]
    accelerator = make_accelerator(cpu=True)
    losses = Losses(GeoAlignment(), accelerator).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    adam = torch.optim.AdamW(losses.parameters(), lr=rate, weight_decay=0.02)
    last: dict[str, float] = {}

    def loss(model: nn.Module, step: int) -> Tensor:
        lat_lon = views[step, :, :2]
        pixels, places = earth.cut(views[step]), np.concatenate([lat_lon, negatives[step]])
        texts = place_text(*lat_lon.T)
        text_of = np.unique(texts, return_inverse=True)[1]
        gps, text = model(torch.from_numpy(pixels), torch.from_numpy(places), texts, torch.from_numpy(text_of))
        last.update(step=step, gps=gps.item(), text=text.item())
        total: Tensor = gps + TEXT_WEIGHT * text
        return total

    def check() -> tuple[float, str]:
        # The latest weights are the best: the cycle ends low, and views drawn afresh need no validation.
        return -last["step"], f"gps loss {last['gps']:.3f}, text loss {last['text']:.3f}"

    save = partial(losses.alignment.save_pretrained, out, half=True)
    kept = Kept(out / "alignment.safetensors", out.with_name(f"{out.name}-alignment-checkpoint.safetensors"), identity)
    run_steps(accelerator, losses, one_cycle(adam, rate, steps), steps=steps, checks=CHECKS, loss=loss, check=check,
              save=save, kept=kept, log=log)  # fmt: skip


def nearby_places(
    places: Floats, rng: np.random.Generator, unseen: Callable[[Floats, Floats], NDArray[np.bool_]]
) -> Floats:
    """Draw places (N * NEGATIVES, 2) near places (N, 2): log-uniformly 10 to 1,000 km away, none kept for ``unseen``.

    One in such a cell is replaced by another of the places drawn, so that nothing is ever taught about these cells.
    """
    lat, lon = np.repeat(places, NEGATIVES, axis=0).T
    distance = np.exp(rng.uniform(math.log(10.0), math.log(1000.0), lat.size))
    nearby = np.column_stack(destination(lat, lon, rng.uniform(0.0, 360.0, lat.size), distance))
    hidden = unseen(nearby[:, 0], nearby[:, 1])
    substitutes = rng.choice(np.flatnonzero(~hidden), lat.size)
    return nearby[np.where(hidden, substitutes, np.arange(lat.size))]
