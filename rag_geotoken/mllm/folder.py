"""A multimodal model's folder: found or downloaded, and told apart from others by its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rag_geotoken.errors import GeoError
from rag_geotoken.files import file_sha256

WEIGHTS = "model*.safetensors"
FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", WEIGHTS)  # what is fetched from a hub and used: no pickles


def find_model(name: str | Path) -> Path:
    """The folder of that name, or a hub's snapshot, downloaded the first time.

    Raises GeoError when there is none, or it holds no weights in safetensors.
    """
    from rag_geotoken.encoders.shared import find_folder

    folder = find_folder(str(name), FILES, [WEIGHTS], "--mllm DIR")
    if not (folder / "config.json").is_file() or not any(folder.glob(WEIGHTS)):
        raise GeoError(f"{folder} holds no multimodal model: it needs config.json and model.safetensors")
    return folder


def model_identity(folder: Path) -> str:
    """The folder's name and twelve hexadecimal digits of SHA-256 over all that answers follow from."""
    paths = sorted({path for pattern in FILES for path in folder.glob(pattern)})
    told = "".join(f"{path.name} {file_sha256(path)}\n" for path in paths)
    return f"{folder.resolve().name}@{hashlib.sha256(told.encode()).hexdigest()[:12]}"
