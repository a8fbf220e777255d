"""The steps of a training, with checks at which the best weights and a checkpoint are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from rag_geotoken.errors import GeoError
from rag_geotoken.training.checkpoint import load_checkpoint, save_checkpoint
from rag_geotoken.training.processes import descend

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
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], LRScheduler],
    steps: int,
    checks: Collection[int],
    loss: Callable[[nn.Module, int], Tensor],
    look: Callable[[], tuple[float, str]],
    save: Callable[[], None],
    kept: Kept,
    log: Log,
) -> None:
    """Descend ``loss(model, step)`` step by step; at a check keep the weights if ``look`` is less than ever before.

    What a step draws must follow from its number, not from what came before: then a training that was stopped anywhere
    goes on from its last check and ends, with as many processes, in the same weights as one that ran through.
    ``look`` gives a number and a line, ``schedule(done)`` the learning rates from a step on. Raises GeoError when the
    number is not finite.
    """
    model, prepared = accelerator.prepare(module, optimizer)
    facts: dict[str, Any] = {"identity": kept.identity, "step": 0, "best": None}
    if kept.weights.is_file():  # the best so far; without them it begins anew
        facts = load_checkpoint(kept.checkpoint, module, optimizer, kept.identity) or facts
    rates = schedule(facts["step"])
    for step in range(facts["step"], steps):
        descend(accelerator, loss(model.train(), step), model, prepared, rates)
        if step + 1 not in checks:
            continue
        value, line = look()
        if not math.isfinite(value):
            raise GeoError(f"the validation loss is {value} at step {step + 1}: train with a lower rate")
        better = facts["best"] is None or value < facts["best"]
        facts = facts | {"step": step + 1, "best": value if better else facts["best"]}
        if accelerator.is_main_process:
            if better:
                save()
            save_checkpoint(kept.checkpoint, module, optimizer, facts)
            log(f"step {step + 1} of {steps}: {line}")
    accelerator.wait_for_everyone()
