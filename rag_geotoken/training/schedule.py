"""What a training draws at a step, and how fast it learns then."""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
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


def batch_of(step: int, photos: int, batch: int, seed: int) -> NDArray[np.int64]:
    """The photos (batch,) of a step; every epoch goes through them in an order that follows from the seed and it."""
    epoch, at = divmod(step, photos // batch)
    return _order(photos, seed, epoch)[at * batch : (at + 1) * batch]


@lru_cache(maxsize=1)
def _order(photos: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(photos)
