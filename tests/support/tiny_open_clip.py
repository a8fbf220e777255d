"""Tiny models of open_clip in its own folder format, so that tests load them as users load theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CLIP_CFG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
# As timm/ViT-B-16-SigLIP2, but for its sizes: a timm tower pooled by attention, text of a tokenizer of its own.
SIGLIP_CFG: dict[str, Any] = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 160,
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 30,
        "hf_tokenizer_name": "someone/siglip",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 32,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}
SIGLIP_PICTURES = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def save_open_clip(
    folder: Path, model: dict[str, Any] = CLIP_CFG, pictures: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """A random model with its settings; a tokenizer of letters where it has one of its own."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": pictures or {}}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = open_clip.create_model(f"local-dir:{folder}")
        for parameter in made.parameters():
            if parameter.ndim > 1:  # wide enough that no two pictures look alike
                torch.nn.init.normal_(parameter, std=0.1)
    save_file(made.state_dict(), folder / "open_clip_model.safetensors")
    if "hf_tokenizer_name" in model["text_cfg"]:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One of letters, which ends every text and pads to its length."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    told = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
