"""Training the embedded verifier: right answers, a loss that falls, and a stopped training that ends the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import OPTIONS, OneLine
from tiny_training import quiet

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.mllm.in_transformers import TransformersClient
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.walk import RunFolder, write_photos
from rag_geotoken.training.mllm import examples as verifier_examples
from rag_geotoken.training.mllm import train as verifier
from rag_geotoken.training.mllm.examples import Examples, Prompt, read_examples
from rag_geotoken.training.mllm.train import train_verifier
from rag_geotoken.training.mllm.words import END, IMAGE, LETTERS

SOURCE = "blue-marble:train,n=40,seed=5"
NUMBERS: dict[str, Any] = {
    "source": SOURCE, "held_out": 8, "vocabulary": 700, "steps": 4, "batch": 8, "views": 4, "rate": 1e-3, "seed": 0
}  # fmt: skip


class Stop(Exception):
    """What stops a training in the middle."""


@pytest.fixture(scope="module")
def examples(geolocator: Geolocator, tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder = tmp_path_factory.mktemp("verifier-photos")
    write_photos(folder, SOURCE)
    walked, options = RunFolder(folder, geolocator), replace(OPTIONS, verify=("alignment", "visual"))
    tables = walked.tables(options, walked.walk(options, until="verdicts-alignment"))
    return read_examples(tables, geolocator.index, geolocator.tuning)


def drawn(examples: Examples, count: int = 400) -> list[tuple[int, Prompt]]:
    rng = np.random.default_rng(0)
    rows = rng.integers(len(examples.images), size=count).tolist()
    return [(i, examples.prompt(i, rng)) for i in rows]


def lines(prompt: Prompt) -> dict[str, tuple[float, float]]:
    """What the prompt says of each letter's place."""
    found = {}
    for line in prompt.text.splitlines():
        letter, _, rest = line.partition(": ")
        if letter in list(LETTERS[:-1]):
            lat, lon, *_ = rest.split(";")[0].split(", ")
            found[letter] = float(lat), float(lon)
    return found


def test_the_answer_is_the_nearest_candidate_or_none(examples: Examples) -> None:
    prompts, rng, answers = drawn(examples), np.random.default_rng(1), []
    # Untrained models find few right places: photos with one are asked about more often.
    found = sorted({i for i, prompt in prompts if prompt.answer in LETTERS[:-1]})
    for i, prompt in prompts + [(i, examples.prompt(i, rng)) for i in found for _ in range(200)]:
        if prompt.answer not in LETTERS:
            continue
        km = {letter: haversine_km(*examples.truth[i], *place) for letter, place in lines(prompt).items()}
        assert list(km) == list(LETTERS[: len(km)]) and len(km) == len(prompt.distances_km)
        assert np.allclose(list(km.values()), prompt.distances_km, atol=10)  # said to a tenth of a degree
        nearest = min(prompt.distances_km, default=np.inf)
        expected = LETTERS[prompt.distances_km.index(nearest)] if nearest <= 200 else "Z"
        assert prompt.answer == expected
        answers.append(expected)
    assert {"A", "B", "Z"} <= set(answers)  # in an order that says nothing


def test_every_way_to_ask_occurs_and_shows_its_pictures(examples: Examples) -> None:
    prompts = drawn(examples)
    assert all(p.text.count(IMAGE) == 16 * len(p.pictures) and p.pictures[0] == examples.images[i] for i, p in prompts)
    assert any(len(p.pictures) > 1 for _, p in prompts)
    said = [p.text for _, p in prompts]
    assert any("; place" in text for text in said) and any("; place" not in text for text in said)
    free = [(i, json.loads(p.answer.removesuffix(END))) for i, p in prompts if p.answer.endswith(END)]
    assert free and all(haversine_km(*examples.truth[i], a["latitude"], a["longitude"]) < 10 for i, a in free)


def test_without_the_right_candidates_the_answer_is_none(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier_examples, "ABSENT", 1.0)
    assert {p.answer for _, p in drawn(examples) if p.answer in LETTERS} == {"Z"}


@pytest.fixture
def train(examples: Examples, alignment: GeoAlignment) -> Callable[..., Path]:
    def call(out: Path, identity: str = "a", log: Callable[[str], None] = quiet, **changes: Any) -> Path:
        train_verifier(examples, alignment, out, identity, **NUMBERS | changes, log=log)
        return out

    return call


@pytest.mark.slow
def test_a_stopped_training_ends_in_the_same_bytes(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "CHECKS", 4)
    whole, counted = train(tmp_path / "whole"), [0]

    def stop(line: str) -> None:
        counted[0] += 1
        if counted[0] == 2:
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path / "stopped", log=stop)
    before = (tmp_path / "stopped" / "model.safetensors").read_bytes()
    again = train(tmp_path / "stopped")
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    assert before != (again / "model.safetensors").read_bytes()
    other = train(tmp_path / "other", seed=1)
    assert (whole / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    TransformersClient(whole)


@pytest.mark.slow
def test_training_learns(train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "CHECKS", 4)
    said: list[str] = []
    train(tmp_path / "out", steps=12, batch=16, rate=3e-3, log=said.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in said]
    assert losses[-1] < losses[0] / 2


def test_too_few_photos_are_named(train: Callable[..., Path], tmp_path: Path, one_line: OneLine) -> None:
    with one_line("40 photos, 8 of them held out, do not fill a batch of 33"):
        train(tmp_path / "out", batch=33)
