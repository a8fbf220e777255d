"""What the frozen backbones share: how they are asked, a model's folder, its colours."""

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
from rag_geotoken.files import file_sha256
from rag_geotoken.pictures import Picture, load_pictures

# Mean and standard deviation of CLIP's training pictures, where a model does not tell its own.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ANSWER_S = 10.0  # the hub's first answer; without a limit, a network that swallows packets is waited for for minutes


class Backbone:
    """A frozen model that puts pictures and texts into one space: ``dim`` numbers, squares of ``size`` pixels.

    On a GPU where there is one. ``mean`` and ``std`` (3, 1, 1) of its colours, ``weights`` its files.
    """

    folder: Path
    weights: Sequence[Path]
    dim: int
    size: int
    mean: Tensor
    std: Tensor

    def load(self, references: Sequence[Picture]) -> tuple[NDArray[np.uint8], list[str | None]]:
        """N references -> pixels (N, size, size, 3), and for each None or what is wrong: see ``load_pictures``.

        Every model has its own way, since one crops what another squashes.
        """
        return load_pictures(references, self.size)

    def normalized(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Pixels (N, size, size, 3) -> (N, 3, size, size), what the model's own processor makes of the pictures."""
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0 - self.mean) / self.std

    def images(self, pixels: NDArray[np.uint8], batch: int = 32) -> Tensor:
        """Pixels (N, size, size, 3) as ``load`` gives them -> (N, dim) float32 on the CPU, of any length."""
        return self._in_batches(lambda part: self._embed_images(self.normalized(part)), pixels, batch)

    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """N texts, cut after the model's own number of tokens -> (N, dim) float32 on the CPU, of any length."""
        return self._in_batches(self._embed_texts, list(texts), batch)

    def identity(self) -> dict[str, Any]:
        """All that the embeddings of pictures follow from, as JSON values."""
        statistics = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return {"weights": [file_sha256(path) for path in self.weights], "size": self.size, **statistics}

    def check_dim(self, dim: int, name: str, what: str) -> None:
        """Raises GeoError unless there are ``dim`` numbers, as of the model ``name``, which ``what`` was trained on."""
        if self.dim != dim:
            raise GeoError(
                f"the backbone {self.folder} gives {self.dim} numbers a picture, and {what} was trained on "
                f"the {dim} of {name}: name that backbone"
            )

    @torch.inference_mode()
    def _in_batches(self, embed: Callable[[Any], Tensor], items: Any, batch: int) -> Tensor:
        blocks = [embed(items[i : i + batch]).float().cpu() for i in range(0, len(items), batch)]
        return torch.cat(blocks) if blocks else torch.zeros(0, self.dim)

    def _embed_images(self, pixels: Tensor) -> Tensor:
        """A batch of normalised pixels (B, 3, size, size) -> (B, dim)."""
        raise NotImplementedError

    def _embed_texts(self, texts: list[str]) -> Tensor:
        """A batch of texts -> (B, dim)."""
        raise NotImplementedError


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
        if holds(found, needed):
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


def holds(folder: Path, patterns: Sequence[str]) -> bool:
    """Whether a file of a folder matches one of the patterns."""
    return any(any(folder.glob(pattern)) for pattern in patterns)


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
