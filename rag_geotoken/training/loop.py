"""The steps of a training: what they draw, how fast they learn, and when the best weights and a checkpoint are kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from rag_geotoken.errors import GeoError
from rag_geotoken.training.checkpoint import load_checkpoint, save_checkpoint

Log = Callable[[str], None]


@dataclass(frozen=True)
class Kept:
    """Where a training keeps what it has: the best weights' file, a checkpoint, and what tells this training apart."""

    weights: Path
    checkpoint: Path
    identity: str


def run_steps(
    accelerator: Accelerator,
    module: nn.Module,
    schedule: LRScheduler,
    steps: int,
    checks: int,
    loss: Callable[[nn.Module, int], Tensor],
    look: Callable[[], tuple[float, str]],
    save: Callable[[], None],
    kept: Kept,
    log: Log,
) -> None:
    """Descend ``loss(model, step)`` step by step, its gradient (the mean of all processes') cut to length one.

    At each of so many checks ``look`` gives a number and a line; the weights are kept if it is less than ever before.
    What a step draws must follow from its number, not from what came before: then a training that was stopped anywhere
    goes on from its last check and ends, with as many processes, in the same weights as one that ran through.
    ``schedule``: the learning rates of the module's optimizer, from the first step on. Raises GeoError when the number
    is not finite.
    """
    model, optimizer = accelerator.prepare(module, schedule.optimizer)
    facts: dict[str, Any] = {"identity": kept.identity, "step": 0, "best": None}
    if kept.weights.is_file():  # the best so far; without them it begins anew
        facts = load_checkpoint(kept.checkpoint, module, schedule.optimizer, kept.identity) or facts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects a step of the optimizer before each of these
        for _ in range(facts["step"]):
            schedule.step()
    looks = {round(steps * (i + 1) / checks) for i in range(checks)}
    for step in range(facts["step"], steps):
        found = loss(model.train(), step)
        optimizer.zero_grad()
        accelerator.backward(found)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step + 1 not in looks:
            continue
        value, line = look()
        if not math.isfinite(value):
            raise GeoError(f"the validation loss is {value} at step {step + 1}: train with a lower rate")
        better = facts["best"] is None or value < facts["best"]
        facts = facts | {"step": step + 1, "best": value if better else facts["best"]}
        if accelerator.is_main_process:
            if better:
                save()
            save_checkpoint(kept.checkpoint, module, schedule.optimizer, facts)
            log(f"step {step + 1} of {steps}: {line}")
    accelerator.wait_for_everyone()


def one_cycle(optimizer: Optimizer, rate: float, steps: int) -> OneCycleLR:
    """Up to ``rate`` in the first twentieth of the steps, then down to nothing along a cosine."""
    # OneCycleLR divides by the length of the rise less one step, so a rise of exactly one step must be longer.
    return OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1 if steps == 20 else 0.05)


def batch_of(step: int, photos: int, batch: int, seed: int) -> NDArray[np.int64]:
    """The photos (batch,) of a step; every epoch goes through them in an order that follows from the seed and it."""
    epoch, at = divmod(step, photos // batch)
    return _order(photos, seed, epoch)[at * batch : (at + 1) * batch]


@lru_cache(maxsize=1)
def _order(photos: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(photos)
