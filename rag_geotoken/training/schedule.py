"""The learning rate over a training."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR


def one_cycle(optimizer: Optimizer, rate: float, steps: int, done: int = 0) -> OneCycleLR:
    """Up to ``rate`` in the first twentieth of the steps, then down to nothing along a cosine; ``done`` are behind."""
    # OneCycleLR divides by the length of the rise less one step, so a rise of exactly one step must be longer.
    schedule = OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1 if steps == 20 else 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects a step of the optimizer before each of these
        for _ in range(done):
            schedule.step()
    return schedule
