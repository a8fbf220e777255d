"""A training small enough for a test, in this process or in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import ALIGNMENT, TOKENS, TUNING
from torch import Tensor

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.photos.blue_marble import cut, draw_views
from rag_geotoken.storage.recipes import training_recipe
from rag_geotoken.tokens.model import TokenConfig
from rag_geotoken.training import tokens
from rag_geotoken.training.tokens import Losses, Photos

GALLERY = "blue-marble:gallery,n=60"
# Tuning has one number of each grid to choose from: what takes its time is the choice.
NO_CHOICE = {
    group: {name: [getattr(TUNING, name)] for name in grid}
    for group, grid in training_recipe(None)["tuning"]["grid"].items()
}
SETTINGS: dict[str, Any] = {
    "source": "blue-marble:train,n=48,seed=1",
    "held_out": 10,
    "neighbor_positions": "spherical",
    "epochs": 5,
    "batch": 8,
    "rate": 1e-2,
    "seed": 1,
}


def quiet(line: str) -> None:
    assert "nan" not in line


class Stop(Exception):
    """This stops a training in the middle."""


def stop_after(checks: int) -> Callable[[str], None]:
    """Return a log that stops a training when it has been called so often."""
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if len(lines) == checks:
            raise Stop

    return log


def files(out: Path, checkpoint: str = "checkpoint") -> dict[str, bytes]:
    """Return the contents of the weights in a folder and of the checkpoint beside it."""
    paths = [*out.glob("*.*"), out.with_name(f"{out.name}-{checkpoint}.safetensors")]
    return {path.name: path.read_bytes() for path in paths}


@contextmanager
def single_precision() -> Iterator[None]:
    """Train as ``accelerate launch --mixed_precision no`` does; accelerate knows one precision a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def save_pictures(folder: Path, places: list[str], split: str = "train", seed: int = 0, of: int = 0) -> str:
    """Save the first views of so many as PNG files, with places ("LAT,LON") in photos.csv, and return the source."""
    folder.mkdir(exist_ok=True)
    lines = [f"{i:02}.png,{place}" for i, place in enumerate(places)]
    for i, pixels in enumerate(cut(draw_views(split, of or len(places), seed)[: len(places)])):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (folder / "photos.csv").write_text("\n".join(["file,lat,lon", *lines, ""]))
    return f"folder:{folder}"


def save_alignment(folder: Path) -> Path:
    """A folder with an untrained tiny alignment, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GeoAlignment(ALIGNMENT).save_pretrained(folder)
    return folder


@contextmanager
def tiny() -> Iterator[None]:
    """Trainings of recipes have a tiny token model; DROPOUT in the environment is heard."""

    def config(**changes: Any) -> TokenConfig:
        return replace(TOKENS, dropout=float(os.environ.get("DROPOUT", "0.1")), **changes)

    with patch.object(tokens, "TokenConfig", config):
        yield


def toml(value: Any) -> str:
    """Return a value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(each)}" for name, each in value.items()) + "}"
    return json.dumps(value)


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe as a file."""
    path.write_text("".join(f"{name} = {toml(value)}\n" for name, value in recipe.items()))
    return path


def start(arguments: list[str], processes: int = 1, **environment: str) -> subprocess.Popen[str]:
    """``rag-geotoken ARGUMENTS`` as above in a process of its own, or in several of torchrun."""
    program = [sys.executable, "-c", "import tiny_training; tiny_training.main()", *arguments]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python"]
        program = [sys.executable, *torchrun, *program]
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(program, env=os.environ | here | environment, stderr=subprocess.PIPE, text=True)


def main() -> None:
    """What :func:`start` runs. NOTES gets a line for each file written and each batch trained on: rank, what, which."""
    from rag_geotoken.cli.app import main as command_line

    put, memory = os.replace, Losses.memory

    def note(what: str, which: object) -> None:
        if "NOTES" in os.environ:
            with open(os.environ["NOTES"], "a") as file:
                file.write(f"{os.environ.get('RANK', '0')} {what} {which}\n")

    def noted_put(source: Path, target: Path) -> None:
        note("wrote", Path(target).name)
        put(source, target)

    def noted_memory(self: Losses, photos: Photos, drawn: Tensor) -> Tensor:
        if self.training:
            note("drew", ",".join(map(str, drawn.tolist())))
        return memory(self, photos, drawn)

    with tiny(), patch.object(os, "replace", noted_put), patch.object(Losses, "memory", noted_memory):
        command_line()
