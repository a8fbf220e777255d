"""All trainings of a recipe in order: what they write, which photos they see, and what they refuse."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call
from numpy.typing import NDArray
from tiny import OneLine
from tiny_training import GALLERY, NO_CHOICE, save_alignment, save_pictures, tiny, write_recipe

from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.photos import blue_marble
from rag_geotoken.photos.blue_marble import draw, draw_views, is_unseen
from rag_geotoken.photos.sources import read_source
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.build_index import make_index
from rag_geotoken.storage.recipes import training_recipe
from rag_geotoken.training import run
from rag_geotoken.training.loop import one_cycle

Floats = NDArray[np.float64]
KEPT = ("test", "unseen", "relief")
TRAININGS: dict[str, dict[str, Any]] = {
    "alignment": {"source": "blue-marble:train", "steps": 2, "batch": 6, "rate": 1e-3, "seed": 0},
    "tokens": {
        "source": "blue-marble:train,n=48,seed=1",
        "held_out": 10,
        "neighbor_positions": "sequence",
        "epochs": 2,
        "batch": 8,
        "rate": 1e-3,
        "seed": 1,
    },
    "reward": {"photos": 40, "epochs": 2, "batch": 8, "rate": 1e-3, "seed": 2},
    "tuning": {"source": "blue-marble:validation,n=12", "grid": NO_CHOICE},
    "verifier": {
        "source": "blue-marble:train,n=24,seed=5",
        "held_out": 8,
        "vocabulary": 600,
        "steps": 1,
        "batch": 8,
        "views": 4,
        "rate": 1e-3,
        "seed": 3,
    },
}
RECIPE: dict[str, Any] = {"gallery": GALLERY} | TRAININGS


@dataclass
class Seen:
    """What was drawn and cut from the Earth: splits, and views (N, 6) with the picture that they came from."""

    splits: set[str] = field(default_factory=set)
    views: list[Floats] = field(default_factory=list)
    pictures: set[str] = field(default_factory=set)

    def kept(self) -> list[str]:
        """What should have been left for measuring results."""
        found = sorted(self.splits & set(KEPT)) + sorted(self.pictures - {"bmng"})
        if any(is_unseen(*view[:, :2].T).any() for view in self.views):
            found.append("a place in a cell kept for unseen")
        for split in KEPT:
            measured = places([draw_views(split, blue_marble.SPLITS[split], 0)])
            found += [f"a photo of {split}"] * bool(measured & self.places())
        return found

    def places(self) -> set[tuple[float, float]]:
        return places(self.views)


def places(views: list[Floats]) -> set[tuple[float, float]]:
    return {(lat, lon) for each in views for lat, lon in each[:, :2].tolist()}


@contextmanager
def watched() -> Iterator[Seen]:
    seen, cut = Seen(), blue_marble.cut

    def drawn(split: str, n: int, seed: int) -> Floats:
        seen.splits.add(split)
        return draw_views(split, n, seed)

    def noted(views: Floats, picture: str = "bmng", *size: int) -> NDArray[np.uint8]:
        seen.views.append(views)
        seen.pictures.add(picture)
        return cut(views, picture, *size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blue_marble, "draw_views", drawn)
        patch.setattr(blue_marble, "cut", noted)
        yield seen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Seen]]:
    """A folder of weights that the recipe above made from nothing, and what each training saw."""
    out, seen = tmp_path_factory.mktemp("made") / "weights", {}
    for what in TRAININGS:
        with tiny(), watched() as seen[what]:
            run.train(what, RECIPE, out)
    return out, seen


def test_a_recipe_makes_a_folder_that_locates(made: tuple[Path, dict[str, Seen]]) -> None:
    out, _ = made
    names = {f"{name}.{kind}" for name in ("alignment", "tokens", "reward") for kind in ("json", "safetensors")}
    assert {path.name for path in out.iterdir()} == names | {"tuning.json"}
    kept = {f"weights-{name}checkpoint.safetensors" for name in ("alignment-", "")}
    kept |= {"weights-verifier-checkpoint.safetensors"}
    beside = {f"weights{name}" for name in ("", "-index", "-photos", "-verifier", "-verifier-photos")} | kept
    assert {path.name for path in out.parent.iterdir()} == beside
    geolocator = Geolocator.from_pretrained(out.with_name("weights-index"), out)
    modes = {"none", "alignment", "reward", "alignment+reward", "look", "alignment+look", "visual", "alignment+visual"}
    assert set(geolocator.tuning.calibration) == modes
    [answer] = geolocator(read_source("blue-marble:validation,n=1")["image"].to_pylist())
    assert answer.lat is not None and answer.error is None
    tensors = [value for model in (geolocator.alignment, geolocator.tokens) for value in model.state_dict().values()]
    assert all(torch.isfinite(value).all() for value in tensors)


def test_no_training_sees_a_test_photo(made: tuple[Path, dict[str, Seen]]) -> None:
    _, seen = made
    assert {what: one.splits for what, one in seen.items()} == {
        "alignment": {"train"},
        "tokens": {"gallery", "train"},
        "reward": {"gallery"},
        "tuning": {"gallery", "validation"},
        "verifier": {"gallery", "train"},
    }
    assert {what: one.kept() for what, one in seen.items()} == {what: [] for what in TRAININGS}
    counts = {what: sum(map(len, one.views)) for what, one in seen.items() if what != "verifier"}
    validation = places([draw_views("validation", 2000, 0)])
    # Tuning compares its photos with their neighbors' pictures.
    assert counts.pop("tuning") > 12 and len(seen["tuning"].places() & validation) == 12
    assert counts == {"alignment": 12, "tokens": 60 + 48, "reward": 0}
    assert not validation & (seen["alignment"].places() | seen["tokens"].places())


@pytest.mark.parametrize("split", KEPT)
def test_a_test_photo_would_be_seen(split: str) -> None:
    with watched() as seen:
        draw(read_source(f"blue-marble:{split},n=2")["image"].to_pylist())
    assert split in seen.kept() and f"a photo of {split}" in seen.kept()


@pytest.mark.parametrize(
    ("what", "split"),
    [(what, split) for what in ("alignment", "tokens", "verifier") for split in (*KEPT, "validation")]
    + [("tuning", split) for split in (*KEPT, "train", "gallery")],
)
def test_sources_that_are_kept_for_other_uses_are_refused(
    what: str, split: str, tmp_path: Path, one_line: OneLine
) -> None:
    source = f"blue-marble:{split},n=5,seed=9"
    with watched() as seen, one_line(f"{source} is kept for other uses: choose blue-marble:"):
        run.train(what, RECIPE | {what: TRAININGS[what] | {"source": source}}, tmp_path)
    assert not seen.views and not list(tmp_path.iterdir())


def test_the_recipe_that_ships_fits() -> None:
    recipe = training_recipe(None)
    assert isinstance(recipe.pop("gallery"), str)
    assert list(recipe) == list(TRAININGS)
    heads = training_recipe(None, "g3")
    assert run._settings(heads, "heads") == heads["heads"]
    for what in recipe:
        assert run._settings(recipe, what) == recipe[what]
    seeds = [section["seed"] for section in recipe.values() if "seed" in section]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        ("alignment", {"stepz": 2}, "stepz"),
        ("alignment", {"steps": 0}, "steps"),
        ("alignment", {"steps": "many"}, "steps"),
        ("alignment", {"steps": 2.0}, "steps"),
        ("alignment", {"batch": 0}, "batch"),
        ("alignment", {"seed": -1}, "seed"),
        ("alignment", {"seed": True}, "seed"),
        ("alignment", {"rate": float("nan")}, "rate"),
        ("alignment", {"rate": float("inf")}, "rate"),
        ("alignment", {"rate": -1e-3}, "rate"),
        ("alignment", {"source": "folder:photos"}, "folder:photos draws no views afresh"),
        ("tokens", {"views": 4}, "views"),
        ("tokens", {"held_out": 0}, "held_out"),
        ("tokens", {"epochs": 0}, "epochs"),
        ("tokens", {"rate": "fast"}, "rate"),
        ("tokens", {"neighbor_positions": "flat"}, "'flat': choose sequence, none or spherical"),
        ("tokens", {"source": "nowhere:at"}, "nowhere:at"),
        ("tokens", {"batch": 49}, "48 photos, batches of 49"),
        ("tokens", {"source": "gallery", "held_out": 60}, "hold out fewer"),
        ("reward", {"photos": 0}, "photos"),
        ("reward", {"source": "gallery"}, "source"),
        ("verifier", {"batch": 17}, "24 photos, 8 of them held out, do not fill a batch of 17"),
        ("verifier", {"vocabulary": 0}, "vocabulary"),
        ("verifier", {"source": "gallery"}, "gallery"),
        ("tuning", {"source": "blue-marble:validation,n=x"}, "n=x"),
        ("tuning", {"source": "gallery"}, "gallery"),
        ("tuning", {"source": 3}, "source"),
        ("tuning", {"grid": 3}, "grid"),
        ("tuning", {"grid": {}}, "decision"),
    ],
)
def test_wrong_settings_are_named(
    what: str, change: dict[str, Any], words: str, made: tuple[Path, dict[str, Seen]], tmp_path: Path, one_line: OneLine
) -> None:
    out = copy_weights(made[0], tmp_path / "weights")
    with tiny(), one_line(words):
        run.train(what, RECIPE | {what: TRAININGS[what] | change}, out)


@pytest.mark.parametrize("recipe", [{}, {"alignment": {"steps": 2}}, {"alignment": 3}])
def test_a_recipe_without_a_section_is_named(recipe: dict[str, Any], tmp_path: Path, one_line: OneLine) -> None:
    with one_line(r"\[alignment\]"):
        run.train("alignment", recipe, tmp_path)


@pytest.mark.parametrize(
    ("what", "missing"),
    [
        ("tokens", "alignment"),
        ("reward", "alignment"),
        ("reward", "tokens"),
        ("tuning", "tokens"),
        ("tuning", "reward"),
        ("verifier", "tuning"),
    ],
)
def test_a_model_that_should_be_there_first_is_named(
    what: str, missing: str, made: tuple[Path, dict[str, Seen]], tmp_path: Path, one_line: OneLine
) -> None:
    out = copy_weights(made[0], tmp_path / "weights", *({"alignment", "tokens", "reward", "tuning"} - {missing}))
    with tiny(), one_line(f"{missing}.json"):
        run.train(what, RECIPE, out)


def test_gallery_photos_can_be_trained_on(tmp_path: Path) -> None:
    out = save_alignment(tmp_path / "w")
    with tiny(), watched() as seen:
        run.train("tokens", RECIPE | {"tokens": TRAININGS["tokens"] | {"source": "gallery"}}, out)
    assert seen.splits == {"gallery"} and sum(map(len, seen.views)) == 60
    # What is made of the index's photos lies beside the weights, never in the index.
    stages = {path.stem for path in (tmp_path / "w-index" / "stages").iterdir()}
    assert stages == {"photos", "left_out", "embeddings"} and (out / "tokens.safetensors").is_file()


OTHERS = ("tokens", "reward", "tuning", "verifier", "mllm")  # all that a gallery is trained with


def save_views(folder: Path, count: int, seed: int) -> str:
    """A folder of PNG files with their own places -> its source."""
    places = [f"{lat},{lon}" for lat, lon, *_ in draw_views("train", count, seed).tolist()]
    return save_pictures(folder, places, seed=seed)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_weights(folder: Path, out: Path, *models: str) -> Path:
    """Some of the models of a folder, or all, in another."""
    out.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if not models or file.stem in models:
            shutil.copy(file, out)
    return out


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, made: tuple[Path, dict[str, Seen]]) -> Path:
    """An index of 60 pictures of a folder, nothing of which is the demo's."""
    folder = tmp_path_factory.mktemp("own")
    make_index(folder / "index", save_views(folder / "gallery", 60, 7), GeoAlignment.from_pretrained(made[0]))
    return folder / "index"


def test_every_training_runs_on_any_index_and_leaves_it_as_it_was(
    own: Path, made: tuple[Path, dict[str, Seen]], tmp_path: Path
) -> None:
    out, before = copy_weights(made[0], tmp_path / "weights", "alignment"), contents(own)
    photos, few = save_views(tmp_path / "photos", 24, 8), save_views(tmp_path / "few", 6, 9)
    tuning = {"source": few, "grid": NO_CHOICE}

    def train(what: str, source: str = photos) -> dict[str, bytes]:
        tokens = TRAININGS["tokens"] | {"epochs": 1, "source": source}
        # No gallery in the recipe: the index says it all.
        sections = TRAININGS | {"tokens": tokens, "tuning": tuning}
        recipe = write_recipe(tmp_path / "recipe.toml", sections)
        with tiny(), watched() as seen:
            assert call("train", what, recipe, "--out", out, "--index", own) == 0
        assert contents(own) == before and seen.splits <= {"train"} and not seen.kept()
        return contents(out)

    of_photos, of_gallery = train("tokens"), train("tokens", "gallery")
    assert of_photos["tokens.safetensors"] != of_gallery["tokens.safetensors"]
    assert "reward.safetensors" in train("reward")
    tuned = train("tuning")
    assert train("verifier") == tuned and (tmp_path / "weights-verifier" / "model.safetensors").is_file()
    assert train("mllm")["tuning.json"] != tuned["tuning.json"]
    assert not out.with_name("weights-index").exists()
    geolocator = Geolocator.from_pretrained(own, out)
    assert {"none", "mllm"} <= set(geolocator.tuning.calibration)
    [answer] = geolocator(str(tmp_path / "few" / "00.png"))
    assert answer.lat is not None and answer.error is None


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("what", OTHERS)
def test_an_index_of_other_contents_is_refused_and_left_untouched(
    what: str, known: bool, own: Path, made: tuple[Path, dict[str, Seen]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, index = copy_weights(made[0], tmp_path / "w"), tmp_path / "w-index"
    shutil.copytree(own, index)
    if not known:  # no stage tables beside it, as one that was copied from elsewhere
        shutil.rmtree(index / "stages")
    shutil.copytree(made[0].with_name("weights-verifier"), tmp_path / "w-verifier")
    before = contents(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.toml", RECIPE)
    with tiny(), watched() as seen:
        assert call("train", what, recipe, "--out", out) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"holds an index of other photos than {GALLERY}" in said[0] and "--index" in said[0]
    assert not seen.views
    recipe.unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", OTHERS)
def test_an_index_of_another_encoder_is_refused_and_left_untouched(
    what: str, own: Path, made: tuple[Path, dict[str, Seen]], tmp_path: Path, one_line: OneLine
) -> None:
    out, before = copy_weights(made[0], tmp_path / "w", "tokens", "reward", "tuning"), contents(own)
    save_alignment(out)
    verifier = str(made[0].with_name("weights-verifier"))
    with tiny(), one_line("the index was built with encoder"):
        if what == "mllm":
            run.train("mllm", RECIPE, out, own, where=verifier)
        else:
            run.train(what, RECIPE, out, own)
    assert contents(own) == before


def test_an_index_of_the_same_photos_that_keeps_pictures_is_not_made_anew(tmp_path: Path) -> None:
    out, index = save_alignment(tmp_path / "w"), tmp_path / "w-index"
    make_index(index, GALLERY, GeoAlignment.from_pretrained(out), thumbnails=32)
    before = contents(index)
    with tiny(), suppress(GeoError):  # taken as it is or refused
        run.train("tokens", RECIPE, out)
    assert contents(index) == before


def test_an_index_that_is_none_is_named(tmp_path: Path, one_line: OneLine) -> None:
    out = save_alignment(tmp_path / "w")
    with tiny(), one_line("no index in .*nothing"):
        run.train("tokens", RECIPE, out, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_recipe_without_a_gallery_needs_an_index(tmp_path: Path, one_line: OneLine) -> None:
    out = save_alignment(tmp_path / "w")
    with tiny(), one_line("the recipe names no gallery: give --index"):
        run.train("tokens", {"tokens": TRAININGS["tokens"]}, out)


def test_here_is_a_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = save_alignment(tmp_path / "w")
    monkeypatch.chdir(out)
    with tiny():
        run.train("tokens", RECIPE, Path("."))
    assert (out / "tokens.safetensors").is_file() and (tmp_path / "w-index").is_dir()


def test_a_mistake_of_ours_is_no_wrong_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blue_marble, "draw_views", lambda: None)  # takes no arguments
    with pytest.raises(TypeError):
        run.train("alignment", RECIPE, tmp_path)


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 400])
def test_the_learning_rate_rises_and_falls(steps: int) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = one_cycle(optimizer, 1.0, steps), []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    rates.append(float(optimizer.param_groups[0]["lr"]))
    assert all(0 <= rate <= 1.0 + 1e-9 for rate in rates)
    if steps >= 20:
        assert max(rates) == pytest.approx(1.0, abs=0.02) and rates[-1] < 0.01
