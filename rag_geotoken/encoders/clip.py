"""CLIP through transformers: pictures and texts -> one space. From a hub, once, or from a local folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken.errors import GeoError
from rag_geotoken.files import file_sha256, read_json

CLIP_LARGE = "openai/clip-vit-large-patch14"
FILES = ["*.json", "*.txt", "model*.safetensors"]  # what is fetched from a hub: no pickles
# Mean and standard deviation of CLIP's training pictures, where a folder does not tell its own.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder:
    """A frozen CLIP (Radford et al., ICML 2021). ``dim`` of its embeddings, ``size`` of its pictures in pixels.

    On a GPU where there is one. Either tower is read when it is first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, _config(folder)
        self.dim, self.size = int(self.config.projection_dim), int(self.config.vision_config.image_size)
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in _statistics(folder))

    @classmethod
    def from_pretrained(cls, name: str | Path = CLIP_LARGE) -> ClipEncoder:
        """Open a folder, or a model of the hub, which is downloaded the first time and then never asked for again.

        Raises GeoError, in one line, when it is not there and cannot be had, or is no CLIP in safetensors.
        """
        return cls(find_folder(str(name)))

    @torch.inference_mode()
    def images(self, pixels: NDArray[np.uint8], batch: int = 32) -> Tensor:
        """Pictures (N, size, size, 3) uint8, as ``load_pictures`` gives them -> (N, dim) float32 on the CPU."""
        return self._batches(pixels, batch, lambda part: self.features(self.normalized(part)))

    def normalized(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Pictures (N, size, size, 3) uint8 -> (N, 3, size, size), what CLIP's own processor makes of them."""
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0 - self.mean) / self.std

    @torch.inference_mode()
    def features(self, pixel_values: Tensor) -> Tensor:
        """Normalised pictures (N, 3, size, size) -> (N, dim), of any length."""
        embeds: Tensor = self._vision(pixel_values=pixel_values.to(self._vision.device)).image_embeds
        return embeds.float().cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Texts, cut after CLIP's 77 tokens -> (N, dim), of any length."""
        tower, tokenizer = self._text

        def embed(part: Sequence[str]) -> Tensor:
            longest = tower.config.max_position_embeddings
            tokens = tokenizer(list(part), padding=True, truncation=True, max_length=longest, return_tensors="pt")
            ids, mask = (tokens[name].to(tower.device) for name in ("input_ids", "attention_mask"))
            embeds: Tensor = tower(input_ids=ids, attention_mask=mask).text_embeds
            return embeds.float().cpu()

        return self._batches(texts, batch, embed)

    def _batches(self, items: Any, batch: int, embed: Any) -> Tensor:
        blocks = [embed(items[i : i + batch]) for i in range(0, len(items), batch)]
        return torch.cat(blocks) if blocks else torch.zeros(0, self.dim)

    @cached_property
    def _vision(self) -> Any:
        return _tower(self.folder, self.config, "vision")

    @cached_property
    def _text(self) -> tuple[Any, Any]:
        from transformers import AutoTokenizer

        # Of a folder without these files, transformers 5 makes an empty tokenizer.
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise GeoError(f"{self.folder} holds no tokenizer, so no texts: copy tokenizer.json there as well")
        try:
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # a broken tokenizer fails in many ways
            raise GeoError(f"{self.folder} holds no tokenizer that can be used: {_reason(error)}") from None
        return _tower(self.folder, self.config, "text"), tokenizer

    def identity(self) -> dict[str, Any]:
        """All that the embeddings of pictures follow from, as JSON values."""
        statistics = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        weights = [file_sha256(path) for path in sorted(self.folder.glob("model*.safetensors"))]
        return {"weights": weights, "size": self.size, **statistics}


def find_folder(name: str) -> Path:
    """The folder of a model: the one of that name, or a hub's snapshot, downloaded unless it is there already.

    Raises GeoError when there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        if any(found.glob("model*.safetensors")):
            return found
    except HFValidationError:
        raise GeoError(f"there is no folder {name}: name one that holds a CLIP, or a model of the hub") from None
    except OSError:
        pass  # not there yet
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # a hub fails in many ways: no network, no such model, no permission
        raise GeoError(
            f"the model {name} is not on this machine and could not be downloaded ({_reason(error)}): get it where "
            f"there is a network with 'hf download {name}', or copy its folder here and name that (--backbone DIR)"
        ) from None


def _config(folder: Path) -> Any:
    """CLIP's settings, its towers' agreeing with the whole's. Raises GeoError when the folder holds no CLIP."""
    told = read_json(folder / "config.json")
    if not isinstance(told, dict) or told.get("model_type") != "clip":
        raise GeoError(f"{folder} is no CLIP by its config.json: name the folder of a CLIP model")
    if not any(folder.glob("model*.safetensors")):
        raise GeoError(f"{folder} holds no model.safetensors: name a folder with a CLIP in safetensors")
    try:
        from transformers import CLIPModel
    except (ImportError, RuntimeError):
        # It imports torchvision wherever there is one.
        raise GeoError(
            "transformers cannot import its CLIP: does torchvision, if it is installed, fit torch?"
        ) from None
    try:
        kind: Any = CLIPModel.config_class
        config = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # wrong settings fail in many ways
        raise GeoError(f"{folder} cannot be used as a CLIP: {_reason(error)}") from None
    for tower in (config.vision_config, config.text_config):
        tower.projection_dim = config.projection_dim  # its own may be a default that was never used
    return config


def _tower(folder: Path, config: Any, kind: str) -> Any:
    """CLIP's ``vision`` or ``text`` tower with its projection, in evaluation mode and single precision."""
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    model: Any = CLIPVisionModelWithProjection if kind == "vision" else CLIPTextModelWithProjection
    settings = config.vision_config if kind == "vision" else config.text_config
    try:
        with _quiet():
            tower, told = model.from_pretrained(
                folder, config=settings, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # broken files fail in many ways
        raise GeoError(f"{folder} cannot be used as a CLIP: {_reason(error)}") from None
    lacking = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
    if lacking:  # it would be left random
        raise GeoError(f"{folder} cannot be used as a CLIP: its weights lack {lacking[0]}")
    return tower.float().eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _statistics(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the three colours, from the processor's settings. Raises GeoError."""
    names = ("preprocessor_config.json", "processor_config.json")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return list(MEAN), list(STD)
    settings = read_json(path)
    try:
        settings = settings.get("image_processor", settings)
        mean, std = (
            [float(v) for v in settings.get(key, own)] for key, own in (("image_mean", MEAN), ("image_std", STD))
        )
        usable = len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0
    except (AttributeError, TypeError, ValueError):
        usable = False
    if not usable:
        raise GeoError(f"{path} has no usable image_mean and image_std: get the file again")
    return mean, std


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports of what one tower leaves over of a whole CLIP."""
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


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
