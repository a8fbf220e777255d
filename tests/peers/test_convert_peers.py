"""Conversion of GeoCLIP's files and of G3's state dict: every number kept, anything else refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call, fails
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny import OneLine
from tiny_clip import save_clip
from torch import Tensor

from rag_geotoken.encoders.alignment import G3, GeoAlignment, LocationEncoder
from rag_geotoken.encoders.location import LocationConfig
from rag_geotoken.peers.convert import G3_NAMES, convert_g3, convert_geoclip
from rag_geotoken.peers.gallery import open_gallery

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def g3() -> State:
    """A state dict with the names of g3.pth, a CLIP's included, as the released code saves it."""
    torch.manual_seed(0)
    sizes = {"vision_projection_else_1": 768, "vision_projection_else_2": 768, "text_projection_else": 768}
    state = {f"location_encoder.{name}": value for name, value in LocationEncoder().state_dict().items()}
    for name, wide in sizes.items():
        state |= {f"{name}.{i}.{kind}": value for i in (0, 2) for kind, value in linear(wide, wide).items()}
    state |= {f"location_projection_else.0.{kind}": value for kind, value in linear(512, 512).items()}
    state |= {f"location_projection_else.2.{kind}": value for kind, value in linear(512, 768).items()}
    state |= {f"logit_scale{i}": torch.tensor(3.99 + i) for i in (1, 2, 3)}
    # The frozen CLIP; transformers of its time kept the positions, which are integers.
    state |= {"vision_model.embeddings.class_embedding": torch.ones(8), "text_projection.weight": torch.ones(4, 4)}
    state |= {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_projection.weight": torch.ones(4, 4),
    }
    return state


def linear(before: int, after: int) -> State:
    return {"weight": torch.randn(after, before) / before**0.5, "bias": torch.randn(after)}


@pytest.fixture
def package(geoclip_package: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return shutil.copytree(geoclip_package, tmp_path / "model")


def test_every_number_of_geoclip_is_kept(geoclip_package: Path, geoclip_folder: Path) -> None:
    weights = geoclip_package / "weights"
    location = torch.load(weights / "location_encoder_weights.pth", weights_only=True)
    saved = load_file(geoclip_folder / "location.safetensors")
    assert saved.keys() == location.keys() and all(torch.equal(saved[name], location[name]) for name in saved)
    mlp = torch.load(weights / "image_encoder_mlp_weights.pth", weights_only=True)
    saved = load_file(geoclip_folder / "geoclip.safetensors")
    assert saved.pop("logit_scale").item() == pytest.approx(3.681)
    assert all(torch.equal(saved.pop(f"mlp.{name}"), value) for name, value in mlp.items()) and not saved
    encoder = LocationEncoder.from_pretrained(geoclip_folder)
    assert encoder.config == LocationConfig("equal_earth")
    gallery = open_gallery(geoclip_folder, encoder)
    written = np.loadtxt(geoclip_package / "gps_gallery" / "coordinates_100K.csv", delimiter=",", skiprows=1)
    np.testing.assert_array_equal(gallery.lat_lon, written)
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(encoder(torch.from_numpy(written)), dim=1)
    np.testing.assert_allclose(gallery.vectors, wanted.numpy(), atol=1e-6)


def spoiled(name: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    """Saves a file of the weights again, changed."""

    def spoil(package: Path) -> None:
        path = package / "weights" / name
        torch.save(change(torch.load(path, weights_only=True)), path)

    return spoil


def listed(text: str | bytes) -> Callable[[Path], object]:
    """Writes another gallery."""
    content = text.encode() if isinstance(text, str) else text
    return lambda package: (package / "gps_gallery" / "coordinates_100K.csv").write_bytes(content)


LOCATION, MLP, SCALE = (f"{name}_weights.pth" for name in ("location_encoder", "image_encoder_mlp", "logit_scale"))
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no location encoder": (lambda package: (package / "weights" / LOCATION).unlink(), "there is no file .*location"),
    "no head": (lambda package: (package / "weights" / MLP).unlink(), "there is no file .*mlp"),
    "no scale": (lambda package: (package / "weights" / SCALE).unlink(), "logit_scale.* is missing"),
    "no gallery": (lambda package: shutil.rmtree(package / "gps_gallery"), "cannot read .*coordinates_100K.csv"),
    "a layer missing": (
        spoiled(LOCATION, lambda state: {k: v for k, v in state.items() if "LocEnc2.head" not in k}),
        "location_encoder_weights.pth is no checkpoint of GeoCLIP: LocEnc2.head.0.weight is missing, and 1 more",
    ),
    "a fourth scale": (spoiled(LOCATION, lambda state: state | {"LocEnc3.capsule.0.b": torch.ones(2)}), "is unknown"),
    "misshapen": (
        spoiled(LOCATION, lambda state: state | {"LocEnc0.capsule.0.b": torch.ones(256, 3)}),
        r"LocEnc0.capsule.0.b is \(256, 3\) where \(256, 2\) fits",
    ),
    "not finite": (spoiled(MLP, lambda state: state | {"0.bias": torch.full((768,), torch.nan)}), "not finite"),
    "scale not finite": (spoiled(SCALE, lambda value: value * torch.inf), "logit_scale .* not finite"),
    "two scales": (spoiled(SCALE, lambda value: value.repeat(2)), "no single number"),
    "a state dict for the scale": (spoiled(SCALE, lambda value: {"logit_scale": value}), "no single number"),
    "pickled code": (
        lambda package: torch.save({"a": Path("x")}, package / "weights" / SCALE),
        "logit_scale_weights.pth is refused",
    ),
    "latitude 91": (listed("LAT,LON\n1,2\n91,0\n"), "latitude 91.0 at position 1"),
    "no number": (listed("LAT,LON\n1,x\n"), "is no list of places"),
    "NaN": (listed("LAT,LON\nnan,0\n"), "not a finite number"),
    "a short row": (listed("LAT,LON\n1\n"), "is no list of places"),
    "other columns": (listed("latitude,longitude\n1,2\n"), "no columns LAT and LON"),
    "no place": (listed("LAT,LON\n"), "holds no place"),
    "no text": (listed(b"LAT,LON\n\xff\xfe"), "no list"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_of_geoclip_are_refused_in_one_line(
    package: Path, tmp_path: Path, one_line: OneLine, case: str
) -> None:
    spoil, words = WRONG[case]
    spoil(package)
    with one_line(words):
        convert_geoclip(package, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packed", [lambda state: state, lambda state: {f"module.{k}": v for k, v in state.items()}])
def test_every_number_of_g3_is_kept(g3: State, tmp_path: Path, packed: Callable[[State], State]) -> None:
    torch.save(packed(g3), tmp_path / "g3.pth")
    convert_g3(tmp_path / "g3.pth", tmp_path / "out")
    saved = load_file(tmp_path / "out" / "alignment.safetensors")
    left_out = {name for name in g3 if name.startswith(("vision_model.", "text_model."))}
    left_out |= {"vision_projection.weight", "text_projection.weight", "logit_scale3"}
    theirs = {
        name: own.join(name.split(peer, 1)) for own, peer in G3_NAMES.items() for name in g3 if name.startswith(peer)
    }
    assert theirs.keys() == g3.keys() - left_out and set(theirs.values()) == saved.keys()
    assert all(torch.equal(saved[own], g3[name]) for name, own in theirs.items())


def test_a_g3_folder_embeds_pictures_places_and_texts(g3: State, tmp_path: Path, clip_folder: Path) -> None:
    """By G3's formulas, written out; the text head stands on the text tower's projection, as in the released code."""
    torch.save(g3, tmp_path / "g3.pth")
    convert_g3(tmp_path / "g3.pth", tmp_path / "out")
    model = GeoAlignment.from_pretrained(tmp_path / "out", str(clip_folder))
    assert model.config == G3 and not model.training and model.size == model.backbone.size

    def head(name: str, features: Tensor) -> NDArray[np.float32]:
        hidden = torch.relu(features @ g3[f"{name}.0.weight"].T + g3[f"{name}.0.bias"])
        found = hidden @ g3[f"{name}.2.weight"].T + g3[f"{name}.2.bias"]
        return torch.nn.functional.normalize(found, dim=1).numpy()

    pixels = np.random.default_rng(0).integers(0, 256, (3, model.size, model.size, 3), np.uint8)
    image = model.backbone.images(pixels)
    found = model.embed(pixels)
    np.testing.assert_allclose(found[:, 0], torch.nn.functional.normalize(image, dim=1), atol=1e-5)
    np.testing.assert_allclose(found[:, 1], head("vision_projection_else_2", image), atol=1e-5)
    np.testing.assert_allclose(found[:, 2], head("vision_projection_else_1", image), atol=1e-5)
    np.testing.assert_allclose(model.heads(model.project(pixels)), found, atol=1e-6)
    texts = ["a street", "a fjord with red houses"]
    wanted = head("text_projection_else", model.backbone.texts(texts))
    np.testing.assert_allclose(model.embed_texts(texts), wanted, atol=1e-5)
    location = LocationEncoder(LocationConfig("mercator"))
    prefix = "location_encoder."
    location.load_state_dict({k.removeprefix(prefix): v for k, v in g3.items() if k.startswith(prefix)})
    places = np.array([[48.2, 16.4], [90.0, 0.0], [-90.0, 180.0]])
    with torch.no_grad():
        wanted = head("location_projection_else", location(torch.from_numpy(places)))
    np.testing.assert_allclose(model.embed_places(places), wanted, atol=1e-5)


def test_a_backbone_of_another_size_is_refused(g3: State, tmp_path: Path, one_line: OneLine) -> None:
    torch.save(g3, tmp_path / "g3.pth")
    convert_g3(tmp_path / "g3.pth", tmp_path / "out")
    narrow = save_clip(tmp_path / "clip", dim=64)
    with one_line("gives 64 numbers a picture, and the alignment was trained on the 768 of openai/clip-vit-large"):
        GeoAlignment.from_pretrained(tmp_path / "out", str(narrow)).embed(np.zeros((1, 224, 224, 3), np.uint8))


def test_a_wrong_state_dict_of_g3_is_refused_in_one_line(g3: State, tmp_path: Path, one_line: OneLine) -> None:
    def refused(state: Any, words: str) -> None:
        torch.save(state, tmp_path / "g3.pth")
        with one_line(words):
            convert_g3(tmp_path / "g3.pth", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(
        {k: v for k, v in g3.items() if k != "logit_scale2"}, "g3.pth is no checkpoint of G3: logit_scale2 is missing"
    )
    refused(
        {k: v for k, v in g3.items() if "LocEnc1" not in k}, "location_encoder.LocEnc1.capsule.0.b is missing, and 8"
    )
    refused(g3 | {"extra": torch.ones(1)}, "'extra' is unknown")
    refused(g3 | {"logit_scale1": torch.tensor(torch.inf)}, "logit_scale1 holds values that are not finite")
    refused(g3 | {"location_projection_else.0.bias": torch.ones(3)}, r"is \(3,\) where \(512,\) fits")
    refused({"vision_model.a": torch.ones(1)}, "is missing")
    refused(g3 | {"when": Path("x")}, "is refused")
    with one_line("there is no file"):
        convert_g3(tmp_path / "nowhere.pth", tmp_path / "out")


def test_the_commands(g3: State, geoclip_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(g3, tmp_path / "g3.pth")
    assert call("convert", "g3", tmp_path / "g3.pth", "--out", tmp_path / "g3") == 0
    assert call("convert", "geoclip", geoclip_package, "--out", tmp_path / "geoclip") == 0
    assert "300 places" in capsys.readouterr().out
    for what in ("g3", "geoclip"):
        missing = fails(capsys, "convert", what, tmp_path / "nowhere", "--out", tmp_path / "other")
        assert missing.startswith("rag-geotoken: there is no file")
        assert call("convert", what, tmp_path) == 2
