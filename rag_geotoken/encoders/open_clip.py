"""This encoder opens models of open_clip, SigLIP 2 and DFN among them, from safetensors only."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken.encoders.shared import MEAN, STD, Backbone, color_statistics
from rag_geotoken.errors import GeoError
from rag_geotoken.photos.pictures import Fit, Interpolation, load_pictures
from rag_geotoken.storage.files import read_json
from rag_geotoken.storage.model_folder import brief, find_folder, holds
from rag_geotoken.types import Picture

HUB, LOCAL = "hf-hub:", "local-dir:"
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")  # as open_clip prefers them
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")
OPTION = "--backbone open_clip:DIR"
EXTRA = "pip install 'rag-geotoken[open-clip]'"
FITS: dict[str, Fit] = {"shortest": "crop-even", "squash": "squash"}  # open_clip's ways to a square that are ours too
# What a model may tell its tokenizer. Anything else would go to transformers, which runs a repository's code if told.
TOKENIZER_SETTINGS = {"clean", "strip_sep_token", "language"}


class OpenClipEncoder(Backbone):
    """This class is a frozen model of open_clip (Cherti et al., CVPR 2023), read when first needed."""

    def __init__(self, folder: Path, name: str, model: dict[str, Any], preprocess: dict[str, Any]) -> None:
        """Take the folder of the weights, open_clip's name of the model, its settings and its pictures'."""
        self.folder, self.name, self.model = folder, name, model
        self.weights, path = [_weights(folder)], folder / CONFIG
        self.dim, self.size = _sizes(self.model, path)
        mean, std = ([v] * 3 if isinstance(v, float | int) else v for v in map(preprocess.get, ("mean", "std")))
        self.mean, self.std = color_statistics(mean or MEAN, std or STD, path)
        fit, interpolation = preprocess.get("resize_mode") or "shortest", preprocess.get("interpolation")
        if fit not in FITS or interpolation not in (None, "bicubic", "bilinear", "random"):
            raise GeoError(
                f"{path} asks for pictures resized by {fit!r:.40}, {interpolation!r:.40}, which is not known here: "
                "take a model with 'shortest' or 'squash' and 'bicubic' or 'bilinear'"
            )
        self.fit, self.bilinear = FITS[fit], interpolation == "bilinear"

    @classmethod
    def from_pretrained(cls, name: str | Path) -> OpenClipEncoder:
        """Open a folder, ``hf-hub:OWNER/NAME``, or ``MODEL/TAG`` as ``open_clip.list_pretrained()`` has them.

        A folder holds open_clip_config.json, open_clip_model.safetensors and, but for CLIP's own, a tokenizer. What is
        not on this machine is downloaded, once. Raises GeoError, in one line, when open_clip or the model is missing
        or cannot be used.
        """
        open_clip, name = _open_clip(), str(name)
        folder = _fetch(name.removeprefix(HUB)) if name.startswith(HUB) else Path(name.removeprefix(LOCAL))
        if folder.is_dir():
            return cls(folder, f"{LOCAL}{folder}", *_settings(folder))
        model, _, tag = name.rpartition("/")
        preprocess = open_clip.get_pretrained_cfg(model, tag)
        if preprocess:
            # The tag knows the activation that its weights were trained with.
            activation = {"quick_gelu": True} if preprocess.get("quick_gelu") else {}
            settings = open_clip.get_model_config(model) | activation
            folder = _fetch(preprocess["hf_hub"].rpartition("/")[0])  # OWNER/NAME/FILE, where FILE may be empty
            return cls(folder, model, settings, preprocess=preprocess)
        if model in open_clip.list_models():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise GeoError(f"open_clip has no weights {tag!r} of {model}: it has {tags}")
        raise GeoError(
            f"there is no folder and no open_clip model {name}: write open_clip:DIR, open_clip:{HUB}OWNER/NAME or "
            "open_clip:MODEL/TAG, such as open_clip:ViT-L-14/openai"
        )

    def load(self, references: Sequence[Picture]) -> tuple[NDArray[np.uint8], list[str | None]]:
        """Read pictures as this model wants them, and what is wrong with each: see ``load_pictures``.

        Of an upright RGB picture these are the pixels of open_clip's own transform, unless it is over 16 times as long
        as wide and cropped. That one resizes palettes without blending, lets transparency show black and ignores EXIF.
        """
        interpolation: Interpolation = "bilinear" if self.bilinear else "bicubic"
        return load_pictures(references, self.size, fit=self.fit, interpolation=interpolation)

    def identity(self) -> dict[str, Any]:
        """Return all that the embeddings of pictures follow from, as JSON values."""
        return super().identity() | {"model": self.model, "fit": self.fit, "bilinear": self.bilinear}

    def _embed_images(self, pixels: Tensor) -> Tensor:
        model, device = self._loaded
        embeds: Tensor = model.encode_image(pixels.to(device), normalize=False)
        return embeds

    def _embed_texts(self, texts: list[str]) -> Tensor:
        tokens, (model, device) = self._tokenizer(texts), self._loaded
        embeds: Tensor = model.encode_text(tokens.to(device), normalize=False)
        return embeds

    @cached_property
    def _loaded(self) -> tuple[Any, str]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = None if self.name.startswith(LOCAL) else str(self.weights[0])  # of a folder it takes WEIGHTS itself
        try:
            with _quiet():
                model = _open_clip().create_model(
                    self.name,
                    pretrained=weights,
                    require_pretrained=True,
                    force_quick_gelu=bool(self.model.get("quick_gelu")),
                )
        except Exception as error:  # wrong settings and broken files fail in many ways
            missing = re.search(r'Missing key\(s\) in state_dict: "([^"]+)"', str(error))
            reason = f"its weights lack {missing[1]}" if missing else " ".join(str(error).split())[:160]
            raise GeoError(f"{self.folder} cannot be used as an open_clip model: {reason}") from None
        return model.eval().to(device), device

    @cached_property
    def _tokenizer(self) -> Any:
        from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

        text = self.model["text_cfg"]
        settings = {"context_length": text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})}
        unknown = settings.keys() - TOKENIZER_SETTINGS - {"context_length"}
        if unknown:
            raise GeoError(f"{self.folder} tells its tokenizer what is not known here: {min(unknown)!r:.80}")
        source, folder = text.get("hf_tokenizer_name"), self.folder
        if source and not holds(folder, TOKENIZER):
            folder = find_folder(str(source), TOKENIZER, TOKENIZER, option=OPTION)
        try:
            if not source:
                return SimpleTokenizer(**settings)
            return HFTokenizer(str(folder), tokenizer_mode=text.get("tokenizer_mode"), **settings)
        except Exception as error:  # a broken tokenizer fails in many ways
            raise GeoError(f"{self.folder} holds no tokenizer that can be used: {brief(error)}") from None


def _open_clip() -> Any:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise GeoError(f"open_clip needs {error.name}, which is not installed: {EXTRA}") from None
    except Exception as error:  # a torchvision of another torch fails in many ways
        raise GeoError(
            f"open_clip cannot be imported ({brief(error)}): install the torchvision that was made for torch "
            f"{torch.__version__}"
        ) from None
    return open_clip


def _fetch(name: str) -> Path:
    folder = find_folder(name, [CONFIG, *WEIGHTS, *TOKENIZER], WEIGHTS, option=OPTION)
    if not holds(folder, WEIGHTS):
        raise GeoError(
            f"the hub's {name} has no {WEIGHTS[0]}, and pickles (.bin) are not loaded: make one, once, with "
            f"'hf download {name} --local-dir DIR' and 'rag-geotoken convert open-clip DIR --out OUT', then name "
            "open_clip:OUT"
        )
    return folder


def _weights(folder: Path) -> Path:
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise GeoError(
            f"{folder} holds no {WEIGHTS[0]}, and pickles are not loaded: "
            f"'rag-geotoken convert open-clip {folder} --out OUT' makes a folder with one of a .bin"
        )
    return path


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a folder's model and of its pictures. Raises GeoError when it holds something else."""
    if not (folder / CONFIG).is_file():
        raise GeoError(f"{folder} holds no {CONFIG}: name the folder of an open_clip model")
    settings = read_json(folder / CONFIG)
    match settings:
        case {"model_cfg": {"vision_cfg": dict(), "text_cfg": dict()} as model}:
            preprocess = settings.get("preprocess_cfg") or {}
            if isinstance(preprocess, dict):
                return model, preprocess
    raise GeoError(f"{folder / CONFIG} describes no open_clip model: get the file again")


def _sizes(model: dict[str, Any], path: Path) -> tuple[int, int]:
    dim, size = model.get("embed_dim"), model["vision_cfg"].get("image_size", 224)
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if isinstance(dim, int) and isinstance(size, int) and min(dim, size) > 0:
        return dim, size
    raise GeoError(f"{path} tells no embed_dim or no square image_size: take a model of square pictures")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's messages off standard error where nobody set up logging; whoever did gets them."""
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
