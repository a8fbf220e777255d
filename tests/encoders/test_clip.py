"""CLIP from a folder: the features of transformers, pictures prepared as CLIP's own, one line when it is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import OneLine
from tiny_clip import save_clip, save_pictures
from torch import Tensor

from rag_geotoken.encoders.clip import ClipEncoder
from rag_geotoken.photos.pictures import load_pictures


@pytest.fixture(scope="module")
def encoder(clip_folder: Path) -> ClipEncoder:
    return ClipEncoder.from_pretrained(clip_folder)


@pytest.fixture
def folder(clip_folder: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return shutil.copytree(clip_folder, tmp_path / "clip")


def pooled(output: Any) -> Tensor:
    """What get_image_features returns: a tensor in transformers 4, an object around it in 5."""
    return getattr(output, "pooler_output", output)


def test_features_are_those_of_the_whole_clip(encoder: ClipEncoder, clip_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    whole, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    pixels, _ = load_pictures(save_pictures(tmp_path, 5), encoder.size)
    texts = ["a fjord with red houses", "desert"]
    with torch.no_grad():
        images = pooled(whole.get_image_features(pixel_values=encoder.normalized(pixels)))
        words = pooled(whole.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")))
    assert (encoder.dim, encoder.size) == (768, 224) and images.std(dim=0).mean() > 0.1
    torch.testing.assert_close(encoder.images(pixels, batch=2), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.texts(texts, batch=1), words, rtol=0, atol=1e-5)


def test_pictures_are_prepared_as_clips_own(encoder: ClipEncoder, clip_folder: Path, tmp_path: Path) -> None:
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers 4
        from transformers import CLIPImageProcessor as Processor
    paths = save_pictures(tmp_path, 4)
    pixels, _ = load_pictures(paths, encoder.size)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    wanted = Processor.from_pretrained(clip_folder)(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder.normalized(pixels), wanted, rtol=0, atol=1e-6)


def test_a_long_text_is_cut(encoder: ClipEncoder) -> None:
    longest, longer = encoder.texts(["x" * 300, "x" * 300 + " y"])
    assert torch.equal(longest, longer) and torch.isfinite(longest).all()


@pytest.mark.parametrize("nested", [False, True])
def test_the_folders_own_mean_and_spread_count(folder: Path, encoder: ClipEncoder, nested: bool) -> None:
    (folder / "preprocessor_config.json").unlink()
    assert ClipEncoder.from_pretrained(folder).identity() == encoder.identity()  # CLIP's own where none are told
    own = {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 1.0]}
    if nested:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(own))
    changed, white = ClipEncoder.from_pretrained(folder), np.full((1, 224, 224, 3), 255, np.uint8)
    assert changed.normalized(white)[0, :, 0, 0].tolist() == [1.0, 1.5, 0.5]
    assert changed.identity() != encoder.identity()


def test_half_precision_files_are_computed_in_full(folder: Path, encoder: ClipEncoder) -> None:
    path = folder / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "float16", "torch_dtype": "float16"}))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    embeddings = ClipEncoder.from_pretrained(folder).images(pixels)
    torch.testing.assert_close(embeddings, encoder.images(pixels), rtol=0, atol=0.02)
    assert embeddings.dtype == torch.float32 and not torch.equal(embeddings, embeddings.half().float())


def test_quietly(clip_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = ClipEncoder.from_pretrained(clip_folder)
    encoder.images(np.zeros((1, 224, 224, 3), np.uint8))
    encoder.texts(["a"])
    assert capfd.readouterr() == ("", "")


def test_a_model_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine) -> None:
    import huggingface_hub

    requests = []

    def unreachable(name: str, **given: object) -> str:
        requests.append("machine" if given.get("local_files_only") else "hub")
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub\nmore words")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    with one_line(r"openai/clip-vit-large-patch14 is not on this machine .*hf download openai/clip.*--backbone DIR"):
        ClipEncoder.from_pretrained()
    assert requests == ["machine", "hub"]
    monkeypatch.undo()
    with one_line("there is no folder .*nowhere"):
        ClipEncoder.from_pretrained(tmp_path / "nowhere")


def test_a_model_on_this_machine_is_not_asked_for(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def cached(name: str, local_files_only: bool = False, **_: object) -> str:
        assert local_files_only, "the hub was asked for what is here"
        return str(clip_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    monkeypatch.setattr(huggingface_hub, "model_info", cached)
    assert ClipEncoder.from_pretrained("someone/clip").folder == clip_folder


@pytest.mark.parametrize("field", ["_attn_implementation_internal", "attn_implementation", "_attn_implementation"])
def test_code_that_a_folder_names_is_not_run(folder: Path, encoder: ClipEncoder, field: str) -> None:
    settings = json.loads((folder / "config.json").read_text()) | {field: "someone/kernel"}
    for tower in ("vision_config", "text_config"):
        settings[tower] = settings[tower] | {field: "someone/kernel"}
    (folder / "config.json").write_text(json.dumps(settings))
    picture, changed = np.zeros((1, 224, 224, 3), np.uint8), ClipEncoder.from_pretrained(folder)
    assert torch.equal(changed.images(picture), encoder.images(picture))
    assert torch.equal(changed.texts(["a"]), encoder.texts(["a"]))
    assert changed._vision.config._attn_implementation == changed._text[0].config._attn_implementation == "sdpa"


def test_what_is_wrong_is_named(folder: Path, one_line: OneLine) -> None:
    path, settings = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    whole = load_file(path)
    picture = np.zeros((1, 224, 224, 3), np.uint8)

    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file({key: value for key, value in whole.items() if key != name}, path, {"format": "pt"})
    with one_line(f"cannot be used as a CLIP: its weights lack .*{name.removeprefix('vision_model.')}"):
        ClipEncoder.from_pretrained(folder).images(picture)
    save_file(whole | {"visual_projection.weight": torch.ones(5, 32)}, path, {"format": "pt"})
    with one_line("cannot be used as a CLIP"):
        ClipEncoder.from_pretrained(folder).images(picture)
    path.write_bytes(path.read_bytes()[:1000])
    with one_line("cannot be used as a CLIP"):
        ClipEncoder.from_pretrained(folder).images(picture)
    path.rename(folder / "pytorch_model.bin")
    with one_line(r"holds no model\.safetensors"):
        ClipEncoder.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "bert"}))
    with one_line("is no CLIP by its config.json"):
        ClipEncoder.from_pretrained(folder)
    (folder / "config.json").unlink()
    with one_line(r"there is no .*config\.json"):
        ClipEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "settings", ["[]", '{"image_mean": "gray"}', '{"image_std": [1, 1, 0]}', '{"image_mean": [0.5]}']
)
def test_unusable_mean_or_spread(folder: Path, settings: str, one_line: OneLine) -> None:
    (folder / "preprocessor_config.json").write_text(settings)
    with one_line("no usable mean and deviation of the colors"):
        ClipEncoder.from_pretrained(folder)


def test_a_missing_tokenizer_only_stops_texts(folder: Path, one_line: OneLine) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    encoder = ClipEncoder.from_pretrained(folder)
    assert encoder.images(np.zeros((1, 224, 224, 3), np.uint8)).shape == (1, 768)
    with one_line("holds no tokenizer, so no texts"):
        encoder.texts(["a"])
    (folder / "tokenizer.json").write_text("{")
    with one_line("holds no tokenizer that can be used"):
        encoder.texts(["a"])


def test_other_sizes_and_nothing(tmp_path: Path) -> None:
    encoder = ClipEncoder.from_pretrained(save_clip(tmp_path / "small", dim=16))
    assert encoder.dim == 16 and encoder.texts([]).shape == (0, 16)
    for count in (0, 2):
        assert encoder.images(np.zeros((count, 224, 224, 3), np.uint8)).shape == (count, 16)
