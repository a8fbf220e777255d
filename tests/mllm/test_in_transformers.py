"""A multimodal model in process: the same folder, the same answers whatever else is asked."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import OneLine
from tiny_llava import sample_request, save_llava
from tiny_qwen import PICTURE, save_qwen

from rag_geotoken.mllm import Reply, Request, open_client
from rag_geotoken.mllm.in_transformers import BATCH, TransformersClient
from rag_geotoken.mllm.pictures import decode_picture, encode_picture

REQUESTS = [sample_request(number) for number in range(2 * BATCH + 5)]


@pytest.fixture(scope="module")
def client(llava: Path) -> TransformersClient:
    client = open_client(str(llava))
    assert isinstance(client, TransformersClient)
    return client


def ask(client: TransformersClient, requests: Sequence[Request]) -> list[Reply]:
    replies = dict(client.ask(requests))
    assert sorted(replies) == list(range(len(requests)))
    return [replies[position] for position in range(len(requests))]


def answers(replies: Sequence[Reply]) -> list[tuple[object, ...]]:
    return [(reply.texts, reply.log_probs, reply.prompt_tokens, reply.output_tokens, reply.error) for reply in replies]


def test_options_are_judged_by_the_logits_after_the_prompt(client: TransformersClient) -> None:
    replies = ask(client, REQUESTS[:3])
    for request, reply in zip(REQUESTS, replies, strict=False):
        instructions, picture, pool = request.parts
        assert isinstance(picture, bytes)
        inputs = client.processor(
            text=[f"<user>{instructions}<image>{pool}<assistant>"],
            images=[decode_picture(picture)],
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits = client.network(**inputs).logits[0, -1]
        letters = [client.processor.tokenizer.convert_tokens_to_ids(option) for option in request.options]
        np.testing.assert_allclose(reply.log_probs, logits[letters].log_softmax(-1), atol=1e-4)
        assert reply.texts == (request.options[int(np.argmax(reply.log_probs))],)
        assert (reply.prompt_tokens, reply.output_tokens) == (inputs["input_ids"].shape[1], 1)
        assert reply.seconds > 0 and reply.error is None
    assert len({reply.texts for reply in ask(client, REQUESTS)}) > 2


def test_a_model_of_another_family(tmp_path: Path) -> None:
    """Qwen-VL: pictures keep their shapes, positions have three axes, the processor takes videos too."""
    client = TransformersClient(save_qwen(tmp_path / "qwen"))
    rng, sizes = np.random.default_rng(0), [(64, 64), (96, 40), (40, 96), (200, 200)]
    pictures = [encode_picture(Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)), 512) for size in sizes]
    requests = [sample_request(number, pictures[number % 4]) for number in range(BATCH + 4)]
    replies = ask(client, requests)
    assert answers(ask(client, requests[::-1]))[::-1] == answers(replies)
    assert len({reply.texts for reply in replies}) > 2
    for request, reply in list(zip(requests, replies, strict=True))[:4]:
        instructions, picture, pool = request.parts
        assert isinstance(picture, bytes) and reply.error is None
        text = [f"<user>{instructions}{PICTURE}{pool}<assistant>"]
        inputs = client.processor(text=text, images=[decode_picture(picture)], return_tensors="pt")
        with torch.inference_mode():
            logits = client.network(**inputs).logits[0, -1]
        letters = [client.processor.tokenizer.convert_tokens_to_ids(option) for option in request.options]
        np.testing.assert_allclose(reply.log_probs, logits[letters].log_softmax(-1), atol=1e-4)


def test_a_processor_of_videos_without_torchvision(
    tmp_path: Path, one_line: OneLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_qwen(tmp_path / "qwen")

    def missing(*given: object, **named: object) -> None:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr("transformers.AutoVideoProcessor.from_pretrained", missing)
    with one_line("qwen takes videos too, and its processor needs torchvision: install the one that fits your torch"):
        TransformersClient(folder)


def test_an_answer_does_not_depend_on_its_company(client: TransformersClient) -> None:
    whole = answers(ask(client, REQUESTS))
    assert answers(ask(client, REQUESTS[::-1]))[::-1] == whole
    assert answers(ask(client, REQUESTS[7:20:3])) == whole[7:20:3]
    assert answers(ask(client, REQUESTS[4:5])) == whole[4:5]


def test_free_answers(client: TransformersClient) -> None:
    free = [sample_request(number, max_tokens=12) for number in range(BATCH + 3)]
    whole = ask(client, free)
    assert len({reply.texts for reply in whole}) > 3
    assert answers(ask(client, free[5:9])) == answers(whole[5:9])
    assert all(1 <= reply.output_tokens <= 12 and not reply.log_probs for reply in whole)
    (three,) = ask(client, [replace(free[0], n=3)])
    assert three.texts == whole[0].texts * 3 and three.output_tokens == 3 * whole[0].output_tokens


def test_samples_follow_from_their_seed(client: TransformersClient) -> None:
    one = sample_request(0, max_tokens=8, temperature=1.0, n=4)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, other, again = ask(client, [one, replace(one, seed=1), one])
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.texts == again.texts != other.texts and len(set(first.texts)) > 1 and len(first.texts) == 4
    (letters,) = ask(client, [replace(REQUESTS[0], temperature=50.0, n=60)])
    assert (
        set(letters.texts) == set(REQUESTS[0].options) and letters.log_probs == ask(client, REQUESTS[:1])[0].log_probs
    )


def test_the_end_of_an_answer(client: TransformersClient) -> None:
    ends = client.processor.tokenizer.eos_token_id
    new = torch.tensor([[[40, 41, ends, 0], [40, 41, 42, 43]]])
    prompt = client._prompt(0, sample_request(0, max_tokens=4, n=2))
    assert not isinstance(prompt, str)
    (reply,) = client._texts([prompt], new)
    assert reply.output_tokens == 3 + 4 and reply.texts[0] == client.processor.tokenizer.decode([40, 41])


def test_a_bad_request_costs_itself_alone(client: TransformersClient) -> None:
    first, second = REQUESTS[:2]
    bad = [
        replace(first, parts=(first.parts[0], b"\x89PNG no picture", first.parts[2])),
        replace(first, parts=(*first.parts, "x" * 50_000)),
        replace(first, parts=(*first.parts, "<image>")),
        replace(first, options=(), max_tokens=5000),
    ]
    replies = ask(client, [first, *bad, second])
    assert answers([replies[0], replies[-1]]) == answers(ask(client, [first, second]))
    for reply, words in zip(replies[1:-1], ("is broken", "exceed the 2048", "refuses|failed", "exceed"), strict=True):
        assert (
            not reply.texts and not reply.log_probs and reply.error is not None and len(reply.error.splitlines()) == 1
        )
        assert any(word in reply.error for word in words.split("|"))


def test_several_pictures_and_none(client: TransformersClient) -> None:
    pictures = [request.parts[1] for request in REQUESTS[:3]]
    request = Request(("Photo", pictures[0], "A", pictures[1], "B", pictures[2], "Answer:"), options=("A", "B", "Z"))
    turned = replace(request, parts=("Photo", pictures[0], "A", pictures[2], "B", pictures[1], "Answer:"))
    first, second, bare = ask(client, [request, turned, Request(("Answer:",), options=("A", "B"))])
    assert first.prompt_tokens == second.prompt_tokens and first.log_probs != second.log_probs
    assert bare.error is None and len(bare.log_probs) == 2


def test_identity(client: TransformersClient, tmp_path: Path) -> None:
    same, other = save_llava(tmp_path / "tiny-llava"), save_llava(tmp_path / "other" / "tiny-llava", seed=1)
    assert TransformersClient(same).model == client.model
    assert TransformersClient(other).model != client.model
    template = same / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert TransformersClient(same).model != client.model


def test_folders_that_are_no_model(llava: Path, tmp_path: Path, one_line: OneLine) -> None:
    with one_line("holds no multimodal model: it needs config.json and model.safetensors"):
        open_client(str(tmp_path))
    with one_line("--mllm-model names a model of a server"):
        open_client(str(llava), "tiny")
    broken = shutil.copytree(llava, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with one_line("cannot be used as a multimodal model"):
        open_client(str(broken))
    shutil.copy(llava / "model.safetensors", broken)
    (broken / "chat_template.jinja").unlink()
    with one_line("has no chat template"):
        open_client(str(broken))
    config = json.loads((llava / "config.json").read_text())
    code = shutil.copytree(llava, tmp_path / "code")
    foreign = {
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"},
        "model_type": "evil",
    }
    (code / "config.json").write_text(json.dumps({**config, **foreign}))
    (code / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    with one_line("cannot be used as a multimodal model"):
        open_client(str(code))


def test_options_without_a_token_of_their_own(client: TransformersClient, one_line: OneLine) -> None:
    with one_line("no token of its own for the option 'Ж'"):
        next(client.ask([Request(("Answer:",), options=("A", "Ж"))]))


def test_vllm_that_is_not_installed(llava: Path, one_line: OneLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for variable in (
        "VLLM_CPU_KVCACHE_SPACE",
        "TORCHDYNAMO_DISABLE",
        "HF_HUB_OFFLINE",
        "VLLM_NO_USAGE_STATS",
        "DO_NOT_TRACK",
    ):
        monkeypatch.setenv(variable, "1")
    with one_line("vLLM cannot be imported .*: install it, or serve the model"):
        open_client(f"vllm:{llava}")
