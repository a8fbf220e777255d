"""The embedded verifier as a folder: one token a letter and a number, prompts in and out, half precision, 5 MB."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rag_geotoken.mllm.in_transformers import TransformersClient
from rag_geotoken.mllm.prompts import render
from rag_geotoken.mllm.request import Request
from rag_geotoken.training.mllm.model import make_model, save_folder, save_weights
from rag_geotoken.training.mllm.words import IMAGE, LETTERS, make_processor, make_tokenizer

PLACES = ["Vienna, Austria, Europe", "São Luís, Brazil, South America", "Nuuk, Greenland, North America"]


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def parts(count: int = 3) -> tuple[str | bytes, ...]:
    known = {"neighbors": 3, "alike": 81, "place": 64, "generated": -1.2, "match": 45, "agree": 2}
    listed = [
        {"letter": letter, "lat": 48.2 - 30 * i, "lon": -16.4 * i, "place": place, "evidence": known}
        for i, (letter, place) in enumerate(zip(LETTERS[:count], PLACES, strict=False))
    ]
    return render("pool", {"photo": png()}, candidates=listed)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    corpus = [part for part in parts() if isinstance(part, str)] * 3
    return make_tokenizer([*corpus, '{"latitude": -48.2, "longitude": 16.4, "confidence": 70}'] * 3, 1500)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "verifier"
    out.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(tokenizer)
    save_folder(model, make_processor(tokenizer), out)
    save_weights(model, out / "model.safetensors")
    return out


def test_letters_and_numbers_are_single_tokens(tokenizer: Any) -> None:
    for letter in LETTERS:
        assert len(tokenizer.encode(letter)) == 1
        said = tokenizer.encode(f"\n{letter}: 1.0, 2.0\nAnswer:")
        assert said[1] == tokenizer.encode(letter)[0]  # the letter of a line is the letter that answers
    for number in range(181):
        assert len(tokenizer.encode(str(number))) == 1
        assert len(tokenizer.encode(f"A: -{number}.7, -{number}.0")) == 7
        whole, tenth = tokenizer.encode(f"{number}.7")
        assert [whole, tenth] == [tokenizer.encode(str(number))[0], tokenizer.encode("0.7")[1]]
    for number in range(101):
        for words in ("; neighbours ", ", alike ", "; place ", "; match ", ", agreeing "):
            assert len(tokenizer.encode(f"{words}{number}")) == 1
        assert len(tokenizer.encode(f"; generated -{number / 10:.1f}")) == (1 if number < 100 else 3)
    assert len(tokenizer.encode("; place 101")) == 2  # no more than a number by itself


@pytest.mark.parametrize(
    "text", ["Ürümqi, 中国; place 7\nZ: none of these", '{"latitude": -48.25}', " \t\n\n  ", "🙂A:", "; place 1234567"]
)
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_corpus_gives_the_same_tokenizer(tokenizer: Any) -> None:
    corpus = ["a line of words, 12.5\n"] * 5
    first, again = (make_tokenizer(corpus, 600).backend_tokenizer.to_str() for _ in range(2))
    assert first == again != make_tokenizer(["other words"], 600).backend_tokenizer.to_str()


def test_a_prompt_comes_back_from_the_processor_with_its_picture(folder: Path) -> None:
    processor = TransformersClient(folder).processor
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts()]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    picture = Image.open(io.BytesIO(png()))
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    said = processor.tokenizer.decode(inputs["input_ids"][0])
    assert said.replace(IMAGE * 16, IMAGE) == "<s>" + "".join(p if isinstance(p, str) else IMAGE for p in parts())
    pixels = (torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255 - 0.4) / 0.25
    torch.testing.assert_close(inputs["pixel_values"][0], pixels, atol=1e-5, rtol=0)


def test_the_folder_is_small_half_precision_and_under_the_hubs_names(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5_000_000
    tensors = load_file(folder / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    starts = ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector.")
    assert all(name.startswith(starts) for name in tensors)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["dtype"] == "float32"
    assert config["text_config"]["head_dim"] == 32
    assert "/" not in (folder / "tokenizer_config.json").read_text().replace("</s>", "")  # no path of a machine


def test_what_is_loaded_is_what_was_saved(folder: Path, tokenizer: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = make_model(tokenizer).state_dict()
    loaded = TransformersClient(folder).network.state_dict()
    assert made.keys() == loaded.keys()
    assert all(torch.equal(value.half().float(), loaded[name]) for name, value in made.items())


def test_it_answers_a_request_and_looks_at_the_picture(folder: Path) -> None:
    said = parts()
    blank = tuple(png(9) if isinstance(part, bytes) else part for part in said)
    options = ("A", "B", "C", "Z")
    replies = dict(TransformersClient(folder).ask([Request(said, options), Request(blank, options)]))
    chances = np.exp([replies[i].log_probs for i in range(2)])
    assert np.allclose(chances.sum(axis=1), 1, atol=1e-5) and not np.allclose(chances[0], chances[1], atol=1e-6)


@pytest.mark.parametrize("words", ["{}", "; place {}"])
def test_numbers_begin_in_order(tokenizer: Any, words: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = make_model(tokenizer).get_input_embeddings().weight.detach()
    rows = torch.nn.functional.normalize(weight[[tokenizer.encode(words.format(n))[0] for n in range(101)]], dim=1)
    near, far, furthest = ((rows @ rows.T).diagonal(gap).mean() for gap in (1, 20, 90))
    assert near > far + 0.05 > furthest + 0.1
