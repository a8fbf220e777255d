"""These functions turn weights of other systems, once, into ours: untrusted files, checked before use."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rag_geotoken.encoders import open_clip
from rag_geotoken.encoders.alignment import G3, GeoAlignment
from rag_geotoken.encoders.location import LocationEncoder
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.cells import MAX_LEVEL, S2Tokenizer
from rag_geotoken.peers.gallery import open_gallery, read_places_csv, write_places
from rag_geotoken.peers.geoclip import GeoCLIPHead
from rag_geotoken.storage.files import read_json, write_json, write_whole
from rag_geotoken.tokens.model import GEOTOKEN, TokenConfig, TokenModel

Model = TypeVar("Model", bound=nn.Module)
# Where training scripts put a state dict that is not the whole file.
NESTS = ("state_dict", "model_state_dict", "model")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What GeoToken's checkpoints carry and its decoding never uses: heads for other losses, embeddings of the neighbors'
# coordinates and similarities, and the sinusoids, which we compute.
UNUSED = ("coord_head.", "metadata_proj.", "similarity_embedding.", "encoder_pos_encoder.pe", "decoder_pos_encoder.pe")
# G3's state dict holds the frozen CLIP whole, older ones with integer buffers, and a scale that no loss has.
G3_UNUSED = ("vision_model.", "text_model.", "vision_projection.", "text_projection.", "logit_scale3")
G3_NAMES = {
    "location.0.": "location_encoder.",
    "location.1.": "location_projection_else.",
    "to_text.": "vision_projection_else_1.",
    "to_gps.": "vision_projection_else_2.",
    "text.": "text_projection_else.",
    "text_scale": "logit_scale1",
    "gps_scale": "logit_scale2",
}
# Names of pickled weights of open_clip.
OPEN_CLIP_PICKLES = ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "pytorch_model.bin", "model.pth")
GEOCLIP_FOLDERS = ("", "weights", "model/weights", "geoclip/model/weights")  # below a folder that one may name


def convert_geotoken(path: Path, out: Path, heads: int = 8, neighbors: int = 15) -> TokenConfig:
    """Convert a checkpoint of GeoToken's released code to a folder for :meth:`TokenModel.from_pretrained`.

    Our model bears the names of the released code, so this checks, drops what decoding never uses and saves in full
    precision. The shapes tell every size but the number of heads and of neighbors: give those of the training.
    Raises GeoError when the file is missing, no checkpoint, or not one of GeoToken; then nothing is written.
    """
    tensors = read_tensors(path, UNUSED)
    config = replace(_config(path, tensors), heads=heads, neighbors=neighbors)
    _load_peer(lambda: TokenModel(config), tensors, path, peer="GeoToken").save_pretrained(out)
    return config


def convert_geoclip(path: Path, out: Path) -> int:
    """Convert the package ``geoclip`` to a folder for :meth:`GeoCLIP.from_pretrained`; return the number of places.

    ``path``: its folder of weights, or the package's. The gallery is encoded now, once; the result also loads with
    :meth:`LocationEncoder.from_pretrained`. Raises GeoError when a file is missing or wrong; then nothing is written.
    """
    encoder, mlp, scale = (f"{name}_weights.pth" for name in ("location_encoder", "image_encoder_mlp", "logit_scale"))
    folder = next((path / inner for inner in GEOCLIP_FOLDERS if (path / inner / encoder).is_file()), path)
    tensors = read_tensors(folder / encoder)
    location = _load_peer(LocationEncoder, tensors, folder / encoder, peer="GeoCLIP")
    tensors = {f"mlp.{name}": value for name, value in read_tensors(folder / mlp).items()}
    # This file holds one number, not a state dict.
    value = _load(folder / scale) if (folder / scale).is_file() else None
    if not isinstance(value, Tensor) or value.shape != () or value.dtype not in FLOATS:
        raise GeoError(
            f"{folder / scale} is missing or no single number: take the weights folder of the package geoclip"
        )
    head = _load_peer(GeoCLIPHead, tensors | {"logit_scale": value.detach()}, folder / mlp, peer="GeoCLIP")
    galleries = [parent / "gps_gallery" / "coordinates_100K.csv" for parent in (folder, folder.parent)]
    places = read_places_csv(next(filter(Path.is_file, galleries), galleries[0]))
    location.save_pretrained(out)
    head.save_pretrained(out)
    write_places(out, places)
    open_gallery(out, location)
    return len(places)


def convert_g3(path: Path, out: Path) -> None:
    """Convert G3's state dict to a folder for :meth:`GeoAlignment.from_pretrained`.

    CLIP's own weights, frozen in G3, are left out: they come from their hub. Raises GeoError when the file is missing,
    no state dict, or not G3's; then nothing is written.
    """

    def g3_name(name: str) -> str:
        return next(theirs + name.removeprefix(ours) for ours, theirs in G3_NAMES.items() if name.startswith(ours))

    tensors = read_tensors(path, G3_UNUSED)
    _load_peer(lambda: GeoAlignment(G3), tensors, path, peer="G3", rename=g3_name).save_pretrained(out)


def convert_open_clip(path: Path, out: Path) -> None:
    """Convert a folder of open_clip with a pickle to one with safetensors, settings and tokenizer.

    Tensors stay as they are; whether they are all that the model needs is checked when it is loaded. Raises GeoError
    when the settings or the weights are missing, or when the file holds more than tensors; then nothing is written.
    """
    settings = read_json(path / open_clip.CONFIG)
    pickles = [path / name for name in OPEN_CLIP_PICKLES]
    tensors = read_tensors(next(filter(Path.is_file, pickles), pickles[0]), integers=True)
    # One memory each, as this format wants it.
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_whole(out / open_clip.WEIGHTS[0], lambda beside: save_file(tensors, beside))
    for file in {file for pattern in open_clip.TOKENIZER for file in path.glob(pattern) if file.is_file()}:
        write_whole(out / file.name, partial(shutil.copyfile, file))
    write_json(out / open_clip.CONFIG, settings)


def _load_peer(
    make: Callable[[], Model], tensors: dict[str, Tensor], path: Path, *, peer: str, rename: Callable[[str], str] = str
) -> Model:
    """Return a model with a peer's tensors, in single precision; ``rename`` turns our names into the peer's.

    Raises GeoError unless the tensors are all of the model's, and finite.
    """
    # On the meta device a model has shapes but no memory, whatever the file claims.
    with torch.device("meta"):
        model = make()
    names = {rename(name): name for name in model.state_dict()}
    shapes = {name: tuple(model.state_dict()[our_name].shape) for name, our_name in names.items()}
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{ascii(name)[:80]} is unknown" for name in tensors if name not in shapes]
    given = {name: tuple(tensors[name].shape) for name in shapes if name in tensors}
    wrong += [f"{name} is {shape} where {shapes[name]} fits" for name, shape in given.items() if shape != shapes[name]]
    if not wrong:
        tensors = {name: value.float() for name, value in tensors.items()}
        wrong = [f"{name} holds values that are not finite" for name, v in tensors.items() if not v.isfinite().all()]
    if wrong:
        raise _refusal(path, wrong[0] + (f", and {len(wrong) - 1} more are wrong" if wrong[1:] else ""), peer)
    model.load_state_dict({names[name]: value for name, value in tensors.items()}, assign=True)
    return model


def read_tensors(path: Path, unused: tuple[str, ...] = (), integers: bool = False) -> dict[str, Tensor]:
    """Read the state dict of a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file, on the CPU.

    It may lie under a key such as ``state_dict``. DistributedDataParallel's prefix ``module.`` is removed, then names
    that begin with one of ``unused`` are left out. Pickled code is never run. Raises GeoError for a missing or broken
    file, and for a state dict with anything but floating-point tensors, or ``integers`` (of 64 bits).
    """
    if not path.is_file():
        raise GeoError(f"there is no file {path}: give a checkpoint, .pth, .pt, .bin or .safetensors")
    loaded = _load(path)
    state = loaded if isinstance(loaded, dict) else {}
    state = next((state[nest] for nest in NESTS if isinstance(state.get(nest), dict)), state)
    if not state or not all(isinstance(name, str) for name in state):
        raise GeoError(f"{path} holds no state dict: save model.state_dict()")
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith(unused)}
    dtypes = (*FLOATS, torch.int64) if integers else FLOATS
    for name, value in state.items():
        strided = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not strided or value.dtype not in dtypes:
            raise GeoError(f"{path} holds no state dict, {ascii(name)[:80]} is not made of floats: save the model's")
    # A few bytes can pose as a tensor of any size, the same number repeated.
    if sum(value.numel() * value.element_size() for value in state.values()) > path.stat().st_size:
        raise GeoError(f"{path} claims more numbers than it holds: save model.state_dict()")
    return state


def _load(path: Path) -> object:
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        if path.suffix.lower() in (".pth", ".pt", ".bin"):
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
    raise GeoError(f"{path.name} is no checkpoint by its name: give a .pth, .pt, .bin or .safetensors file")


def _config(path: Path, tensors: dict[str, Tensor]) -> TokenConfig:
    """Return the sizes that the shapes tell; tensors that they do not need are checked by :func:`_load_peer`."""

    def shape(name: str) -> tuple[int, int]:
        if name not in tensors:
            raise _refusal(path, f"{name} is missing")
        if tensors[name].ndim != 2 or not tensors[name].numel():
            raise _refusal(path, f"{name} is {tuple(tensors[name].shape)} where a matrix fits")
        rows, columns = tensors[name].shape
        return rows, columns

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})

    d_model, dim = shape("image_proj.0.weight")
    ff, _ = shape("encoder.layers.0.linear1.weight")
    for first in ("decoder.layers.0.linear1.weight", "output_layers.0.weight"):
        shape(first)
    vocabularies = tuple(shape(f"output_layers.{t}.weight")[0] for t in range(count("output_layers.")))
    level = sum(size.bit_length() - 1 for size in vocabularies[1:]) // 2
    groups = range(1, MAX_LEVEL + 1) if 0 <= level <= MAX_LEVEL else ()
    group = next((group for group in groups if S2Tokenizer(level, group).vocab_sizes == vocabularies), None)
    if group is None:
        raise _refusal(
            path, f"vocabularies {str(vocabularies)[:80]} are not the 6 faces and powers of 4 of an S2 tokenizer"
        )
    sizes = replace(GEOTOKEN, level=level, group=group, dim=dim, d_model=d_model, ff=ff)
    return replace(sizes, encoder_layers=count("encoder.layers."), decoder_layers=count("decoder.layers."))


def _refusal(path: Path, reason: str, peer: str = "GeoToken") -> GeoError:
    return GeoError(f"{path.name} is no checkpoint of {peer}: {reason}")
