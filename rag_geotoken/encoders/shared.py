"""What the frozen backbones share: a model's folder, its colours, its batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken.errors import GeoError

# Mean and standard deviation of CLIP's training pictures, where a model does not tell its own.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ANSWER_S = 10.0  # the hub's first answer; without a limit, a network that swallows packets is waited for for minutes


def find_folder(name: str, files: Sequence[str], needed: Sequence[str], option: str) -> Path:
    """The folder of a model: the one of that name, or a hub's snapshot, downloaded unless it is there already.

    Args:
        name: A folder, or OWNER/NAME of the hub.
        files: Patterns of what is fetched: no pickles.
        needed: Patterns of which one must match in a snapshot on this machine, or the hub is asked.
        option: How to name a folder instead, for the error.

    Raises:
        GeoError: there is none, and none can be had: within seconds where there is no network.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import HFValidationError

    found = None
    try:
        found = Path(snapshot_download(name, allow_patterns=list(files), local_files_only=True))
        if any(any(found.glob(pattern)) for pattern in needed):
            return found
    except HFValidationError:
        raise GeoError(f"there is no folder {name}: name a model's folder, or a model of the hub") from None
    except OSError:
        pass  # not there yet
    try:
        model_info(name, timeout=ANSWER_S)
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # a hub fails in many ways
        if found and any(found.glob("*.bin")):
            return found  # it is there, as a pickle: the caller says so
        raise _not_had(name, option, error) from None


def _not_had(name: str, option: str, error: Exception) -> GeoError:
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
    """An error's first line, cut."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def colour_statistics(mean: Any, std: Any, path: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of three colours, each (3, 1, 1). Raises GeoError when they are none."""
    try:
        values = torch.tensor([[float(v) for v in mean], [float(v) for v in std]], dtype=torch.float64)
        usable = values.shape == (2, 3) and all(map(math.isfinite, values.flatten())) and values[1].min() > 0
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise GeoError(f"{path} has no usable mean and deviation of the colours: get the file again")
    return values[0].float()[:, None, None], values[1].float()[:, None, None]


def normalized(pixels: NDArray[np.uint8], mean: Tensor, std: Tensor) -> Tensor:
    """Pictures (N, size, size, 3) uint8 -> (N, 3, size, size), less the mean, by the deviation."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0 - mean) / std


def in_batches(items: Any, batch: int, dim: int, embed: Callable[[Any], Tensor]) -> Tensor:
    """``embed`` on ``batch`` items at a time -> (N, dim) float32 on the CPU."""
    blocks = [embed(items[i : i + batch]).float().cpu() for i in range(0, len(items), batch)]
    return torch.cat(blocks) if blocks else torch.zeros(0, dim)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and reports, such as of what one tower leaves over of a whole CLIP."""
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
