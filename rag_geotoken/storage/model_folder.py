"""These functions find the folder of a pretrained model, or download it from a hub, and identify it by its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import file_sha256

WEIGHTS = "model*.safetensors"
ANSWER_S = 10.0  # the hub's first answer; without a limit, a network that drops packets blocks for minutes
FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", WEIGHTS)  # what is fetched from a hub and used: no pickles


def find_model(name: str | Path) -> Path:
    """Return the folder of a multimodal model, see :func:`find_folder`; GeoError when it has no safetensors weights."""
    folder = find_folder(str(name), FILES, [WEIGHTS], option="--mllm DIR")
    if not (folder / "config.json").is_file() or not any(folder.glob(WEIGHTS)):
        raise GeoError(f"{folder} holds no multimodal model: it needs config.json and model.safetensors")
    return folder


def model_identity(folder: Path) -> str:
    """Return the folder's name and twelve hexadecimal digits of SHA-256 over all files that answers depend on."""
    paths = sorted({path for pattern in FILES for path in folder.glob(pattern)})
    lines = "".join(f"{path.name} {file_sha256(path)}\n" for path in paths)
    return f"{folder.resolve().name}@{hashlib.sha256(lines.encode()).hexdigest()[:12]}"


def find_folder(name: str, files: Sequence[str], needed: Sequence[str], option: str) -> Path:
    """Return the folder of a model: the one of that name, or a snapshot of OWNER/NAME from the hub.

    A snapshot on this machine is used where a file of it matches one of the patterns ``needed``; else ``files``, the
    patterns of what is used (no pickles), are downloaded. option: how to name a folder instead, for the error. Raises
    GeoError when there is no such model, within seconds where there is no network.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import HFValidationError

    snapshot = None
    try:
        snapshot = Path(snapshot_download(name, allow_patterns=list(files), local_files_only=True))
        if holds(snapshot, needed):
            return snapshot
    except HFValidationError:
        raise GeoError(f"there is no folder {name}: name a model's folder, or a model of the hub") from None
    except OSError:
        pass  # not downloaded yet
    try:
        model_info(name, timeout=ANSWER_S)
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # a hub fails in many ways
        if snapshot and holds(snapshot, ["*.bin"]):
            return snapshot  # its weights are a pickle: the caller says so
        raise _download_error(name, option, error) from None


def holds(folder: Path, patterns: Sequence[str]) -> bool:
    """Return whether a file of a folder matches one of the patterns."""
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _download_error(name: str, option: str, error: Exception) -> GeoError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return GeoError(f"the hub gives {name} only to who accepted its terms: do so there, then 'hf auth login'")
    if isinstance(error, RepositoryNotFoundError):
        return GeoError(f"the hub has no model {name}, or hides it: check the name, or log in with 'hf auth login'")
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else brief(error)
    return GeoError(
        f"the model {name} is not on this machine and could not be downloaded ({reason}): get it where there is a "
        f"network with 'hf download {name}', or copy its folder here and name that ({option})"
    )


def brief(error: Exception) -> str:
    """Return the first line of an error's message, at most 160 characters of it."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and reports, such as of the weights that one tower of a CLIP leaves over."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
