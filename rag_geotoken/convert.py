"""Weights of peers, turned once into ours: untrusted files, checked before use."""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rag_geotoken.cells import MAX_LEVEL, S2Tokenizer
from rag_geotoken.errors import GeoError
from rag_geotoken.token_model import GEOTOKEN, TokenConfig, TokenModel

# Where training scripts put a state dict that is not the whole file.
NESTS = ("state_dict", "model_state_dict", "model")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What GeoToken's checkpoints carry and its decoding never uses: heads for other losses, embeddings of the neighbours'
# coordinates and similarities, and the sinusoids, which we compute.
UNUSED = ("coord_head.", "metadata_proj.", "similarity_embedding.", "encoder_pos_encoder.pe", "decoder_pos_encoder.pe")


def convert_geotoken(path: Path, out: Path, heads: int = 8, neighbors: int = 15) -> TokenConfig:
    """Turn a checkpoint of GeoToken's released code into a folder for :meth:`TokenModel.from_pretrained`.

    Our model bears the names of the released code, so this checks, drops what decoding never uses and saves in full
    precision. The shapes tell every size but the number of heads and of neighbours: give those of the training.
    Raises GeoError when the file is missing, no checkpoint, or not one of GeoToken; then nothing is written.
    """
    tensors = {name: value for name, value in read_tensors(path).items() if not name.startswith(UNUSED)}
    config = _config(path, tensors, heads, neighbors)
    # On the meta device a model has shapes but no memory, whatever the file claims.
    with torch.device("meta"):
        model = TokenModel(config)
    wanted = model.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [f"{ascii(name)[:80]} is unknown" for name in tensors if name not in wanted]
    both = ((name, tuple(tensors[name].shape), tuple(wanted[name].shape)) for name in wanted if name in tensors)
    wrong += [f"{name} is {given} where {fits} fits" for name, given, fits in both if given != fits]
    if not wrong:
        tensors = {name: value.float() for name, value in tensors.items()}
        wrong = [f"{name} holds values that are not finite" for name, value in tensors.items() if not _finite(value)]
    if wrong:
        raise _refusal(path, wrong[0] + (f", and {len(wrong) - 1} more are wrong" if wrong[1:] else ""))
    model.load_state_dict(tensors, assign=True)
    model.save_pretrained(out)
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a ``.safetensors``, ``.pth`` or ``.pt`` file by name, on the CPU.

    It may lie under a key such as ``state_dict``, and DistributedDataParallel's ``module.`` before every name goes.
    Pickled code is never run. Raises GeoError unless there is a file whose state dict is floating-point tensors alone.
    """
    if not path.is_file():
        raise GeoError(f"there is no file {path}: give a checkpoint, .pth, .pt or .safetensors")
    loaded = _load(path)
    inner = [loaded[nest] for nest in NESTS if isinstance(loaded.get(nest), dict)] if isinstance(loaded, dict) else []
    state = inner[0] if inner else loaded
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise GeoError(f"{path} holds no state dict: save model.state_dict()")
    for name, value in state.items():
        usable = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not (usable and value.dtype in FLOATS):
            raise GeoError(f"{path} holds no state dict, {ascii(name)[:80]} is not made of floats: save the model's")
    # A few bytes can pose as a tensor of any size, the same number repeated.
    if sum(value.numel() * value.element_size() for value in state.values()) > path.stat().st_size:
        raise GeoError(f"{path} claims more numbers than it holds: save model.state_dict()")
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _load(path: Path) -> object:
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix.lower() in (".pth", ".pt"):
            # What torch warns of is refused below.
            with warnings.catch_warnings(action="ignore"):
                loaded: object = torch.load(path, map_location="cpu", weights_only=True)
            return loaded
    except pickle.UnpicklingError:
        raise GeoError(
            f"{path} is refused: it is broken or pickles more than tensors, none of which was run; "
            "save model.state_dict() alone"
        ) from None
    except OSError as error:
        raise GeoError(f"cannot read {path}: {(error.strerror or type(error).__name__).lower()}") from None
    except Exception:  # hostile bytes fail in any way
        raise GeoError(f"{path} is no checkpoint, or a truncated one: get it again") from None
    raise GeoError(f"{path.name} is no checkpoint by its name: give a .pth, .pt or .safetensors file")


def _config(path: Path, tensors: dict[str, Tensor], heads: int, neighbors: int) -> TokenConfig:
    """The sizes that the shapes tell; what the model then finds missing or misshapen is the caller's."""

    def shape(name: str) -> tuple[int, int]:
        if name not in tensors:
            raise _refusal(path, f"{name} is missing")
        if tensors[name].ndim != 2 or not tensors[name].numel():
            raise _refusal(path, f"{name} is {tuple(tensors[name].shape)} where a matrix fits")
        rows, columns = tensors[name].shape
        return rows, columns

    def count(prefix: str) -> int:
        found = (re.match(rf"{re.escape(prefix)}\.([0-9]+)\.", name) for name in tensors)
        return len({match[1] for match in found if match})

    d_model, dim = shape("image_proj.0.weight")
    ff, _ = shape("encoder.layers.0.linear1.weight")
    for first in ("decoder.layers.0.linear1.weight", "output_layers.0.weight"):
        shape(first)
    sizes = tuple(shape(f"output_layers.{t}.weight")[0] for t in range(count("output_layers")))
    level = sum(size.bit_length() - 1 for size in sizes[1:]) // 2
    groups = range(1, MAX_LEVEL + 1) if 0 <= level <= MAX_LEVEL else ()
    group = next((group for group in groups if S2Tokenizer(level, group).vocab_sizes == sizes), None)
    if group is None:
        raise _refusal(path, f"vocabularies {str(sizes)[:80]} are not the 6 faces and powers of 4 of an S2 tokenizer")
    return replace(
        GEOTOKEN,
        level=level,
        group=group,
        neighbors=neighbors,
        dim=dim,
        d_model=d_model,
        heads=heads,
        ff=ff,
        encoder_layers=count("encoder.layers"),
        decoder_layers=count("decoder.layers"),
    )


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _refusal(path: Path, reason: str) -> GeoError:
    return GeoError(f"{path.name} is no checkpoint of GeoToken: {reason}")
