"""Tuning: what is chosen did best, each set of verifiers is calibrated, and only photos with a place count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import ROWS, OneLine
from tiny_training import NO_CHOICE, quiet, save_pictures

from rag_geotoken.decision.confidence import fit_calibration
from rag_geotoken.decision.tuning import Tuning, load_tuning
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run import stages
from rag_geotoken.storage.files import write_json
from rag_geotoken.storage.recipes import training_recipe
from rag_geotoken.training import tuning as training
from rag_geotoken.training.tuning import tune
from rag_geotoken.types import RADII_KM, Neighbors, Tables

Floats = NDArray[np.float64]
SOURCE = "blue-marble:validation,n=30"
GRID: dict[str, dict[str, list[float]]] = training_recipe(None)["tuning"]["grid"]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def tuned(geolocator: Geolocator, lines: list[str]) -> Tuning:
    return tune(geolocator, SOURCE, GRID, lines.append)


def test_every_number_is_chosen_from_its_grid_as_the_best(tuned: Tuning, lines: list[str]) -> None:
    grids = {name: values for grid in GRID.values() for name, values in grid.items()}
    given = {"search_weights", "calibration", "view_km", "mllm_scale", "mllm_share", "router"}
    assert set(grids) | given == set(asdict(tuned)) == set(asdict(Tuning()))
    tried = [line.split(": ") for line in lines if line.split()[0] in grids]
    # In groups, as the recipe has them, twice around where there is more than one number.
    order = [name for grid in GRID.values() for name in (2 if len(grid) > 1 else 1) * list(grid)]
    assert [line[0].split()[0] for line in tried] == order
    for chosen, values in tried:
        name, number = chosen.split()
        shown = [float(value) for value in values.split()]
        assert shown[grids[name].index(float(number))] == max(shown)
    last = dict(chosen.split() for chosen, _ in tried)
    assert {name: float(last[name]) for name in grids} == {name: getattr(tuned, name) for name in grids}


def test_each_set_of_verifiers_is_calibrated(tuned: Tuning, lines: list[str]) -> None:
    modes = {"none", "alignment", "reward", "alignment+reward", "look", "alignment+look", "visual", "alignment+visual"}
    assert set(tuned.calibration) == modes
    assert {line.split(": ")[0] for line in lines if line.startswith("verified by")} == {
        f"verified by {m}" for m in modes
    }
    for pairs in tuned.calibration.values():
        assert len(pairs) == len(RADII_KM) and all(math.isfinite(a) and 0 <= b < 100 for a, b in pairs)
    assert len(set(tuned.calibration.values())) > 1


def test_what_is_written_is_read_as_it_was(tuned: Tuning, tmp_path: Path) -> None:
    write_json(tmp_path / "tuning.json", asdict(tuned))
    assert load_tuning(tmp_path) == tuned


def test_a_calibration_is_fitted_to_the_decision_that_it_is_for(
    geolocator: Geolocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []

    def noted(stated: Floats, right: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
        fitted.append(fit_calibration(stated, right))
        assert stated.shape == right.shape == (30, len(RADII_KM))
        assert (np.diff(right.astype(int), axis=1) >= 0).all()  # within 1 km is within 25 km
        return fitted[-1]

    monkeypatch.setattr(training, "fit_calibration", noted)
    found = tune(geolocator, SOURCE, NO_CHOICE, quiet)
    # All is the same but the verifiers, and what was fitted last is what is stated.
    assert list(found.calibration.values()) == fitted[-8:] and len(set(fitted[-8:])) > 1


def test_without_a_reward_head_there_is_none_to_tune(geolocator: Geolocator) -> None:
    parts = geolocator.alignment, geolocator.tokens, geolocator.index, geolocator.tuning
    whole, found = (tune(models, SOURCE, NO_CHOICE, quiet) for models in (geolocator, Geolocator(*parts)))
    assert set(found.calibration) == {"none", "alignment", "look", "alignment+look", "visual", "alignment+visual"}
    assert found.reward_scale == Tuning().reward_scale
    assert found.calibration == {name: whole.calibration[name] for name in found.calibration}


def test_photos_without_a_place_are_left_out(geolocator: Geolocator, tmp_path: Path, one_line: OneLine) -> None:
    lines: list[str] = []
    some = save_pictures(tmp_path / "some", ["10,20", ",", "30,40"], "validation")
    tune(geolocator, some, NO_CHOICE, lines.append)
    assert "pools of 2 validation photos" in lines
    with one_line("has no photo with a place"):
        tune(geolocator, save_pictures(tmp_path / "none", [","], "validation"), NO_CHOICE, quiet)


def test_a_picture_that_cannot_be_read_is_named(geolocator: Geolocator, tmp_path: Path, one_line: OneLine) -> None:
    source = save_pictures(tmp_path / "photos", ["10,20", "30,40"], "validation")
    (tmp_path / "photos" / "01.png").write_bytes(b"no picture")
    with one_line(r"tuning needs pictures that can be read: .*01\.png"):
        tune(geolocator, source, NO_CHOICE, quiet)


def test_a_gallery_photo_does_not_find_itself(
    geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[Neighbors] = []
    search = stages.search

    def noted(models: Models, options: Options, tables: Tables) -> Neighbors:
        searched.append(search(models, options, tables))
        return searched[-1]

    monkeypatch.setattr(stages, "search", noted)
    tune(geolocator, save_pictures(tmp_path, ["10,20", "30,40", "50,60"], "gallery", of=ROWS), NO_CHOICE, quiet)
    ids = geolocator.index.rows["id"].to_pylist()
    assert len(searched[0].rows) == 3
    for i, rows in enumerate(searched[0].rows.tolist()):
        assert f"gallery-0-{i:06d}" in ids and f"gallery-0-{i:06d}" not in [ids[row] for row in rows]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"look": None}, "decision, reward, look, visual, confidence, visual_confidence, density"),
        ({"decision": {"guess": [1.0]}}, r"\[tuning.grid.decision\] guess does not fit"),
        ({"density": {"density_km": []}}, r"\[tuning.grid.density\] density_km does not fit"),
        ({"density": {"density_km": ["far"]}}, r"\[tuning.grid.density\] density_km does not fit"),
        ({"density": 3}, r"\[tuning.grid\] has .*give tables"),
        ({"look": {"look_beta": [0.5], "look_semantic": [12.0]}}, "look_spatial"),
        ({"density": {"calibration": [1.0]}}, r"\[tuning.grid.density\] calibration does not fit"),
    ],
)
def test_a_grid_that_does_not_fit_is_named(
    change: Mapping[str, Any], words: str, geolocator: Geolocator, one_line: OneLine
) -> None:
    grid = {group: values for group, values in (NO_CHOICE | change).items() if values is not None}
    with one_line(words):
        tune(geolocator, SOURCE, grid, quiet)


def test_a_grid_need_not_hold_the_numbers_that_tuning_begins_with(geolocator: Geolocator) -> None:
    mix = {"look_beta": [0.25], "look_semantic": [24.0], "look_spatial": [40.0]}
    for look in ({"look_scale": [80.0]} | mix, mix | {"look_scale": [80.0]}):
        found = tune(geolocator, SOURCE, NO_CHOICE | {"look": look}, quiet)
        assert {name: getattr(found, name) for name in look} == {name: values[0] for name, values in look.items()}
