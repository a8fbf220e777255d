"""These functions set up processes: bf16, a GPU if the machine has one, one process or those that torchrun started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from rag_geotoken.errors import GeoError


def world_size() -> int:
    """Return how many processes torchrun or accelerate launch started together; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_accelerator(cpu: bool = False) -> Accelerator:
    """Return this process's accelerator; all processes of a group must call this alike.

    bf16 unless ``accelerate launch --mixed_precision no`` asks for float32. Several processes without a GPU share the
    CPUs. Raises GeoError for another precision: a checkpoint here keeps no loss scale, so it could not resume exactly.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "bf16")
    if precision not in ("bf16", "no"):
        raise GeoError(f"training in {precision} cannot resume exactly: choose --mixed_precision bf16 or no")
    cpu = cpu or (world_size() > 1 and not torch.cuda.is_available())
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=1))  # while the first process encodes the photos
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[timeout])
