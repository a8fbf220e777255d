"""Trainings that were stopped, killed, asked again, or shared by several processes end in the same weights."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TOKENS, OneLine
from tiny_training import (
    GALLERY,
    SETTINGS,
    Stop,
    files,
    quiet,
    save_alignment,
    save_pictures,
    single_precision,
    start,
    stop_after,
    tiny,
    write_recipe,
)

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.options import Options
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.build_index import make_index
from rag_geotoken.run.walk import RunFolder
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.training import loop, run, tokens
from rag_geotoken.training.processes import make_accelerator
from rag_geotoken.training.tokens import Photos, read_photos, train_tokens

NUMBERS: dict[str, Any] = {"epochs": 4, "batch": 16, "rate": 1e-2, "seed": 1}
CONFIG = replace(TOKENS, dropout=0.1)
RECIPE: dict[str, Any] = {"gallery": GALLERY}
Train = Callable[..., TokenModel]


@pytest.fixture(scope="module")
def both(index_folder: Path, geolocator: Geolocator, tmp_path_factory: pytest.TempPathFactory) -> tuple[Photos, Photos]:
    folder = tmp_path_factory.mktemp("photos") / "stages"
    shutil.copytree(index_folder / "stages", folder)
    walked, options = RunFolder(folder, geolocator), Options(neighbors=TOKENS.neighbors)
    tables = walked.tables(options, walked.walk(options, until="neighbors"))
    return read_photos(tables, geolocator.index, TOKENS, held_out=20, seed=1)


@pytest.fixture
def train(gallery: GeoIndex, both: tuple[Photos, Photos]) -> Train:
    def call(out: Path, identity: str = "a", log: Callable[[str], None] = quiet) -> TokenModel:
        train_tokens(CONFIG, gallery, *both, out=out, identity=identity, **NUMBERS, log=log)
        return TokenModel.from_pretrained(out)

    return call


@pytest.fixture
def whole(train: Train, tmp_path: Path) -> dict[str, bytes]:
    """Of a training that ran through; the others have the same name in another folder."""
    train(tmp_path / "whole" / "w")
    return files(tmp_path / "whole" / "w")


def test_stopped_anywhere_ends_in_the_same_bytes(train: Train, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "w"
    for checks in (1, 3, 4):  # stopped after check 1, again after check 4, again after check 8
        with pytest.raises(Stop):
            train(out, log=stop_after(checks))
    assert files(out) != whole
    lines: list[str] = []
    train(out, log=lines.append)
    assert len(lines) == 2 and files(out) == whole
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_stopped_between_weights_and_checkpoint_ends_in_the_same_bytes(
    train: Train, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        train(tmp_path / "w", log=stop_after(3))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            train(tmp_path / "w")
    train(tmp_path / "w")
    assert files(tmp_path / "w") == whole


def test_asked_again_a_finished_training_only_gives_its_weights(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "w"
    first, before = train(out), files(out)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(tokens, "validate", lambda *_: pytest.fail("validated again"))
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("written again"))
    again = train(out)
    assert files(out) == before
    assert all(torch.equal(first.state_dict()[name], value) for name, value in again.state_dict().items())


def test_without_its_best_weights_a_training_begins_anew(train: Train, tmp_path: Path, whole: dict[str, bytes]) -> None:
    train(tmp_path / "w")
    shutil.rmtree(tmp_path / "w")
    train(tmp_path / "w")
    assert files(tmp_path / "w") == whole


def test_a_checkpoint_of_another_recipe_is_not_used(train: Train, tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(Stop):
        train(tmp_path / "w", identity="b", log=stop_after(4))
    lines: list[str] = []
    train(tmp_path / "w", log=lines.append)
    assert len(lines) == 10 and files(tmp_path / "w") == whole


@pytest.mark.parametrize("change", ["place", "seed", "gallery"])
def test_whatever_a_training_follows_from_is_known_again(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[str] = []
    monkeypatch.setattr(tokens, "train_tokens", lambda *_, identity, **__: known.append(identity))
    folder, settings = tmp_path / "photos", SETTINGS | {"source": f"folder:{tmp_path / 'photos'}"}
    out = save_alignment(tmp_path / "w")
    save_pictures(folder, ["10,20", "30,40"])
    recipe = RECIPE | {"tokens": settings}
    with tiny():
        run.train("tokens", recipe, out)
        run.train("tokens", recipe, out)
        if change == "place":
            save_pictures(folder, ["11,20", "30,40"])
        if change == "seed":
            recipe["tokens"] = settings | {"seed": 2}
        index = tmp_path / "other" if change == "gallery" else None
        if index:
            make_index(index, f"{GALLERY},seed=3", GeoAlignment.from_pretrained(out))
        run.train("tokens", recipe, out, index)
    assert known[0] == known[1] != known[2]


@pytest.mark.slow
def test_killed_processes_end_in_the_same_bytes(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.toml", RECIPE | {"tokens": SETTINGS | {"epochs": 25}}
    )  # 150 steps, a check every 15
    killed, through = (save_alignment(tmp_path / name / "w") for name in ("killed", "through"))
    checkpoint = killed.with_name("w-checkpoint.safetensors")
    process = start(["train", "tokens", str(recipe), "--out", str(killed)])
    until = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with tiny():
        run.train("tokens", RECIPE | {"tokens": SETTINGS | {"epochs": 25}}, through)
        assert files(killed) != files(through)
        run.train("tokens", RECIPE | {"tokens": SETTINGS | {"epochs": 25}}, killed)
    assert files(killed) == files(through)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPOUT", "0")  # each process drops its own
    settings = SETTINGS | {"source": "blue-marble:train,n=80,seed=1", "epochs": 2, "batch": 40}  # four steps
    recipe = write_recipe(tmp_path / "recipe.toml", RECIPE | {"tokens": settings})
    alone, shared = (save_alignment(tmp_path / name / "w") for name in ("alone", "shared"))
    with tiny(), single_precision():
        process = start(["train", "tokens", str(recipe), "--out", str(shared)], 2, NOTES=str(tmp_path / "notes"))
        run.train("tokens", RECIPE | {"tokens": settings}, alone)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert {rank for rank, what, _ in notes if what == "wrote"} == {"0"}
    assert notes.count(["0", "wrote", "w-checkpoint.safetensors"]) == said.count(" of 4: ") == 4
    drawn = {rank: [set(which.split(",")) for r, what, which in notes if (r, what) == (rank, "drew")] for rank in "01"}
    assert len(drawn["0"]) == 4
    for first, second in zip(drawn["0"], drawn["1"], strict=True):
        assert len(first) == len(second) == 20 and not first & second
    one, two = (load_file(path.with_name("w-checkpoint.safetensors")) for path in (alone, shared))
    assert one.keys() == two.keys()
    for name in one:
        # The mean gradient so far, to rounding. A step of Adam has the same length however small the gradient is, and
        # a key's bias has none but rounding: weights are not so near.
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-7 if name.endswith("exp_avg") else 1e-3)
    assert max(value.abs().max() for name, value in one.items() if name.endswith("exp_avg")) > 1e-2


def test_one_process_alone_trains_all_but_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with one_line("4 processes were started to train alignment: start one"):
        settings = {"source": "blue-marble:train", "steps": 2, "batch": 4, "rate": 1e-3, "seed": 0}
        run.train("alignment", {"alignment": settings}, tmp_path / "w")
    assert not list(tmp_path.iterdir())


def test_a_precision_that_cannot_resume_is_named(monkeypatch: pytest.MonkeyPatch, one_line: OneLine) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with one_line("fp16 cannot resume exactly"):
        make_accelerator()


def test_asked_again_the_command_writes_nothing(tmp_path: Path) -> None:
    out = save_alignment(tmp_path / "w")
    with tiny():
        run.train("tokens", RECIPE | {"tokens": SETTINGS | {"epochs": 1}}, out)
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        run.train("tokens", RECIPE | {"tokens": SETTINGS | {"epochs": 1}}, out)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
