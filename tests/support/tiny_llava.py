"""A tiny LLaVA with random weights, saved to a folder: what any LLaVA of a hub looks like, in 2 MB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rag_geotoken.mllm.pictures import encode_picture
from rag_geotoken.mllm.request import Request

LETTERS = "ABCDEFGHZ"
TEXT = (
    "Where was this photo taken? Candidates follow, each with a letter. Answer with one letter or in JSON.",
    '{"latitude": 48.21, "longitude": -16.37, "confidence": 70}',
    "A: 48.2, 16.4, Vienna, Austria, Europe; 3 neighbors, alike 81; place 64; generated -1.2; match 45",
    "B: -33.9, 151.2, Sydney, Australia, Oceania; 5 neighbors, alike 77; place 12; generated -0.3; match 9",
    "Z: none of these. Answer: 0 1 2 3 4 5 6 7 8 9",
)
TEMPLATE = (
    "{% for message in messages %}{{ '<user>' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def save_llava(folder: Path, seed: int = 0) -> Path:
    """Saves model, tokenizer, processor and chat template; pictures become 32 x 32 px, 16 tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = llava_processor()
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    drawn(LlavaForConditionalGeneration, config, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    _rename(folder / "model.safetensors")
    return folder


def drawn(kind: Any, config: Any, seed: int) -> Any:
    """A model of some kind with random weights, so large that answers depend on pictures and places."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(0.0, 0.6 if "lm_head" in name else 0.15)
    return model


def llava_processor():  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True, do_resize=True
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    )


def _rename(path: Path) -> None:
    """The server, vLLM 0.32, wants the vision tower's weights under one more name; transformers loads either."""
    weights = load_file(path)
    renamed = {}
    for name, weight in weights.items():
        prefix, tower, rest = name.partition("vision_tower.")
        if tower and not rest.startswith("vision_model."):
            name = f"{prefix}{tower}vision_model.{rest}"
        renamed[name] = weight.contiguous()
    save_file(renamed, path, metadata={"format": "pt"})


INSTRUCTIONS = "Where was this photo taken? Candidates follow the photo, each with a letter. Answer with one letter.\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "latitude": {"type": "number"},
        "longitude": {"type": "number"},
        "confidence": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["latitude", "longitude", "confidence"],
    "additionalProperties": False,
}


def sample_request(number: int, picture: bytes | None = None, **free: Any) -> Request:
    """A pool of 2 to 8 places about a random picture, unless one is given; with `free`, no options but these fields."""
    rng = np.random.default_rng(number)
    letters = LETTERS[: int(rng.integers(2, 9))]
    lines = [
        f"{letter}: {rng.uniform(-90, 90):.1f}, {rng.uniform(-180, 180):.1f}, Vienna, Austria; alike {rng.integers(99)}"
        for letter in letters
    ]
    squares = rng.integers(0, 255, (8, 8, 3)).repeat(6, 0).repeat(6, 1).astype(np.uint8)
    parts = (
        INSTRUCTIONS,
        picture or encode_picture(Image.fromarray(squares), 512),
        "\n".join(["", *lines, "Z: none", "Answer:"]),
    )
    return Request(parts, **free) if free else Request(parts, options=(*letters, "Z"))
