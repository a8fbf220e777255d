"""A tiny Qwen2.5-VL with random weights, saved to a folder: pictures of any size, and a processor of videos too."""

from __future__ import annotations

from pathlib import Path

from tiny_llava import TEMPLATE, drawn, llava_processor

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def save_qwen(folder: Path, seed: int = 0) -> Path:
    """Saves model, tokenizer, processor and chat template; a picture becomes at most 16 tokens."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = llava_processor().tokenizer
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    ends = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    tokenizer.add_special_tokens({"additional_special_tokens": [*names.values(), *ends.values()]})
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**patches, min_pixels=28 * 28, max_pixels=16 * 28 * 28),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE.replace("<image>", PICTURE),
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(text) for name, text in (names | ends).items()},
    )
    drawn(Qwen2_5_VLForConditionalGeneration, config, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
