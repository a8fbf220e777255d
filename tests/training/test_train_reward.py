"""Training the reward head: its bins, its photos, its seed, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ROWS, OneLine
from tiny_training import quiet

from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.photos.blue_marble import draw
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run import stages
from rag_geotoken.training.reward import pools_of, train_reward
from rag_geotoken.types import Embeddings, Neighbors, Pool, Tables

NUMBERS: dict[str, Any] = {"photos": 80, "epochs": 2, "batch": 16, "rate": 1e-2, "seed": 0}
KM_A_DEGREE = 111.195  # of latitude


def test_bins_are_parted_at_1_25_200_750_and_2500_km(geolocator: Geolocator, monkeypatch: pytest.MonkeyPatch) -> None:
    km = [0.0, 0.9, 1.1, 24.9, 25.1, 199.0, 201.0, 749.0, 751.0, 2499.0, 2501.0, 9000.0]
    rows = np.array([5, 17])
    truth = geolocator.index.lat_lon[rows]
    away = np.sign(-truth[:, :1]) * np.array(km) / KM_A_DEGREE  # towards the other pole
    lat_lon = np.stack([truth[:, :1] + away, np.broadcast_to(truth[:, 1:], away.shape)], axis=-1)
    mask = np.ones(away.shape, bool)
    mask[1, 3] = False
    made = Pool(lat_lon, np.full(mask.shape, -np.log(12), np.float32), np.zeros(mask.shape, np.int8), mask)
    monkeypatch.setattr(stages, "pool", lambda *_: made)
    states, bins, kept = pools_of(geolocator, rows, quiet)
    assert bins.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]] * 2
    assert torch.equal(kept, torch.from_numpy(mask))
    assert states.shape == (2, 12, geolocator.tokens.config.d_model) and states.dtype == torch.float16


def test_gallery_photos_meet_other_photos_as_neighbors(geolocator: Geolocator, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[Embeddings, Neighbors]] = []
    search = stages.search

    def noted(models: Models, options: Options, tables: Tables) -> Neighbors:
        met.append((tables.embeddings, search(models, options, tables)))
        return met[-1][1]

    monkeypatch.setattr(stages, "search", noted)
    train_reward(geolocator, **NUMBERS, log=quiet)
    gallery = geolocator.index.vectors(np.arange(ROWS))
    asked = np.concatenate([photos.vectors for photos, _ in met])
    rows = [np.flatnonzero((gallery == vectors).all(axis=(1, 2))).tolist() for vectors in asked]
    assert len(rows) == 80 and all(len(own) == 1 for own in rows) and len({own[0] for own in rows}) == 80
    names = geolocator.index.rows["digest"].to_pylist()
    near = np.concatenate([found.rows for _, found in met]).tolist()
    assert not any(names[own[0]] in {names[row] for row in found} for own, found in zip(rows, near, strict=True))
    references = geolocator.index.rows["image"].take([own[0] for own in rows[:3]]).to_pylist()
    assert stages.digests(draw(references)) == [names[own[0]] for own in rows[:3]]


def test_the_same_seed_gives_the_same_bytes(geolocator: Geolocator, tmp_path: Path) -> None:
    def train(seed: int, name: str) -> bytes:
        head = train_reward(geolocator, **NUMBERS | {"seed": seed}, log=quiet)
        assert not head.training and all(torch.isfinite(value).all() for value in head.state_dict().values())
        head.save_pretrained(tmp_path / name)
        torch.randn(7)  # what else was drawn in this process changes nothing
        return (tmp_path / name / "reward.safetensors").read_bytes()

    first = train(0, "first")
    assert first == train(0, "again")
    assert first != train(1, "other")


def test_training_learns(geolocator: Geolocator, monkeypatch: pytest.MonkeyPatch) -> None:
    def held_out() -> list[float]:
        lines: list[str] = []
        train_reward(geolocator, **NUMBERS | {"photos": 150, "epochs": 8}, log=lines.append)
        return [float(line.split("held out ")[1]) for line in lines if "held out" in line]

    real = held_out()
    assert len(real) == 8 and real[-1] < real[0] - 0.05
    # Nearly all entries of untrained models lie beyond 2500 km; where the states tell the bin, the head must find it.
    states, _, mask = pools_of(geolocator, np.arange(150), quiet)
    bins = torch.randint(6, mask.shape, generator=torch.Generator().manual_seed(0))
    states[..., :6] = torch.nn.functional.one_hot(bins, 6)
    monkeypatch.setattr("rag_geotoken.training.reward.pools_of", lambda *_: (states, bins, mask))
    assert held_out()[-1] < 0.2  # ln 6 = 1.79 without any idea


def test_what_is_held_out_is_not_trained_on(geolocator: Geolocator, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = pools_of(geolocator, np.random.default_rng(0).permutation(ROWS)[:80], quiet)

    def trained(change: slice) -> torch.Tensor:
        states, bins, mask = (part.clone() for part in pools)
        states[change] = 3.0
        monkeypatch.setattr("rag_geotoken.training.reward.pools_of", lambda *_: (states, bins, mask))
        return train_reward(geolocator, **NUMBERS, log=quiet).fc1.weight

    assert torch.equal(trained(slice(0, 0)), trained(slice(0, 8)))
    assert not torch.equal(trained(slice(0, 0)), trained(slice(8, 9)))


def test_what_is_no_entry_teaches_nothing(geolocator: Geolocator, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = pools_of(geolocator, np.arange(80), quiet)
    assert not pools[2].all()

    def trained(value: float, bin: int) -> torch.Tensor:
        states, bins, mask = (part.clone() for part in pools)
        states[~mask], bins[~mask] = value, bin
        monkeypatch.setattr("rag_geotoken.training.reward.pools_of", lambda *_: (states, bins, mask))
        return train_reward(geolocator, **NUMBERS, log=quiet).fc1.weight

    assert torch.equal(trained(0.0, 0), trained(9.0, 5))


@pytest.mark.parametrize("change", [{"photos": 201}, {"photos": 9, "batch": 1}, {"batch": 73}])
def test_photos_that_do_not_fit_are_named(change: dict[str, int], geolocator: Geolocator, one_line: OneLine) -> None:
    numbers = NUMBERS | change
    with one_line(f"photos = {numbers['photos']}, batch = {numbers['batch']} do not fit: the gallery has 200 photos"):
        train_reward(geolocator, **numbers, log=quiet)
