"""Checkpoints: what was saved comes back exactly, of the same training only, and a broken file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import OneLine
from torch import Tensor, nn

from rag_geotoken.training.checkpoint import load_checkpoint, save_checkpoint

FACTS = {"identity": "a", "step": 3, "best": 0.1 + 0.2}


def made(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def stepped(model: nn.Module, optimizer: torch.optim.AdamW, steps: int) -> dict[str, Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(6.0).view(2, 3)).square().sum().backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint after three steps."""
    model, optimizer = made(0)
    stepped(model, optimizer, 3)
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, FACTS)
    return tmp_path / "c.safetensors"


def test_what_was_saved_goes_on_as_if_nothing_had_been(path: Path) -> None:
    expected = stepped(*made(0), 5)
    model, optimizer = made(1)
    assert load_checkpoint(path, model, optimizer, "a") == FACTS
    found = stepped(model, optimizer, 2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(stepped(*made(0), 4)["0.weight"], expected["0.weight"])


def test_the_same_state_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    model, optimizer = made(1)
    load_checkpoint(path, model, optimizer, "a")
    save_checkpoint(tmp_path / "again", model, optimizer, FACTS)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"c.safetensors", "again"}


def test_another_training_s_is_left_alone(path: Path, tmp_path: Path) -> None:
    model, optimizer = made(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert load_checkpoint(path, model, optimizer, "b") is None
    assert load_checkpoint(tmp_path / "none", model, optimizer, "a") is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\xff" * 100, None], ids=["empty", "text", "bytes", "cut"])
def test_a_broken_file_is_named(content: bytes | None, path: Path, one_line: OneLine) -> None:
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with one_line("c.safetensors is broken: .*delete it to begin again"):
        load_checkpoint(path, *made(1), "a")


@pytest.mark.parametrize("facts", [None, "[]", "{", '{"step": 3}', "[" * 100_000], ids=str)
def test_facts_that_are_none_are_named(facts: str | None, path: Path, one_line: OneLine) -> None:
    save_file(load_file(path), path, None if facts is None else {"facts": facts})
    with one_line("c.safetensors is broken"):
        load_checkpoint(path, *made(1), "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.9.weight": torch.zeros(2)}, "1 tensors do not fit, model.9.weight"),
        ({"optimizer.6.exp_avg": torch.zeros(2)}, "optimizer.6.exp_avg"),
        ({"optimizer.x.exp_avg": torch.zeros(2)}, "optimizer.x.exp_avg"),
        ({"optimizer": torch.zeros(2)}, "optimizer"),
        ({"foreign": torch.zeros(2)}, "foreign"),
        ({"model.0.weight": torch.zeros(4, 4)}, "model.0.weight"),
        ({"optimizer.0.exp_avg": torch.zeros(3, 4)}, "optimizer.0.exp_avg"),
        ({"optimizer.0.step": torch.zeros(1)}, "optimizer.0.step"),
        ({"model.0.bias": None}, "model.0.bias"),
        ({"optimizer.2.exp_avg_sq": None}, "optimizer.2.exp_avg_sq"),
    ],
)
def test_tensors_of_something_else_are_named(change: dict[str, Any], words: str, path: Path, one_line: OneLine) -> None:
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["facts"]) == FACTS
    tensors = {name: value for name, value in (load_file(path) | change).items() if value is not None}
    save_file(tensors, path, {"facts": json.dumps(FACTS)})
    with one_line(f"c.safetensors is broken: .*{words}"):
        load_checkpoint(path, *made(1), "a")
