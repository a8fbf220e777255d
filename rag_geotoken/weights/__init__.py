"""Trained weights that travel with the package, and how weights are written and read: JSON beside safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rag_geotoken.errors import GeoError
from rag_geotoken.files import read_json, write_json, write_whole

EARTH = Path(__file__).parent / "earth"
Model = TypeVar("Model", bound=nn.Module)


def save_weights(model: nn.Module, config: dict[str, Any], folder: Path, name: str, half: bool) -> None:
    """Write ``NAME.json`` and ``NAME.safetensors``: parameters in half precision if asked, buffers as they are."""
    from safetensors.torch import save

    parameters = {key for key, _ in model.named_parameters()} if half else set()
    tensors = {key: value.half() if key in parameters else value for key, value in model.state_dict().items()}
    packed = save({key: value.contiguous() for key, value in tensors.items()})
    write_whole(folder / f"{name}.safetensors", lambda beside: beside.write_bytes(packed))
    write_json(folder / f"{name}.json", config)


def fingerprint(*models: nn.Module) -> str:
    """64 hexadecimal digits that follow from the models' tensors and their names."""
    digest = hashlib.sha256()
    for name, value in (pair for model in models for pair in model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: type[Model], config: type[Any], folder: Path, name: str) -> Model:
    """Build ``model(config(**NAME.json))`` and fill it from ``NAME.safetensors``, in evaluation mode.

    Raises GeoError when a file is missing or broken, or when its tensors are not the model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"{name}.safetensors"
    settings = read_json(folder / f"{name}.json")
    try:
        with torch.random.fork_rng(devices=[]):
            built = model(config(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}))
        tensors = {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
        built.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GeoError(f"{path.name} in {folder.name} cannot be used as {model.__name__} weights: {reason}") from None
    return built.eval()
