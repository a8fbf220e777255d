"""These functions run the steps of a training: what they draw, their learning rate, and what is kept at checks."""

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
    """This class says where the best weights and the checkpoint lie, and what tells this training apart."""

    weights: Path
    checkpoint: Path
    identity: str


def run_steps(
    accelerator: Accelerator,
    module: nn.Module,
    schedule: LRScheduler,
    *,
    steps: int,
    checks: int,
    loss: Callable[[nn.Module, int], Tensor],
    check: Callable[[], tuple[float, str]],
    save: Callable[[], None],
    kept: Kept,
    log: Log,
) -> None:
    """Train a module by gradient descent on ``loss(model, step)``, the gradient (all processes' mean) cut to length 1.

    At each of so many evenly spaced checks ``check`` returns the validation loss and a line to log; ``save`` is called
    if the loss is the lowest so far. What a step draws must follow from its number, not from what came before: then a
    training that was stopped anywhere goes on from its last check and ends, with as many processes, in the same weights
    as one that ran through. ``schedule``: the learning rates of the module's optimizer, from the first step on. Raises
    GeoError when the validation loss is not finite.
    """
    model, optimizer = accelerator.prepare(module, schedule.optimizer)
    facts: dict[str, Any] = {"identity": kept.identity, "step": 0, "best": None}
    if kept.weights.is_file():  # the best weights are part of what is resumed
        facts = load_checkpoint(kept.checkpoint, module, schedule.optimizer, kept.identity) or facts
    with warnings.catch_warnings(action="ignore"):  # torch expects a step of the optimizer before each of these
        for _ in range(facts["step"]):
            schedule.step()
    check_steps = {round(steps * (i + 1) / checks) for i in range(checks)}
    for step in range(facts["step"], steps):
        value = loss(model.train(), step)
        optimizer.zero_grad()
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step + 1 not in check_steps:
            continue
        validation, line = check()
        if not math.isfinite(validation):
            raise GeoError(f"the validation loss is {validation} at step {step + 1}: train with a lower rate")
        better = facts["best"] is None or validation < facts["best"]
        facts = facts | {"step": step + 1, "best": validation if better else facts["best"]}
        if accelerator.is_main_process:
            if better:
                save()
            save_checkpoint(kept.checkpoint, module, schedule.optimizer, facts)
            log(f"step {step + 1} of {steps}: {line}")
    accelerator.wait_for_everyone()


def one_cycle(optimizer: Optimizer, rate: float, steps: int) -> OneCycleLR:
    """Return a schedule that rises to ``rate`` in the first twentieth of the steps and falls along a cosine."""
    # OneCycleLR divides by the length of the rise less one step, so a rise of exactly one step must be longer.
    return OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1 if steps == 20 else 0.05)


def batch_of(step: int, photos: int, batch: int, seed: int) -> NDArray[np.int64]:
    """Return the photos (batch,) of a step; the order of an epoch follows from the seed and the epoch's number."""
    epoch, number = divmod(step, photos // batch)
    return _order(photos, seed, epoch)[number * batch : (number + 1) * batch]


@lru_cache(maxsize=1)
def _order(photos: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(photos)
