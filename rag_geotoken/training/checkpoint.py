"""Checkpoints that resume exactly: parameters, AdamW's moments and the step, in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import write_whole

KINDS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all. ``facts``: JSON values, among them what tells this training apart."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    packed = save({name: value.contiguous() for name, value in tensors.items()}, {"facts": json.dumps(facts)})
    write_whole(path, lambda beside: beside.write_bytes(packed))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str
) -> dict[str, Any] | None:
    """Fill model and optimizer -> the facts; None where there is no checkpoint of a training with this identity.

    Raises GeoError for a file that is broken or holds other tensors than this model's and AdamW's.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
            if facts["identity"] != identity:
                return None
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        wanted = {f"model.{name}": value.shape for name, value in model.state_dict().items()}
        for i, value in enumerate(parameters):
            shapes = value.shape, value.shape, torch.Size([])
            wanted |= {f"optimizer.{i}.{kind}": shape for kind, shape in zip(KINDS, shapes, strict=True)}
        wrong = [name for name in wanted | tensors if name not in tensors or wanted.get(name) != tensors[name].shape]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors do not fit, {wrong[0]} is the first")
        model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
        moments = {i: {kind: tensors[f"optimizer.{i}.{kind}"] for kind in KINDS} for i in range(len(parameters))}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GeoError(f"the checkpoint {path} is broken: {reason}; delete it to begin again") from None
    return facts
