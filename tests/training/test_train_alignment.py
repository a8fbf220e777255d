"""Training the alignment: seeded, contrastive both ways, blind to the cells kept for ``unseen``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import ALIGNMENT, OneLine
from tiny_training import Stop, files, quiet, stop_after
from torch import nn

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.photos import blue_marble
from rag_geotoken.photos.blue_marble import cut, draw_views, is_unseen
from rag_geotoken.training import run
from rag_geotoken.training.alignment import nearby_places, train_alignment
from rag_geotoken.training.contrast import Losses
from rag_geotoken.training.processes import make_accelerator

Floats = NDArray[np.float64]
SOURCE = "blue-marble:train"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Floats]:
    """The views that a training cuts."""
    views: list[Floats] = []
    monkeypatch.setattr(blue_marble, "cut", lambda given: views.append(given) or cut(given))  # type: ignore[func-returns-value]
    return views


def test_training_is_seeded_and_sees_no_cell_kept_for_unseen(drawn: list[Floats], tmp_path: Path) -> None:
    def train(seed: int, name: str) -> bytes:
        train_alignment(tmp_path / name, "", source=SOURCE, steps=2, batch=6, rate=1e-3, seed=seed, log=quiet)
        state = GeoAlignment.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.isfinite(value).all() for value in state.values())
        return (tmp_path / name / "alignment.safetensors").read_bytes()

    first = train(0, "first")
    assert [len(views) for views in drawn] == [6, 6]
    assert first == train(0, "again") and first != train(1, "other")
    places = np.concatenate(drawn)[:, :2]
    assert not is_unseen(*places.T).any()
    assert len(np.unique(places, axis=0)) == 24  # twelve a seed, drawn twice for seed 0


def test_nearby_places_lie_10_to_1000_km_away_in_no_held_out_cell() -> None:
    places = draw_views("train", 3000, 0)[:, :2]
    nearby = nearby_places(places, np.random.default_rng(0), is_unseen)
    assert nearby.shape == (9000, 2) and not is_unseen(*nearby.T).any()
    km = haversine_km(*np.repeat(places, 3, axis=0).T, *nearby.T)
    # The few that fell into a held-out cell are other photos' places.
    inside = (km >= 9.999) & (km <= 1000.001)
    assert 0.95 < inside.mean() < 1
    assert np.log(km[inside]).mean() == pytest.approx(math.log(100.0), abs=0.05)
    np.testing.assert_array_equal(nearby, nearby_places(places, np.random.default_rng(0), is_unseen))


def test_the_losses_are_contrastive_both_ways() -> None:
    torch.manual_seed(0)
    model = Losses(GeoAlignment(ALIGNMENT), make_accelerator()).eval()
    views = draw_views("train", 5, 0)
    pixels, places, wrong = cut(views), views[:, :2], draw_views("train", 4, 1)[:, :2]
    texts, names = ["a", "b", "a", "c", "d"], torch.tensor([0, 1, 0, 2, 3])
    with torch.no_grad():
        both = torch.from_numpy(np.concatenate([places, wrong]))
        gps_loss, text_loss = model(torch.from_numpy(pixels), both, texts, names)
        words = nn.functional.normalize(model.alignment.text(texts), dim=-1).double().numpy()
    _, gps, text = model.alignment.embed(pixels).astype(float).transpose(1, 0, 2)
    near = model.alignment.embed_places(np.concatenate([places, wrong])).astype(float)

    def log_softmax(logits: NDArray[Any]) -> Floats:
        shares: Floats = np.log(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
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


def test_stopped_anywhere_ends_in_the_same_bytes(tmp_path: Path, drawn: list[Floats]) -> None:
    """Also batch statistics, and the places beside each photo, which come from a stream of their own."""

    def train(out: Path, log: Callable[[str], None] = quiet) -> dict[str, bytes]:
        train_alignment(out, "a", source=SOURCE, steps=5, batch=4, rate=1e-3, seed=3, log=log)
        return files(out, "alignment-checkpoint")

    whole = train(tmp_path / "whole" / "w")
    for checks in (2, 1):
        with pytest.raises(Stop):
            train(tmp_path / "w", stop_after(checks))
    drawn.clear()
    assert train(tmp_path / "w") == whole
    assert len(drawn) == 2, "only what was left was cut"


def test_a_folder_that_cannot_be_written_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine
) -> None:
    monkeypatch.setattr(blue_marble, "draw_views", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    with one_line("cannot write into .*file"):
        settings = {"source": SOURCE, "steps": 2, "batch": 4, "rate": 1e-3, "seed": 0}
        run.train("alignment", {"alignment": settings}, tmp_path / "file")
