"""Training the token model: its loss, its photos, its seed, and which weights are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from tiny import TOKENS, OneLine, tiny_tokens
from tiny_training import quiet
from torch import Tensor

from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.index.build import build_index
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.walk import RunFolder, write_photos
from rag_geotoken.storage.parquet import read_table, write_table
from rag_geotoken.tokens.model import TokenConfig, TokenModel
from rag_geotoken.training import tokens
from rag_geotoken.training.tokens import Losses, Photos, batch_of, read_photos, train_tokens, weighted
from rag_geotoken.types import Tables

NUMBERS: dict[str, Any] = {"epochs": 3, "batch": 16, "rate": 1e-2, "seed": 1}
OPTIONS = Options(neighbors=TOKENS.neighbors)
TWICE = 5  # photos that the gallery holds a second time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, geolocator: Geolocator) -> Path:
    """A gallery of 120 photos and its index; five photos stand there twice, under another name."""
    folder = tmp_path_factory.mktemp("twice")
    write_photos(folder, "blue-marble:gallery,n=115")
    table = read_table(folder / "photos.parquet")
    again = table.slice(0, TWICE).set_column(0, "id", [[f"again-{i}" for i in range(TWICE)]])
    write_table(folder / "photos.parquet", pa.concat_tables([table, again]))
    RunFolder(folder, geolocator).walk(OPTIONS, until="embeddings")
    build_index(folder, folder / "photos.parquet", folder / "embeddings.parquet", geolocator.alignment.identity)
    return folder


@pytest.fixture(scope="module")
def index(folder: Path) -> GeoIndex:
    return GeoIndex.load(folder)


@pytest.fixture(scope="module")
def tables(folder: Path, index: GeoIndex, alignment: GeoAlignment) -> Tables:
    """The gallery's own photos up to their neighbors."""
    walked = RunFolder(folder, Models(alignment, None, index, Tuning()))
    return walked.tables(OPTIONS, walked.walk(OPTIONS, until="neighbors"))


@pytest.fixture(scope="module")
def both(tables: Tables, index: GeoIndex) -> tuple[Photos, Photos]:
    """Photos to train on and to validate with, of the gallery itself."""
    return read_photos(tables, index, TOKENS, held_out=20, seed=1)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The embeddings (B, 3, dim) of every batch that is trained on."""
    batches: list[Tensor] = []
    memory = Losses.memory

    def noted(self: Losses, photos: Photos, drawn: Tensor) -> Tensor:
        if self.training:
            batches.append(photos.vectors[drawn])
        return memory(self, photos, drawn)

    monkeypatch.setattr(Losses, "memory", noted)
    yield batches


def rows_of(vectors: Tensor, index: GeoIndex) -> list[set[int]]:
    """The gallery rows that have these embeddings: those with the same pixels."""
    gallery = torch.from_numpy(index.vectors(np.arange(len(index.rows)))).half().flatten(1)
    equal = (vectors.flatten(1)[:, None] == gallery).all(dim=2)
    return [set(row.nonzero()[:, 0].tolist()) for row in equal]


def test_the_loss_is_teacher_forced_cross_entropy_with_weights_from_2_to_1(
    both: tuple[Photos, Photos], index: GeoIndex
) -> None:
    photos, drawn = both[0], torch.tensor([3, 0, 7])
    model = tiny_tokens()
    losses = Losses(model, index).eval()
    with torch.no_grad():
        found = losses(photos, drawn)
        expected = []
        for t in range(3):
            nats = []
            for i in drawn.tolist():
                rows = photos.neighbors[i].numpy()
                near = torch.from_numpy(index.vectors(rows)).half().float()[None]
                places = index.lat_lon[rows]
                cells = torch.from_numpy(S2Tokenizer(TOKENS.level, TOKENS.group).encode(*places.T))[None]
                memory = model.memory(photos.vectors[i : i + 1].float(), near, cells)
                state = model.states(memory, photos.tokens[i : i + 1, :t])[:, -1]
                logits = model.output_layers[t](state)[0].double()
                nats.append(math.log(logits.exp().sum()) - logits[photos.tokens[i, t]].item())
            expected.append(sum(nats) / len(nats))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    a, b, c = expected
    assert weighted(found).item() == pytest.approx((2 * a + 1.5 * b + c) / 4.5, abs=1e-5)


def test_the_first_hit_is_skipped(both: tuple[Photos, Photos], index: GeoIndex) -> None:
    for photos in both:
        own = rows_of(photos.vectors, index)
        assert all(own) and photos.neighbors.shape == (len(own), TOKENS.neighbors)
        assert not any(mine & set(near) for mine, near in zip(own, photos.neighbors.tolist(), strict=True))


def test_held_out_photos_are_never_trained_on(
    both: tuple[Photos, Photos], index: GeoIndex, tmp_path: Path, seen: list[Tensor]
) -> None:
    photos, validation = both
    held = set[int]().union(*rows_of(validation.vectors, index))
    assert len(validation.tokens) == 20 and len(held) > 20  # one of those that stand twice is among them
    assert len(photos.tokens) == len(index.rows) - len(held)
    train_tokens(TOKENS, index, photos, validation, out=tmp_path / "w", identity="a", **NUMBERS, log=quiet)
    trained = set[int]().union(*rows_of(torch.cat(seen), index))
    assert len(torch.cat(seen)) == 3 * 16 * (len(photos.tokens) // 16)
    assert len(trained) > 90 and not trained & held


def test_every_epoch_has_its_own_order() -> None:
    first, second = (np.concatenate([batch_of(epoch * 3 + i, 10, 3, 1) for i in range(3)]) for epoch in range(2))
    for order in (first, second):
        assert len(set(order.tolist())) == 9 and set(order.tolist()) <= set(range(10))
    assert first.tolist() != second.tolist()
    assert batch_of(4, 10, 3, 1).tolist() == second[3:6].tolist() != batch_of(4, 10, 3, 2).tolist()


@pytest.mark.parametrize(("positions", "dropout"), [("sequence", 0.0), ("none", 0.1), ("spherical", 0.1)])
def test_the_same_seed_gives_the_same_bytes(
    positions: Literal["sequence", "none", "spherical"], dropout: float,
    both: tuple[Photos, Photos], index: GeoIndex, tmp_path: Path,
) -> None:  # fmt: skip
    config = replace(TOKENS, neighbor_positions=positions, dropout=dropout)

    def train(seed: int, name: str) -> bytes:
        numbers = NUMBERS | {"seed": seed, "epochs": 1}
        train_tokens(config, index, *both, out=tmp_path / name, identity="a", **numbers, log=quiet)
        assert TokenModel.from_pretrained(tmp_path / name).config == config
        torch.randn(7)  # what else was drawn in this process changes nothing
        return (tmp_path / name / "tokens.safetensors").read_bytes()

    first = train(1, "first")
    assert first == train(1, "again")
    assert first != train(2, "other")


def test_dropout_is_on_in_training_alone(both: tuple[Photos, Photos], index: GeoIndex, tmp_path: Path) -> None:
    def lines(dropout: float) -> tuple[list[str], dict[str, Tensor]]:
        said: list[str] = []
        config, out = replace(TOKENS, dropout=dropout), tmp_path / str(dropout)
        train_tokens(config, index, *both, out=out, identity="a", **NUMBERS | {"rate": 1e-30}, log=said.append)
        return said, load_file(tmp_path / f"{dropout}-checkpoint.safetensors")

    (without, still), (with_it, moved) = lines(0.0), lines(0.5)
    assert without == with_it  # at a rate of nothing the validation sees the same weights, and no dropout
    assert any(not torch.equal(still[name], moved[name]) for name in still if name.endswith("exp_avg"))


def test_training_learns(both: tuple[Photos, Photos], index: GeoIndex, tmp_path: Path) -> None:
    photos, lines = both[0], list[str]()
    train_tokens(
        TOKENS, index, photos, photos, out=tmp_path / "w", identity="a", **NUMBERS | {"epochs": 25}, log=lines.append
    )
    faces = [float(line.split("position ")[1].split()[0]) for line in lines]
    assert len(faces) == 10 and faces[-1] < faces[0] - 0.5


@pytest.mark.parametrize("values", [[3, 1, 2, 4, 5, 6, 7, 8, 9, 10], [5, 4, 3, 2, 1, 9, 0.5, 9, 9, 9]])
def test_the_weights_with_the_lowest_validation_loss_are_kept(
    values: list[float], both: tuple[Photos, Photos], index: GeoIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    had: list[dict[str, Tensor]] = []

    def validate(losses: Losses, photos: Photos, batch: int) -> Tensor:
        assert photos.tokens.equal(both[1].tokens)
        had.append({name: value.half() for name, value in losses.tokens.state_dict().items()})
        return torch.full((3,), float(values[len(had) - 1]))

    monkeypatch.setattr(tokens, "validate", validate)
    train_tokens(TOKENS, index, *both, out=tmp_path / "w", identity="a", **NUMBERS | {"epochs": 5}, log=quiet)
    best = had[int(np.argmin(values))]
    kept = load_file(tmp_path / "w" / "tokens.safetensors")
    assert len(had) == 10 and kept.keys() == best.keys() and all(torch.equal(kept[name], best[name]) for name in best)
    assert any(not torch.equal(kept[name], had[-1][name]) for name in kept)


def test_a_loss_that_is_no_number_is_named(
    both: tuple[Photos, Photos], index: GeoIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine
) -> None:
    monkeypatch.setattr(tokens, "validate", lambda *_: torch.full((3,), math.nan))
    with one_line("validation loss is nan at step 2: .*lower rate"):
        train_tokens(TOKENS, index, *both, out=tmp_path / "w", identity="a", **NUMBERS, log=quiet)
    assert not list(tmp_path.iterdir())


def test_batches_that_cannot_be_filled_or_shared_are_named(
    both: tuple[Photos, Photos], index: GeoIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine
) -> None:
    with one_line("photos, batches of 200, 1 processes"):
        train_tokens(TOKENS, index, *both, out=tmp_path / "w", identity="a", **NUMBERS | {"batch": 200}, log=quiet)
    monkeypatch.setattr(tokens, "make_accelerator", lambda: SimpleNamespace(process_index=0, num_processes=3))
    with one_line("batches of 16, 3 processes"):
        train_tokens(TOKENS, index, *both, out=tmp_path / "w", identity="a", **NUMBERS, log=quiet)


def test_nothing_left_to_train_on_is_named(tables: Tables, index: GeoIndex, one_line: OneLine) -> None:
    with one_line("hold out fewer"):
        read_photos(tables, index, TOKENS, held_out=1000, seed=1)


def test_photos_without_a_place_are_left_out(
    folder: Path, index: GeoIndex, alignment: GeoAlignment, both: tuple[Photos, Photos], tmp_path: Path
) -> None:
    table = read_table(folder / "photos.parquet")
    lat = [None if i < 60 else value for i, value in enumerate(table["lat"].to_pylist())]
    write_table(tmp_path / "photos.parquet", table.set_column(2, "lat", pa.array(lat, pa.float64())))
    walked = RunFolder(tmp_path, Models(alignment, None, index, Tuning()))
    tables = walked.tables(OPTIONS, walked.walk(OPTIONS, until="neighbors"))
    photos, validation = read_photos(tables, index, TOKENS, held_out=20, seed=1)
    assert torch.equal(validation.tokens, both[1].tokens)
    rows = set[int]().union(*rows_of(photos.vectors, index))
    assert 35 < len(photos.tokens) < 65 and not rows & set(range(TWICE, 60))


def test_several_processes_have_nothing_large_to_send_and_nothing_to_wait_for(
    both: tuple[Photos, Photos], index: GeoIndex
) -> None:
    config = TokenConfig(level=4, neighbors=3, dim=32, d_model=36, heads=2, ff=32, decoder_layers=1, dropout=0.1,
                         neighbor_positions="spherical")  # fmt: skip
    losses = Losses(TokenModel(config), index)
    assert not dict(losses.named_buffers()).keys() & {"gallery", "cells", "places"}
    torch.autograd.backward(weighted(losses(both[0], torch.arange(4))))
    assert all(value.grad is not None for value in losses.parameters())
