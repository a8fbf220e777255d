"""The tuning of a weights folder: read as it was written, or one line that says what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import OneLine

from rag_geotoken.decision.tuning import Tuning, load_tuning
from rag_geotoken.storage.files import write_json
from rag_geotoken.storage.weights import EARTH

PAIRS = ((0.5, 1.0), (-0.25, 0.75), (0.0, 1.0), (1.0, 0.0), (2.0, 1.5))


def spoiled(folder: Path, **changes: Any) -> Path:
    """A folder whose tuning has other values; None leaves one out."""
    values = asdict(replace(Tuning(), calibration={"none": PAIRS})) | changes
    (folder / "tuning.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def test_a_tuning_comes_back_as_it_was_written(tmp_path: Path) -> None:
    tuning = Tuning(
        search_weights=(0.25, 1.0, 0.75),
        neighbor_scale=12.5,
        reward_scale=3.0,
        calibration={"none": PAIRS, "alignment+reward": PAIRS[::-1]},
    )
    write_json(tmp_path / "tuning.json", asdict(tuning))
    assert load_tuning(tmp_path) == tuning
    write_json(tmp_path / "tuning.json", asdict(Tuning()))
    assert load_tuning(tmp_path) == Tuning() and dict(load_tuning(tmp_path).calibration) == {}


def test_whole_numbers_become_floats(tmp_path: Path) -> None:
    found = load_tuning(spoiled(tmp_path, spread_km=75, search_weights=[1, 1, 0]))
    assert found.spread_km == 75.0 and found.search_weights == (1.0, 1.0, 0.0)
    numbers = [getattr(found, f.name) for f in fields(found) if f.type == "float"]
    assert all(isinstance(x, float) for x in (*numbers, *found.search_weights, *found.router))


def test_the_tuning_that_travels_with_the_package() -> None:
    tuning = load_tuning(EARTH)
    names = "none alignment reward alignment+reward look alignment+look visual alignment+visual mllm alignment+mllm"
    assert set(tuning.calibration) == {*names.split(), "mllm+visual", "alignment+mllm+visual"}
    assert all(slope >= 0 for rows in tuning.calibration.values() for _, slope in rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": None},
        {"search_weights": None},
        {"search_weights": [1.0, 1.0]},
        {"search_weights": 3},
        {"search_weights": [1.0, "much", 1.0]},
        {"neighbor_share": "much"},
        {"neighbor_share": float("nan")},
        {"spread_km": float("inf")},
        {"spread_km": [1.0]},
        {"reward_scale": 10**400},
        {"sharpness": 1.0},
        {"calibration": []},
        {"calibration": {"none": PAIRS[:4]}},
        {"calibration": {"none": [[0.0, 1.0, 2.0]] * 5}},
        {"calibration": {"none": [[0.0, None]] * 5}},
        {"calibration": {"none": [[0.0, float("nan")]] * 5}},
        {"calibration": {"none": 1}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_what_is_no_tuning_is_named(changes: dict[str, Any], tmp_path: Path, one_line: OneLine) -> None:
    with one_line("tuning.json in .* is not a tuning: "):
        load_tuning(spoiled(tmp_path, **changes))


@pytest.mark.parametrize("text", ["[]", "3", "null", '"tuning"', "{}"])
def test_json_of_another_kind_is_named(text: str, tmp_path: Path, one_line: OneLine) -> None:
    (tmp_path / "tuning.json").write_text(text)
    with one_line("tuning.json in .* is not a tuning: "):
        load_tuning(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path: Path, one_line: OneLine) -> None:
    with one_line(r"there is no .*tuning\.json"):
        load_tuning(tmp_path)
    (tmp_path / "tuning.json").write_text("{")
    with one_line(r"tuning\.json is not readable JSON"):
        load_tuning(tmp_path)
