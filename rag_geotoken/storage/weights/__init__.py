"""This package ships trained weights and reads and writes such files: JSON beside safetensors."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import read_json, write_json, write_whole

EARTH = Path(__file__).parent / "earth"


class Pretrained(nn.Module):
    """This class is a model that a folder keeps as ``FILE.json``, its ``config``, and ``FILE.safetensors``."""

    file: ClassVar[str]
    config_type: ClassVar[type[Any]]
    config: Any

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read both files of a folder into a model in evaluation mode.

        Raises GeoError when a file is missing or broken, or when its tensors are not the model's.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        path = folder / f"{cls.file}.safetensors"
        settings = read_json(folder / f"{cls.file}.json")
        try:
            config = cls.config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
            with torch.random.fork_rng(devices=[]):
                model = cls(config)
            tensors = load_file(path)
            model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
        except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise GeoError(f"{path.name} in {folder.name} cannot be used as {cls.__name__} weights: {reason}") from None
        return model.eval()

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write both files, the parameters in half precision if ``half``, the buffers as they are."""
        from safetensors.torch import save

        parameters = {key for key, _ in self.named_parameters()} if half else set()
        tensors = {key: value.half() if key in parameters else value for key, value in self.state_dict().items()}
        packed = save({key: value.contiguous() for key, value in tensors.items()})
        write_whole(Path(folder) / f"{self.file}.safetensors", lambda path: path.write_bytes(packed))
        write_json(Path(folder) / f"{self.file}.json", asdict(self.config))


def fingerprint(*models: nn.Module) -> str:
    """Return 64 hexadecimal digits that follow from the models' tensors and their names."""
    digest = hashlib.sha256()
    for name, value in (pair for model in models for pair in model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
