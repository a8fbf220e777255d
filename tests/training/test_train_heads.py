"""Training heads on a frozen CLIP: G3's losses, exact resume, several processes, an index that takes them up."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call
from tiny import OneLine
from tiny_clip import save_clip
from tiny_training import Stop, files, save_pictures, single_precision, start, stop_after, write_recipe
from torch.nn.functional import cross_entropy, normalize

from rag_geotoken.encoders.alignment import G3, GeoAlignment, LocationEncoder
from rag_geotoken.encoders.location import LocationConfig
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.options import Options
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.storage.parquet import read_table
from rag_geotoken.training import run
from rag_geotoken.training.contrast import Losses, gps_loss, text_loss
from rag_geotoken.training.examples import STREET_VIEW, Examples, read_examples
from rag_geotoken.training.heads import train_heads
from rag_geotoken.training.processes import make_accelerator

DIM, CHECKPOINT = 16, "alignment-checkpoint"
CONFIG = replace(G3, dim=DIM, location_dim=8, hidden=16, frequencies=4, sigmas=(1.0, 4.0))
NUMBERS: dict[str, Any] = {"epochs": 6, "batch": 16, "rate": 1e-2, "decay": 1e-6, "seed": 3}


def examples(count: int = 70, seed: int = 0) -> Examples:
    """Photos whose features follow from where they are; every fifth has no place name."""
    rng = np.random.default_rng(seed)
    lat_lon = np.column_stack([rng.uniform(-60, 60, count), rng.uniform(-180, 180, count)])
    angles = np.radians(lat_lon) @ np.random.default_rng(9).normal(size=(2, DIM))
    names = np.arange(count) % 7
    names[::5] = -1
    arrays = np.sin(angles).astype(np.float16), lat_lon, np.eye(7, DIM, dtype=np.float16), names
    return Examples(torch.arange(count), *map(torch.from_numpy, arrays))


def train(out: Path, log: Any = lambda line: None, identity: str = "a", **changes: Any) -> GeoAlignment:
    train_heads(CONFIG, examples(), examples(20, 1), out=out, identity=identity, **NUMBERS | changes, log=log)
    return GeoAlignment.from_pretrained(out)


def unit(rows: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_losses_are_those_of_g3() -> None:
    """Where every photo has a text of its own: symmetric cross-entropy against the diagonal."""
    photo, places, scale = unit(6, 0), unit(6, 1), torch.tensor(1.5)
    logits, target = math.exp(1.5) * photo @ places.T, torch.arange(6)
    wanted = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(gps_loss(photo, places, scale), wanted)
    torch.testing.assert_close(text_loss(photo, places, target, scale), wanted)


def test_a_text_shared_by_photos_is_right_for_each() -> None:
    photo, words, scale = unit(4, 0), unit(3, 1)[[0, 1, 0, 2]], torch.tensor(0.7)
    logits = (math.exp(0.7) * photo @ words.T).double()
    same = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).double()
    same /= same.sum(1, keepdim=True)
    wanted = -(same * logits.log_softmax(1)).sum() / 8 - (same * logits.T.log_softmax(1)).sum() / 8
    assert text_loss(photo, words, torch.tensor([0, 1, 0, 2]), scale).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_another_identity_begins_anew(tmp_path: Path) -> None:
    train(tmp_path / "w", identity="b", rate=1e-3)
    train(tmp_path / "w")
    train(tmp_path / "whole" / "w")
    assert files(tmp_path / "w", CHECKPOINT) == files(tmp_path / "whole" / "w", CHECKPOINT)


def test_a_photo_without_text_changes_nothing_for_others() -> None:
    photo, words, scale = unit(5, 0).requires_grad_(), unit(5, 1), torch.tensor(0.7)
    names = torch.tensor([0, -1, 1, -1, 2])
    some = [0, 2, 4]
    alone = text_loss(photo[some], words[some], names[some], scale)
    together = text_loss(photo, words, names, scale)
    torch.testing.assert_close(together, alone)
    together.backward()
    assert photo.grad is not None and not photo.grad[[1, 3]].any() and photo.grad[some].any()
    assert text_loss(photo, words, torch.full((5,), -1), scale).item() == 0


def test_training_learns_and_keeps_the_best(tmp_path: Path) -> None:
    lines: list[str] = []
    trained = train(tmp_path / "w", lines.append)
    assert len(lines) == NUMBERS["epochs"]
    shown = [float(line.split("validation loss ")[1].split(",")[0]) for line in lines]
    assert min(shown) < shown[0] - 0.3 and trained.config == CONFIG
    losses, photos = Losses(trained, make_accelerator()).eval(), examples(20, 1)
    batches = torch.split(torch.arange(20), NUMBERS["batch"])
    with torch.no_grad():
        found = [sum(losses(*photos.batch(rows, torch.device("cpu")))).item() * len(rows) / 20 for rows in batches]
    assert sum(found) == pytest.approx(min(shown), abs=0.03)  # bf16


def test_stopped_anywhere_ends_in_the_same_bytes(tmp_path: Path) -> None:
    train(tmp_path / "whole" / "w")
    for checks in (1, 3):
        with pytest.raises(Stop):
            train(tmp_path / "w", stop_after(checks))
    lines: list[str] = []
    train(tmp_path / "w", lines.append)
    assert len(lines) == 2 and files(tmp_path / "w", CHECKPOINT) == files(tmp_path / "whole" / "w", CHECKPOINT)


def test_the_rate_falls_by_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *given: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    train(tmp_path / "w")
    expected = np.repeat(1e-2 * 0.87 ** np.arange(6), 70 // 16)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_it_begins_with_another_location_encoder(tmp_path: Path, one_line: OneLine) -> None:
    torch.manual_seed(5)
    sizes = {"sigmas": CONFIG.sigmas, "frequencies": 4, "hidden": 16, "dim": 8}
    begin = LocationEncoder(LocationConfig("equal_earth", **sizes))  # type: ignore[arg-type]
    trained = train(tmp_path / "w", epochs=1, rate=1e-9, start=begin)
    found = trained.location[0].state_dict()  # type: ignore[operator]
    for name, value in begin.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    with one_line("other sizes than the recipe's"):
        train(tmp_path / "v", start=LocationEncoder())
    with one_line("70 photos to train on, 20 held out, batches of 71"):
        train(tmp_path / "v", batch=71)


# From the command line, on satellite views through a tiny CLIP.

SETTINGS: dict[str, Any] = {
    "source": "blue-marble:gallery,n=60",
    "location": "equal_earth",
    "start": "",
    "held_out": 8,
    "epochs": 2,
    "batch": 16,
    "rate": 1e-3,
    "decay": 0.0,
    "seed": 1,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("backbone") / "clip", dim=DIM)


@pytest.fixture(scope="module")
def trained(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "w"
    run.train("heads", {"heads": SETTINGS | {"backbone": str(clip)}}, out)
    return out


def test_examples_are_the_backbones(trained: Path, clip: Path) -> None:
    folder, alignment = trained.with_name("w-index") / "stages", GeoAlignment.from_pretrained(trained)
    assert alignment.config.backbone == str(clip) and alignment.config.location == "equal_earth"
    photos, held = read_examples(folder, 8, 1)
    assert (len(photos.rows), len(held.rows)) == (52, 8) and not set(photos.rows.tolist()) & set(held.rows.tolist())
    features, lat_lon, texts, names = held.batch(torch.arange(8), torch.device("cpu"))
    table = read_table(folder / "photos.parquet")
    rows = table.take(held.rows.numpy())
    np.testing.assert_array_equal(lat_lon, np.column_stack([rows["lat"], rows["lon"]]))
    wanted = alignment.backbone.images(load_pictures(rows["image"].to_pylist(), alignment.size)[0])
    torch.testing.assert_close(features, wanted, rtol=2e-3, atol=2e-3)
    places = rows["place"].to_pylist()
    assert None not in places and (names >= 0).all()
    wanted = alignment.backbone.texts([STREET_VIEW.format(place) for place in places])
    torch.testing.assert_close(texts, wanted, rtol=2e-3, atol=2e-3)


def test_asked_again_nothing_is_embedded_or_trained(trained: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(trained, CHECKPOINT)
    for name in ("images", "texts"):
        monkeypatch.setattr(f"rag_geotoken.encoders.clip.ClipEncoder.{name}", lambda *_: pytest.fail("embedded again"))
    monkeypatch.setattr("torch.optim.AdamW.step", lambda *_: pytest.fail("trained again"))
    run.train("heads", {"heads": SETTINGS | {"backbone": str(clip)}}, trained)
    assert files(trained, CHECKPOINT) == before


def test_the_index_takes_the_projections_up_and_photos_are_located(
    trained: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The road without a token model: neighbors and places by GPS embedding, verified by the alignment."""
    index = trained.with_name("w-index")
    with monkeypatch.context() as patch:
        patch.setattr("rag_geotoken.encoders.clip.ClipEncoder.images", lambda *_: pytest.fail("embedded again"))
        factory = ["--factory", "HNSW8,SQfp16"]
        assert call("index", "build", SETTINGS["source"], "--out", index, "--weights", trained, *factory) == 0
    gallery = GeoIndex.load(index, GeoAlignment.from_pretrained(trained).heads)
    assert (gallery.manifest["rows"], gallery.manifest["dim"]) == (60, DIM)
    pictures = tmp_path / "pictures"
    save_pictures(pictures, [","] * 3, seed=4)
    (pictures / "photos.csv").unlink()
    (pictures / "broken.png").write_text("no picture")
    out = tmp_path / "answers.parquet"
    road = ["locate", pictures, "--index", index, "--weights", trained, "--neighbors", 5, "--out", out]
    assert call(*road) == 1
    assert "these weights have no token model" in capsys.readouterr().err
    assert call(*road, "--propose", "none") == 0
    answers = read_table(out)
    assert answers["error"].null_count == 3 and answers["lat"].null_count == 1
    found = Geolocator.from_pretrained(index, trained, str(clip))(
        [str(pictures / f"{i:02}.png") for i in range(3)], Options(neighbors=5, propose=())
    )
    known = {row["id"]: row for row in answers.to_pylist() if row["error"] is None}
    for prediction in found:
        row = known[prediction.id]
        assert (prediction.lat, prediction.lon) == pytest.approx((row["lat"], row["lon"]), abs=1e-6)


def test_two_processes_train_what_one_does(clip: Path, tmp_path: Path) -> None:
    """All photos of a batch are compared with all, on whichever process they are."""
    settings = SETTINGS | {"backbone": str(clip), "rate": 1e-2}
    recipe = write_recipe(tmp_path / "recipe.toml", {"heads": settings})
    (tmp_path / "shared").mkdir()
    with single_precision():
        process = start(["train", "heads", str(recipe), "--out", str(tmp_path / "shared" / "w")], 2)
        run.train("heads", {"heads": settings}, tmp_path / "alone" / "w")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    alone, shared = (GeoAlignment.from_pretrained(tmp_path / name / "w") for name in ("alone", "shared"))
    torch.manual_seed(settings["seed"])
    begun = GeoAlignment(alone.config)
    far = moved = 0
    for name, value in alone.state_dict().items():
        far += int(((shared.state_dict()[name] - value).abs() > 1e-4).sum())
        moved += int(((begun.state_dict()[name] - value).abs() > 1e-3).sum())
    # AdamW makes a whole step of a gradient that rounding alone tells from zero.
    assert far < 1000 and moved > 100_000


def test_what_cannot_be_trained_is_named_before_the_work(clip: Path, tmp_path: Path, one_line: OneLine) -> None:
    settings = SETTINGS | {"backbone": str(clip)}
    for change, words in (
        ({"source": "blue-marble:test"}, "kept for other uses"),
        ({"location": "flat"}, "no projection 'flat'"),
        ({"backbone": str(tmp_path)}, "config.json"),
        ({"start": str(tmp_path / "nowhere")}, "location.json"),
        ({"held_out": 60}, "hold out fewer"),
    ):
        with one_line(words):
            run.train("heads", {"heads": settings | change}, tmp_path / "w")
        assert not (tmp_path / "w" / "alignment.safetensors").exists()
