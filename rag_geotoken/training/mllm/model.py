"""These functions make and save the embedded verifier, a LLaVA small enough to ship with the package."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from rag_geotoken.storage.files import write_text, write_whole
from rag_geotoken.training.mllm.words import IMAGE, PATCH, PIXELS

POSITIONS = 1024
# From transformers' names in memory to those of LLaVA checkpoints on the hub, which both transformers and vLLM read.
NAMES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
STEPS = torch.arange(5, 180, 10)


def make_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    """Make a model with random weights from torch's seed: a CLIP tower of 64 x 64 pixels and a Llama.

    A picture is 16 tokens. Numbers begin with embeddings that encode how large they are.
    """
    special_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=3,
        num_attention_heads=6,
        image_size=PIXELS,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        initializer_range=0.05,
        tie_word_embeddings=True,
        **special_ids,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=(PIXELS // PATCH) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
            **special_ids,
        )
    )
    _write_magnitudes(model, tokenizer)
    model.model.vision_tower.post_layernorm.requires_grad_(False)  # unused: LLaVA reads the last layer before it
    return model


def _write_magnitudes(model: LlavaForConditionalGeneration, tokenizer: Any) -> None:
    """Embed the numbers, alone and with what they are evidence of, as soft steps, one for each ten passed.

    The nearer two numbers, the more alike their first embeddings, and every step is a direction that grows with the
    number. With tokens as unlike as those of words, a small model would have to learn each number by itself.
    """
    weight: Any = model.get_input_embeddings().weight
    directions = torch.randn(len(STEPS), weight.shape[1]) * 0.05 / math.sqrt(len(STEPS) / 2)
    word_directions: dict[str, Any] = {}
    with torch.no_grad():
        for token, row in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            match = re.fullmatch(r"(.*?)([0-9]*)(\.[0-9])?", token)
            if match is None or not (match[2] or match[3]):
                continue
            value = float(f"{match[2] or 0}{match[3] or ''}")
            if match[3]:  # tenths as finely as whole numbers: evidence with them goes to ten, they alone to one
                value *= 10 if match[1] else 100
            weight[row] = weight[row] * 0.5 + torch.tanh((value - STEPS) / 6) @ directions
            if match[1]:
                weight[row] += word_directions.setdefault(match[1], torch.randn(weight.shape[1]) * 0.05)


def save_weights(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Save the parameters in half precision, under the names that checkpoints on the hub have."""
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # shared with the embeddings
            continue
        prefix = next(prefix for prefix in NAMES if name.startswith(prefix))
        tensors[NAMES[prefix] + name.removeprefix(prefix)] = value.detach().cpu().half().contiguous()
    write_whole(path, lambda temporary: temporary.write_bytes(save(tensors, {"format": "pt"})))


def save_folder(model: LlavaForConditionalGeneration, processor: Any, folder: Path) -> None:
    """Save all but the weights: configuration, tokenizer, processor and chat template."""
    config: dict[str, Any] = model.config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"]}
    special_ids = {name: config["text_config"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Stored as half, computed in float32: then transformers and a server of any kind start from the same numbers.
    config["dtype"] = config["text_config"]["dtype"] = config["vision_config"]["dtype"] = "float32"
    for name, content in (("config", config), ("generation_config", special_ids | {"do_sample": False})):
        write_text(folder / f"{name}.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
    with TemporaryDirectory(dir=folder) as temporary:
        processor.save_pretrained(temporary)
        path = Path(temporary) / "tokenizer_config.json"
        # transformers 5 names a class that 4 does not have; both know this one.
        settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)
