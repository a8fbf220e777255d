"""This encoder is CLIP through transformers, which puts pictures and texts into one space."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rag_geotoken.encoders.shared import MEAN, STD, Backbone, color_statistics
from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import read_json
from rag_geotoken.storage.model_folder import brief, find_folder, quiet

CLIP_LARGE = "openai/clip-vit-large-patch14"
WEIGHTS = "model*.safetensors"
FILES = ("*.json", "*.txt", WEIGHTS)  # what is fetched from a hub: no pickles


class ClipEncoder(Backbone):
    """This class is a frozen CLIP (Radford et al., ICML 2021), each of whose towers is read when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config, self.weights = folder, _config(folder), sorted(folder.glob(WEIGHTS))
        self.dim, self.size = int(self.config.projection_dim), int(self.config.vision_config.image_size)
        self.mean, self.std = _color_statistics(folder)

    @classmethod
    def from_pretrained(cls, name: str | Path = CLIP_LARGE) -> ClipEncoder:
        """Open a folder, or a model of the hub, which is downloaded the first time and then never asked for again.

        Raises GeoError, in one line, when it is not there and cannot be had, or is no CLIP in safetensors.
        """
        return cls(find_folder(str(name), FILES, [WEIGHTS], option="--backbone DIR"))

    def _embed_images(self, pixels: Tensor) -> Tensor:
        embeds: Tensor = self._vision(pixel_values=pixels.to(self._vision.device)).image_embeds
        return embeds

    def _embed_texts(self, texts: list[str]) -> Tensor:
        tower, tokenizer = self._text
        longest = tower.config.max_position_embeddings
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        ids, mask = (tokens[name].to(tower.device) for name in ("input_ids", "attention_mask"))
        embeds: Tensor = tower(input_ids=ids, attention_mask=mask).text_embeds
        return embeds

    @cached_property
    def _vision(self) -> Any:
        from transformers import CLIPVisionModelWithProjection

        return self._tower(CLIPVisionModelWithProjection, self.config.vision_config)

    @cached_property
    def _text(self) -> tuple[Any, Any]:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        # Of a folder without these files, transformers 5 makes an empty tokenizer.
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise GeoError(f"{self.folder} holds no tokenizer, so no texts: copy tokenizer.json there as well")
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a broken tokenizer fails in many ways
            raise GeoError(f"{self.folder} holds no tokenizer that can be used: {brief(error)}") from None
        return self._tower(CLIPTextModelWithProjection, self.config.text_config), tokenizer

    def _tower(self, model: Any, config: Any) -> Any:
        """Read a tower with its projection, in evaluation mode and single precision."""
        # Named here, or a folder's settings could name a hub's code instead: CVE-2026-4372 before transformers 5.3.
        options = {"attn_implementation": "sdpa", "local_files_only": True, "use_safetensors": True}
        try:
            with quiet():
                tower, info = model.from_pretrained(self.folder, config=config, output_loading_info=True, **options)
        except Exception as error:  # broken files fail in many ways
            raise GeoError(f"{self.folder} cannot be used as a CLIP: {brief(error)}") from None
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if missing:  # it would be left random
            raise GeoError(f"{self.folder} cannot be used as a CLIP: its weights lack {missing[0]}")
        return tower.float().eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _config(folder: Path) -> Any:
    """Return CLIP's settings, its towers' agreeing with the whole's. Raises GeoError when the folder holds no CLIP."""
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict) or settings.get("model_type") != "clip":
        raise GeoError(f"{folder} is no CLIP by its config.json: name the folder of a CLIP model")
    if not any(folder.glob(WEIGHTS)):
        raise GeoError(f"{folder} holds no model.safetensors: name a folder with a CLIP in safetensors")
    try:
        from transformers import CLIPModel
    except (ImportError, RuntimeError):
        # It imports torchvision wherever there is one.
        raise GeoError(
            "transformers cannot import its CLIP: a torchvision that does not fit torch "
            f"{torch.__version__} must be replaced by one that does, or removed (pip uninstall torchvision)"
        ) from None
    try:
        kind: Any = CLIPModel.config_class
        config = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # wrong settings fail in many ways
        raise GeoError(f"{folder} cannot be used as a CLIP: {brief(error)}") from None
    for tower in (config.vision_config, config.text_config):
        tower.projection_dim = config.projection_dim  # its own may be a default that was never used
    return config


def _color_statistics(folder: Path) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the three colors, from the processor's settings. Raises GeoError."""
    names = ("preprocessor_config.json", "processor_config.json")
    path = next((folder / name for name in names if (folder / name).is_file()), folder)
    settings = {} if path == folder else read_json(path)
    try:
        settings = settings.get("image_processor", settings)
        mean, std = settings.get("image_mean", MEAN), settings.get("image_std", STD)
    except AttributeError:  # not an object
        mean = std = None
    return color_statistics(mean, std, path)
