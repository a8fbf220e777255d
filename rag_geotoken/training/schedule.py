"""The learning rate over a training."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR


def one_cycle(optimizer: Optimizer, rate: float, steps: int) -> OneCycleLR:
    """Up to ``rate`` in the first twentieth of the steps, then down to nothing along a cosine."""
    # OneCycleLR divides by the length of the rise less one step, so a rise of exactly one step must be longer.
    return OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1 if steps == 20 else 0.05)
