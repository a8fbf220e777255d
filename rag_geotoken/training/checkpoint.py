"""These functions keep checkpoints that resume exactly: parameters, AdamW's moments and the step, in safetensors."""

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

STATE = ("exp_avg", "exp_avg_sq", "step")  # of a parameter in AdamW


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    facts: JSON values, among them the ``identity`` of the training.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    packed = save({name: value.contiguous() for name, value in tensors.items()}, {"facts": json.dumps(facts)})
    write_whole(path, lambda beside: beside.write_bytes(packed))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str
) -> dict[str, Any] | None:
    """Load a checkpoint into model and optimizer and return its facts, or None where this training has none.

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
        shapes = {f"model.{name}": value.shape for name, value in model.state_dict().items()}
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        for i, value in enumerate(parameters):
            shapes |= {f"optimizer.{i}.{kind}": value.shape if kind != "step" else torch.Size() for kind in STATE}
        wrong = [name for name in shapes | tensors if name not in tensors or shapes.get(name) != tensors[name].shape]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors do not fit, {wrong[0]} is the first")
        model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
        moments = {i: {kind: tensors[f"optimizer.{i}.{kind}"] for kind in STATE} for i in range(len(parameters))}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GeoError(f"the checkpoint {path} is broken: {reason}; delete it to begin again") from None
    return facts
