"""GeoCLIP's preset: its answers by hand, a gallery encoded once, conversion, and the commands."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call, fails
from tiny import OneLine
from tiny_clip import save_clip, save_pictures
from torch import Tensor
from torch.nn.functional import normalize

from rag_geotoken.encoders.location import LocationEncoder
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.peers import gallery
from rag_geotoken.peers.convert import convert_geoclip
from rag_geotoken.peers.geoclip import GeoCLIP
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.storage.parquet import read_table


@pytest.fixture(scope="module")
def geoclip(geoclip_folder: Path, clip_folder: Path) -> GeoCLIP:
    return GeoCLIP.from_pretrained(geoclip_folder, clip_folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Seven pictures and, fifth, a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = save_pictures(folder, 8)
    Path(paths[4]).write_text("no picture")
    return paths


@pytest.fixture
def copied(geoclip_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(geoclip_folder, tmp_path / "geoclip")


def by_hand(package: Path, features: Tensor) -> Tensor:
    """Probabilities (B, N) over the gallery from the package's own files, as the paper has them."""
    weights = package / "weights"
    with (package / "gps_gallery" / "coordinates_100K.csv").open() as file:
        places = torch.tensor([[float(row["LAT"]), float(row["LON"])] for row in csv.DictReader(file)])
    location = LocationEncoder()
    location.load_state_dict(torch.load(weights / "location_encoder_weights.pth", weights_only=True))
    mlp = torch.load(weights / "image_encoder_mlp_weights.pth", weights_only=True)
    hidden = torch.relu(features @ mlp["0.weight"].T + mlp["0.bias"])
    queries = normalize(hidden @ mlp["2.weight"].T + mlp["2.bias"], dim=1)
    scale = torch.load(weights / "logit_scale_weights.pth", weights_only=True).exp()
    with torch.no_grad():
        return (scale * queries @ normalize(location(places), dim=1).T).double().softmax(dim=1)


def test_answers_are_those_by_hand(geoclip: GeoCLIP, geoclip_package: Path, pictures: list[str]) -> None:
    pixels, _ = load_pictures(pictures[:4], 224)
    wanted = by_hand(geoclip_package, geoclip.backbone.images(pixels))
    found = geoclip.search(geoclip.embed(pixels), 9)
    best = wanted.topk(9, dim=1)
    np.testing.assert_array_equal(found.rows, best.indices.numpy())
    np.testing.assert_allclose(found.probability, best.values.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(found.lat_lon, geoclip.gallery.lat_lon[found.rows])
    assert len(np.unique(found.rows[:, 0])) > 1, "the pictures of this test differ in their places"


def test_confidence_is_the_mass_within_each_radius(
    geoclip: GeoCLIP, geoclip_package: Path, pictures: list[str]
) -> None:
    pixels, _ = load_pictures(pictures[:4], 224)
    mass = by_hand(geoclip_package, geoclip.backbone.images(pixels)).numpy()
    found, places = geoclip.search(geoclip.embed(pixels), 1), geoclip.gallery.lat_lon
    for i, (lat, lon) in enumerate(found.lat_lon[:, 0]):
        km = haversine_km(lat, lon, *places.T)
        wanted = [mass[i][km <= r].sum() for r in (1, 25, 200, 750, 2500)]
        np.testing.assert_allclose(found.confidence[i], wanted, rtol=1e-5)
        assert wanted[0] < wanted[4] < 1


def test_near_radii_are_exact_at_poles_and_date_line() -> None:
    # A place, one 0.9 km and one 1.1 km away, at a pole, at the date line and elsewhere.
    places = np.array([[90.0, 0.0], [10.0, 180.0], [48.0, 16.0]])
    step = np.degrees(np.array([0.0, 0.9, -1.1]) / 6371.0)
    lat_lon = np.concatenate([np.column_stack([lat - abs(step), np.full(3, lon)]) for lat, lon in places])
    lat_lon[4] = 10.0, -180.0 + step[1] / np.cos(np.radians(10.0))  # over the date line
    vectors = np.eye(9, dtype=np.float32)
    found = gallery.Gallery(lat_lon, vectors, {}).search(torch.from_numpy(vectors[::3]), 2.0, 1)
    best = np.exp(2.0) / (np.exp(2.0) + 8)
    np.testing.assert_allclose(found.confidence[:, 0], best + best / np.exp(2.0), rtol=1e-12)
    np.testing.assert_allclose(found.confidence[:, 1], best + 2 * best / np.exp(2.0), rtol=1e-12)


def test_blocks_change_nothing(geoclip: GeoCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = normalize(torch.randn(7, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = geoclip.search(queries, 5)
    monkeypatch.setattr(gallery, "BLOCK", 3)
    parts = geoclip.search(queries, 5)
    np.testing.assert_array_equal(whole.rows, parts.rows)
    np.testing.assert_allclose(whole.confidence, parts.confidence, rtol=1e-4)


def test_called_with_pictures(geoclip: GeoCLIP, pictures: list[str]) -> None:
    found = geoclip(pictures)
    assert [prediction.id for prediction in found] == pictures
    assert found[4].error and found[4].lat is None and found[4].confidence is None
    alone = geoclip(pictures[0])[0]
    assert (alone.id, alone.lat, alone.lon) == (found[0].id, found[0].lat, found[0].lon)
    assert alone.confidence == pytest.approx(found[0].confidence, rel=1e-4) and alone.source == "gallery"
    assert geoclip([pictures[4]])[0].error


def test_texts_go_through_the_same_head(geoclip: GeoCLIP, geoclip_package: Path) -> None:
    texts = ["a fjord with red houses", "a desert"]
    wanted = by_hand(geoclip_package, geoclip.backbone.texts(texts)).topk(4, dim=1).indices
    np.testing.assert_array_equal(geoclip.search(geoclip.embed_texts(texts), 4).rows, wanted.numpy())


def test_the_gallery_is_encoded_once(
    copied: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[str], clip_folder: Path
) -> None:
    encode, calls = gallery.embed_places, []

    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(len(arguments[1]))
        return encode(*arguments, **more)

    monkeypatch.setattr(gallery, "embed_places", counted)
    pixels, _ = load_pictures(pictures[:3], 224)

    def answers() -> Any:
        geoclip = GeoCLIP.from_pretrained(copied, clip_folder)
        return geoclip.search(geoclip.embed(pixels), 5).rows

    wanted = answers()
    assert calls == []  # the conversion did it
    vectors, before = copied / "gallery.npy", (copied / "gallery.npy").read_bytes()
    spoiled: dict[str, Callable[[], object]] = {
        "missing": vectors.unlink,
        "cut off": lambda: vectors.write_bytes(before[:5000]),
        "one bit": lambda: vectors.write_bytes(before[:90_000] + bytes([before[90_000] ^ 1]) + before[90_001:]),
        "pickled": lambda: np.save(vectors, np.array([{"a": 1}], object), allow_pickle=True),
        "no manifest": (copied / "gallery.json").unlink,
        "another's manifest": lambda: (copied / "gallery.json").write_text('{"made_from": {}, "sha256": ""}'),
    }
    for spoil in spoiled.values():
        spoil()
        np.testing.assert_array_equal(answers(), wanted)
        assert calls.pop() == 300 and not calls
        assert vectors.read_bytes() == before
        np.testing.assert_array_equal(answers(), wanted)
        assert not calls


def test_other_weights_or_places_are_encoded_anew(copied: Path) -> None:
    location = LocationEncoder.from_pretrained(copied)
    first = gallery.open_gallery(copied, location)
    with torch.no_grad():
        location.get_submodule("LocEnc0.head.0").bias += 1.0  # type: ignore[operator]
    second = gallery.open_gallery(copied, location)
    assert np.abs(first.vectors - second.vectors).max() > 0.01
    gallery.write_places(copied, first.lat_lon[:20])
    assert gallery.open_gallery(copied, location).vectors.shape == (20, 512)


def test_what_does_not_fit_is_said(copied: Path, clip_folder: Path, tmp_path: Path, one_line: OneLine) -> None:
    with one_line("gives 16 numbers a picture.*768 of openai/clip-vit-large-patch14"):
        GeoCLIP.from_pretrained(copied, save_clip(tmp_path / "small", dim=16))
    with one_line("the gallery has 300 places"):
        GeoCLIP.from_pretrained(copied, clip_folder).search(torch.zeros(1, 512), 301)
    for name in ("geoclip.json", "location.safetensors", "gallery.parquet"):
        content = (copied / name).read_bytes()
        (copied / name).unlink()
        with one_line(name):
            GeoCLIP.from_pretrained(copied, clip_folder)
        (copied / name).write_bytes(content)
    gallery.write_places(copied, np.array([[91.0, 0.0]]))
    with one_line("latitude 91"):
        GeoCLIP.from_pretrained(copied, clip_folder)


def test_locate_without_an_index(
    geoclip: GeoCLIP, geoclip_folder: Path, clip_folder: Path, pictures: list[str], tmp_path: Path
) -> None:
    common = ("--preset", "geoclip", "--weights", geoclip_folder, "--backbone", clip_folder, "--run", tmp_path / "run")
    for ending in ("parquet", "csv", "jsonl", "geojson", "kml"):
        out = tmp_path / f"o.{ending}"
        assert call("locate", Path(pictures[0]).parent, *common, "--top-k", 3, "--out", out) == 0
    rows, expected = read_table(tmp_path / "o.parquet").to_pylist(), geoclip(pictures)
    assert [row["id"] for row in rows] == pictures
    for row, wanted in zip(rows, expected, strict=True):
        sure = None if row["error"] else tuple(row[f"confidence_{r}"] for r in (1, 25, 200, 750, 2500))
        assert [row[name] for name in ("lat", "lon", "error", "source")] == [
            wanted.lat, wanted.lon, wanted.error, wanted.source]  # fmt: skip
        assert sure is wanted.confidence is None or sure == pytest.approx(wanted.confidence, rel=1e-4)
        assert row["places"] is None if row["error"] else len(row["places"]) == 3
        assert row["error"] or row["places"][0]["lat"] == row["lat"]
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert lines == rows
    with (tmp_path / "o.csv").open() as file:
        cells = [row["places"] for row in csv.DictReader(file)]
    assert [json.loads(cell) if cell else None for cell in cells] == [row["places"] for row in rows]


def test_a_stopped_run_goes_on(
    geoclip_folder: Path, clip_folder: Path, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (
        "--preset",
        "geoclip",
        "--weights",
        geoclip_folder,
        "--backbone",
        clip_folder,
        "--out",
        tmp_path / "o.csv",
    )
    assert call("locate", *pictures, *common) == 0

    monkeypatch.setattr(GeoCLIP, "embed", lambda *_: pytest.fail("embedded again"))
    assert call("locate", *pictures, *common, "--top-k", 2) == 0  # other answers from the same embeddings
    with pytest.raises(pytest.fail.Exception, match="embedded again"):
        call("locate", *pictures[:3], *common)


def test_texts_are_answered(
    geoclip: GeoCLIP, geoclip_folder: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, common = ("a fjord with red houses", "a desert"), ("--weights", geoclip_folder, "--backbone", clip_folder)
    assert call("where", *texts, *common, "--k", 4, "--json") == 0
    answers, wanted = json.loads(capsys.readouterr().out), geoclip.search(geoclip.embed_texts(texts), 4)
    assert [answer["text"] for answer in answers] == list(texts)
    for answer, lat_lon in zip(answers, wanted.lat_lon.tolist(), strict=True):
        assert [[place["lat"], place["lon"]] for place in answer["places"]] == lat_lon
    assert call("where", texts[0], *common, "--k", 2) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_wrong_usage_and_failures(
    geoclip_folder: Path, clip_folder: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locate, out = ("locate", pictures[0]), ("--out", tmp_path / "o.csv")
    preset = ("--preset", "geoclip", "--weights", geoclip_folder, "--backbone", clip_folder)
    assert call(*locate, *out) == 2
    assert call(*locate, *out, "--preset", "other", "--weights", geoclip_folder) == 2
    assert call(*locate, *out, "--preset", "geoclip") == 2
    assert call(*locate, *out, *preset, "--index", tmp_path) == 2
    assert call(*locate, *out, *preset, "--verify", "alignment") == 2
    assert call(*locate, *out, "--index", tmp_path, "--top-k", 3) == 2
    assert not (tmp_path / "o.csv").exists()

    assert "000.png" not in fails(capsys, "locate", pictures[4], *out, *preset)
    assert "nowhere" in fails(capsys, *locate, *out, *preset[:-1], tmp_path / "nowhere")
    assert "ask for no more" in fails(capsys, *locate, *out, *preset, "--top-k", 301)
    assert "o.doc" in fails(capsys, *locate, "--out", tmp_path / "o.doc", *preset)


def test_the_package_may_be_named_at_any_depth(geoclip_package: Path, geoclip_folder: Path, tmp_path: Path) -> None:
    site = tmp_path / "geoclip"
    shutil.copytree(geoclip_package, site / "model")
    shutil.copytree(geoclip_package / "gps_gallery", tmp_path / "flat" / "gps_gallery")
    for path in (geoclip_package / "weights").iterdir():
        shutil.copy(path, tmp_path / "flat")
    for given in (site, site / "model", site / "model" / "weights", tmp_path, tmp_path / "flat"):
        assert convert_geoclip(given, tmp_path / "out") == 300
        for name in ("location.safetensors", "geoclip.safetensors", "gallery.parquet", "gallery.npy", "location.json"):
            assert (tmp_path / "out" / name).read_bytes() == (geoclip_folder / name).read_bytes()
        shutil.rmtree(tmp_path / "out")
