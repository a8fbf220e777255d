"""Training: the same seed gives the same weights, the loss is what it says, and held-out cells stay unseen."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALIGNMENT, TOKENS, OneLine
from torch import nn

from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.geo import haversine_km
from rag_geotoken.index import GeoIndex
from rag_geotoken.pipeline import load_tuning
from rag_geotoken.selection import Tuning
from rag_geotoken.sources import blue_marble
from rag_geotoken.sources.blue_marble import cut, draw_views, is_unseen
from rag_geotoken.token_model import TokenConfig, TokenModel
from rag_geotoken.training import run, tokens
from rag_geotoken.training.alignment import _Losses, nearby_places, train_alignment
from rag_geotoken.training.schedule import one_cycle
from rag_geotoken.training.tokens import train_tokens

Weights = dict[str, torch.Tensor]


def quiet(line: str) -> None:
    assert "nan" not in line


def weights_of(model: nn.Module) -> Weights:
    assert not model.training
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first: Weights, second: Weights) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray[Any, Any]]:
    """The views that a training cuts."""
    views: list[np.ndarray[Any, Any]] = []
    monkeypatch.setattr(blue_marble, "cut", lambda given: views.append(given) or cut(given))  # type: ignore[func-returns-value]
    return views


@pytest.fixture
def tiny_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**changes: Any) -> TokenConfig:
        return replace(TOKENS, **changes)

    monkeypatch.setattr(tokens, "TokenConfig", config)


def test_alignment_training_is_seeded_and_sees_no_held_out_cell(drawn: list[np.ndarray[Any, Any]]) -> None:
    def train(seed: int) -> Weights:
        return weights_of(train_alignment(steps=2, batch=6, rate=1e-3, seed=seed, log=quiet))

    first = train(0)
    assert [len(views) for views in drawn] == [6, 6]
    assert same(first, train(0)) and not same(first, train(1))
    places = np.concatenate(drawn)[:, :2]
    assert not is_unseen(*places.T).any()
    assert len(np.unique(places, axis=0)) == 24  # twelve a seed, drawn twice for seed 0


def test_token_training_is_seeded_and_sees_no_held_out_cell(
    alignment: GeoAlignment, gallery: GeoIndex, drawn: list[np.ndarray[Any, Any]], tiny_config: None
) -> None:
    def train(seed: int) -> Weights:
        settings: dict[str, Any] = {"views": 16, "epochs": 1, "batch": 8, "rate": 1e-3}
        return weights_of(train_tokens(alignment, gallery, **settings, seed=seed, log=quiet))

    first = train(1)
    assert same(first, train(1)) and not same(first, train(2))
    places = np.concatenate(drawn)[:, :2]
    assert len(places) == 48 and not is_unseen(*places.T).any()
    assert not set(map(tuple, places.tolist())) & set(map(tuple, gallery.lat_lon.tolist()))


def test_token_training_learns(alignment: GeoAlignment, gallery: GeoIndex, tiny_config: None) -> None:
    lines: list[str] = []
    settings: dict[str, Any] = {"views": 32, "epochs": 30, "batch": 32, "rate": 1e-2, "seed": 1}
    train_tokens(alignment, gallery, **settings, log=lines.append)
    faces = [float(line.split("position ")[1].split()[0]) for line in lines if "position" in line]
    assert len(faces) == 30 and faces[-1] < faces[0] - 0.5


def test_nearby_places_lie_10_to_1000_km_away_in_no_held_out_cell() -> None:
    places = draw_views("train", 3000, 0)[:, :2]
    there = nearby_places(places, 3, np.random.default_rng(0))
    assert there.shape == (9000, 2) and not is_unseen(*there.T).any()
    km = haversine_km(*np.repeat(places, 3, axis=0).T, *there.T)
    # The few that fell into a held-out cell are other photos' places.
    inside = (km >= 9.999) & (km <= 1000.001)
    assert 0.95 < inside.mean() < 1
    assert np.log(km[inside]).mean() == pytest.approx(math.log(100.0), abs=0.05)
    np.testing.assert_array_equal(there, nearby_places(places, 3, np.random.default_rng(0)))


def test_the_losses_are_contrastive_both_ways() -> None:
    torch.manual_seed(0)
    model = _Losses(GeoAlignment(ALIGNMENT)).eval()
    views = draw_views("train", 5, 0)
    pixels, places, wrong = cut(views), views[:, :2], draw_views("train", 4, 1)[:, :2]
    texts = ["a", "b", "a", "c", "d"]
    with torch.no_grad():
        total, gps_loss, text_loss = model(*map(torch.from_numpy, (pixels, places, wrong)), texts)
        words = nn.functional.normalize(model.alignment.text(texts), dim=-1).double().numpy()
    _, gps, text = model.alignment.embed(pixels).astype(float).transpose(1, 0, 2)
    near = model.alignment.embed_places(np.concatenate([places, wrong])).astype(float)

    def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        shares: np.ndarray[Any, Any] = np.log(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
        return shares

    logits = gps @ near.T / 0.07
    rows = np.arange(5)
    expected = -(log_softmax(logits)[rows, rows].mean() + log_softmax(logits[:, :5].T)[rows, rows].mean()) / 2
    assert gps_loss.item() == pytest.approx(expected, abs=1e-4)
    logits = text @ words.T / 0.07
    right = np.array([[1.0 if a == b else 0.0 for b in texts] for a in texts])
    right /= right.sum(axis=1, keepdims=True)
    expected = -((right * log_softmax(logits)).sum() + (right * log_softmax(logits.T)).sum()) / 10
    assert text_loss.item() == pytest.approx(expected, abs=1e-4)
    assert total.item() == pytest.approx(gps_loss.item() + 0.2 * text_loss.item(), abs=1e-5)


def test_tokens_and_tuning_are_trained_into_the_folder_of_the_alignment(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: None
) -> None:
    monkeypatch.setattr(run, "GALLERY", "blue-marble:gallery,n=60")
    out = shutil.copytree(weights, tmp_path / "made", ignore=shutil.ignore_patterns("to*", "tu*"))
    recipe: dict[str, Any] = {
        "tokens": {"views": 16, "epochs": 1, "batch": 8, "rate": 1e-3, "seed": 1},
        "tuning": {"source": "blue-marble:validation,n=12"},
    }
    run.train("tokens", recipe, out)
    assert TokenModel.from_pretrained(out).config == TOKENS
    run.train("tuning", recipe, out)
    tuning = load_tuning(out)
    assert set(asdict(tuning)) == set(asdict(Tuning())) and 0 < tuning.neighbor_share < 1
    assert {path.name for path in tmp_path.iterdir()} == {"made", "made-index"}


def test_alignment_is_trained_into_a_folder(tmp_path: Path) -> None:
    run.train("alignment", {"alignment": {"steps": 2, "batch": 4, "rate": 1e-3, "seed": 0}}, tmp_path / "made")
    assert GeoAlignment.from_pretrained(tmp_path / "made").config.dim == 256


@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        ("alignment", {"stepz": 2}, "stepz"),
        ("alignment", {"steps": 0}, "steps"),
        ("alignment", {"steps": "many"}, "steps"),
        ("alignment", {"batch": 0}, "batch"),
        ("alignment", {"seed": -1}, "seed"),
        ("tokens", {"views": 4}, "views"),
        ("tokens", {"epochs": 0}, "epochs"),
        ("tokens", {"rate": "fast"}, "rate"),
        ("tuning", {"source": "blue-marble:validation,n=x"}, "n=x"),
        ("tuning", {"source": 3}, "source"),
    ],
)
def test_wrong_settings_are_named(
    what: str, change: dict[str, Any], words: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tiny_config: None, one_line: OneLine,
) -> None:  # fmt: skip
    monkeypatch.setattr(run, "GALLERY", "blue-marble:gallery,n=30")
    out = shutil.copytree(weights, tmp_path / "made")
    good: dict[str, dict[str, Any]] = {
        "alignment": {"steps": 2, "batch": 4, "rate": 1e-3, "seed": 0},
        "tokens": {"views": 16, "epochs": 1, "batch": 8, "rate": 1e-3, "seed": 1},
        "tuning": {"source": "blue-marble:validation,n=12"},
    }
    with one_line(words):
        run.train(what, {what: good[what] | change}, out)


@pytest.mark.parametrize("recipe", [{}, {"alignment": {"steps": 2}}, {"alignment": 3}])
def test_a_recipe_without_a_section_is_named(recipe: dict[str, Any], tmp_path: Path, one_line: OneLine) -> None:
    with one_line(r"\[alignment\]"):
        run.train("alignment", recipe, tmp_path)


def test_tokens_before_the_alignment_are_refused(tmp_path: Path, one_line: OneLine) -> None:
    settings: dict[str, Any] = {"views": 16, "epochs": 1, "batch": 8, "rate": 1e-3, "seed": 1}
    with one_line("alignment.json"):
        run.train("tokens", {"tokens": settings}, tmp_path)


def test_a_mistake_of_ours_is_no_wrong_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: object) -> None:
        raise TypeError("unsupported operand")

    monkeypatch.setattr(blue_marble, "draw_views", mistaken)
    with pytest.raises(TypeError):
        run.train("alignment", {"alignment": {"steps": 2, "batch": 4, "rate": 1e-3, "seed": 0}}, tmp_path)


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 400])
def test_the_learning_rate_rises_and_falls(steps: int) -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    schedule = one_cycle(optimizer, 1.0, steps)
    rates = [schedule.get_last_lr()[0]]
    for _ in range(steps - 1):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert all(0 <= rate <= 1.0 + 1e-9 for rate in rates)
    if steps >= 20:
        assert max(rates) == pytest.approx(1.0, abs=0.02) and rates[-1] < 0.01
