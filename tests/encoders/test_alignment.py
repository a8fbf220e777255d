"""Geo-alignment: one space for photos and places, texts that share letters, and weights that load or say why not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ALIGNMENT, OneLine

from rag_geotoken.encoders.alignment import GeoAlignment, _hashes
from rag_geotoken.photos.blue_marble import cut, draw_views
from rag_geotoken.tokens.model import TokenModel


def test_embeddings_have_length_one_and_their_shapes(alignment: GeoAlignment) -> None:
    pixels = cut(draw_views("test", 5, 0))
    photos, places = alignment.embed(pixels), alignment.embed_places(np.array([[90.0, 0.0], [-10.0, 180.0]]))
    assert photos.shape == (5, 3, 32) and places.shape == (2, 32) and photos.dtype == places.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(photos, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(places, axis=-1), 1, atol=1e-6)


def test_batches_change_nothing(alignment: GeoAlignment) -> None:
    pixels, places = cut(draw_views("test", 7, 0)), draw_views("test", 50, 1)[:, :2]
    alone = np.concatenate([alignment.embed(pixels[i : i + 1]) for i in range(7)])
    np.testing.assert_array_equal(alone, alignment.embed(pixels))
    features = alignment.project(pixels)
    np.testing.assert_allclose(alignment.project(pixels, batch=3), features, atol=1e-6)
    np.testing.assert_allclose(alignment.heads(features, batch=3), alignment.embed(pixels), atol=1e-6)
    alone = np.concatenate([alignment.embed_places(places[i : i + 7]) for i in range(0, 50, 7)])
    np.testing.assert_array_equal(alone, alignment.embed_places(places))


def test_a_black_and_a_white_view_are_finite(alignment: GeoAlignment) -> None:
    flat = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (0, 255)])
    assert np.isfinite(alignment.embed(flat)).all()


def test_texts_are_embedded_alike_whatever_is_beside_them(alignment: GeoAlignment) -> None:
    texts = ["An aerial view of Bamako, Mali, Africa", "", "São Paulo", "東京"]
    with torch.no_grad():
        together = alignment.text(texts)
        alone = torch.cat([alignment.text([text]) for text in texts])
    assert together.shape == (4, 32) and torch.isfinite(together).all()
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert torch.equal(alignment.text(["BAMAKO, mali"]), alignment.text(["bamako Mali"]))


def test_unknown_names_share_trigrams() -> None:
    name, misspelt, unrelated = (set(_hashes(text, 1 << 20)) for text in ("Ouagadougou", "Uagadugu", "Reykjavik"))
    assert len(name & misspelt) >= 3 and not name & unrelated
    assert len(name) == 1 + len("Ouagadougou")  # the word, and a trigram around each of its letters


def test_half_precision_keeps_the_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(3)
    made = GeoAlignment(ALIGNMENT)
    made(torch.from_numpy(cut(draw_views("train", 16, 0))))  # batch statistics, saved as they are
    made.eval().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    loaded = GeoAlignment.from_pretrained(tmp_path)
    assert torch.equal(state, torch.get_rng_state()), "loading draws no random numbers of the caller's"
    assert not loaded.training and loaded.config == ALIGNMENT
    pixels, places = cut(draw_views("test", 6, 0)), draw_views("test", 40, 1)[:, :2]
    np.testing.assert_allclose(loaded.embed(pixels), made.embed(pixels), atol=1e-2)
    np.testing.assert_allclose(loaded.embed_places(places), made.embed_places(places), atol=1e-2)
    assert {path.name for path in tmp_path.iterdir()} == {"alignment.json", "alignment.safetensors"}
    assert torch.equal(loaded.location.frequencies, made.location.frequencies)


@pytest.mark.parametrize("location", ["equal_earth", "mercator", "harmonics"])
def test_other_location_encoders_fit_in(location: str, tmp_path: Path) -> None:
    made = GeoAlignment(replace(ALIGNMENT, location=location, degrees=5)).eval()
    made.save_pretrained(tmp_path)
    loaded, places = GeoAlignment.from_pretrained(tmp_path), np.array([[90.0, 0.0], [48.2, 16.4], [-10.0, 180.0]])
    assert loaded.config.location == location
    np.testing.assert_array_equal(loaded.embed_places(places), made.embed_places(places))
    assert np.ptp(made.embed_places(places), axis=0).max() > 1e-3


def test_settings_from_before_there_was_a_choice(weights: Path, broken: Path) -> None:
    settings = json.loads((broken / "alignment.json").read_text())
    assert settings.pop("location") == "unit_vector" and settings.pop("degrees") and settings.pop("backbone") == "earth"
    (broken / "alignment.json").write_text(json.dumps(settings))
    places = np.array([[48.2, 16.4]])
    before, after = (GeoAlignment.from_pretrained(folder).embed_places(places) for folder in (weights, broken))
    np.testing.assert_array_equal(before, after)


@pytest.fixture
def broken(weights: Path, tmp_path: Path) -> Path:
    """A copy of the weights, to be broken."""
    return shutil.copytree(weights, tmp_path / "weights")


@pytest.mark.parametrize("name", ["alignment.json", "alignment.safetensors"])
def test_a_missing_file_is_named(broken: Path, name: str, one_line: OneLine) -> None:
    (broken / name).unlink()
    with one_line(name):
        GeoAlignment.from_pretrained(broken)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1, None])
def test_broken_weights_and_those_of_another_model_are_named(broken: Path, kept: int | None, one_line: OneLine) -> None:
    path = broken / ("tokens.safetensors" if kept is None else "alignment.safetensors")
    (broken / "alignment.safetensors").write_bytes(path.read_bytes()[:kept])
    with one_line("alignment.safetensors in weights cannot be used as GeoAlignment weights"):
        GeoAlignment.from_pretrained(broken)


WRONG = ["not JSON", "[]", '"dim"', "{}", '{"dim": 16}', '{"dim": "32"}', '{"dim": -1}', '{"dim": 1e99}']
WRONG += ['{"depth": 3}', '{"sigmas": 5}', '{"location": "flat"}', '{"sigmas": [[1, 2], [3]]}']


@pytest.mark.parametrize("settings", WRONG)
def test_wrong_settings_are_named(broken: Path, settings: str, one_line: OneLine) -> None:
    (broken / "alignment.json").write_text(settings)
    with one_line("alignment"):
        GeoAlignment.from_pretrained(broken)


WRONG_SIZES = [{"level": 31}, {"group": 0}, {"heads": 5}, {"heads": 0}, {"d_model": 48}, {"dim": []}]


@pytest.mark.parametrize("sizes", WRONG_SIZES)
def test_wrong_settings_of_the_token_model_are_named(broken: Path, sizes: dict[str, Any], one_line: OneLine) -> None:
    settings = json.loads((broken / "tokens.json").read_text())
    (broken / "tokens.json").write_text(json.dumps(settings | sizes))
    with one_line("tokens.safetensors in weights cannot be used as TokenModel weights"):
        TokenModel.from_pretrained(broken)
