"""A tiny CLIP and tiny GeoCLIP weights in their own files' formats, so that tests load them as users load theirs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rag_geotoken.encoders.location import LocationEncoder
from rag_geotoken.peers.geoclip import GeoCLIPHead

ENDS = ("<|startoftext|>", "<|endoftext|>")
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def save_clip(folder: Path, dim: int = 768, seed: int = 0) -> Path:
    """A random CLIP of two narrow layers a tower, its tokenizer of letters and its processor's settings."""
    from transformers import CLIPConfig, CLIPModel

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), *ENDS]
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    start, end = (words.index(token) for token in ENDS)
    text = tower | {"vocab_size": len(words), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(projection_dim=dim, text_config=text, vision_config=tower | {"patch_size": 32})
        model = CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # wide enough that no two pictures look alike
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": ENDS[0], "eos_token": ENDS[1], "unk_token": ENDS[1], "pad_token": ENDS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **special}))
    return folder


def save_geoclip_package(folder: Path, places: NDArray[np.float64], scale: float = 3.681) -> Path:
    """The files of the package ``geoclip``, laid out as in its folder ``model``, with random weights."""
    weights, gallery = folder / "weights", folder / "gps_gallery" / "coordinates_100K.csv"
    weights.mkdir(parents=True)
    gallery.parent.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        location, head = LocationEncoder().state_dict(), GeoCLIPHead().mlp.state_dict()
    torch.save(location, weights / "location_encoder_weights.pth")
    torch.save(head, weights / "image_encoder_mlp_weights.pth")
    torch.save(torch.tensor(scale), weights / "logit_scale_weights.pth")
    with gallery.open("w", newline="") as file:
        csv.writer(file).writerows([("LAT", "LON"), *places.round(6).tolist()])
    return folder


def save_pictures(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Random pictures of coarse colored patches, upright and lying, as PNG files."""
    rng = np.random.default_rng(seed)
    paths = [folder / f"{i:03d}.png" for i in range(count)]
    for i, path in enumerate(paths):
        patches = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        patches.resize((331, 250) if i % 2 else (229, 402), Image.Resampling.BILINEAR).save(path)
    return [str(path) for path in paths]
