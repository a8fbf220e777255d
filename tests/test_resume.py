"""Stopping and going on: between stages, inside one, and by a real kill; nothing is done twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OPTIONS, REWARD, tiny_tokens

from rag_geotoken import tables
from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.index import GeoIndex
from rag_geotoken.options import Options
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.reward import RewardHead
from rag_geotoken.run import retrieval
from rag_geotoken.run.ablation import VARIANTS
from rag_geotoken.run.demo import run_demo, run_road

STAGES = (
    "embeddings",
    "neighbours",
    "candidates",
    "places",
    "posterior",
    "matches",
    "pool",
    "verdicts-alignment",
    "verdicts-reward",
    "verdicts-visual",
    "predictions-pool+alignment",
)
MODELS = (
    "alignment.GeoAlignment.embed",
    "alignment.GeoAlignment.embed_places",
    "index.GeoIndex.search",
    "pipeline.Geolocator.memory",
    "pipeline.Geolocator.match",
)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but those that hold its seconds."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("metrics.json", "report.html")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def begin(run_folder: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(run_folder / "photos.parquet", folder)
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(f"rag_geotoken.{name}", lambda *_, name=name, **__: pytest.fail(f"{name} again"))


def test_a_run_leaves_every_table_and_nothing_else(run_folder: Path) -> None:
    names = {*STAGES[:-1], *(f"predictions-{variant}" for variant in VARIANTS)}
    found = {str(path.relative_to(run_folder)) for path in run_folder.rglob("*")}
    assert found == {f"{name}.{end}" for name in names for end in ("parquet", "json")} | {"photos.parquet"}


@pytest.mark.parametrize("stopped", STAGES)
def test_stopped_before_a_stage_ends_goes_on_to_the_same_bytes(
    stopped: str, run_folder: Path, geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tables.write_tables

    def stop(path: Path, parts: object) -> int:
        if Path(path).name == f"{stopped}.parquet":
            raise KeyboardInterrupt
        return whole(path, parts)  # type: ignore[arg-type]

    begin(run_folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_tables", stop)
        with pytest.raises(KeyboardInterrupt):
            run_road(tmp_path, geolocator, OPTIONS)
    assert not list(tmp_path.rglob(f"{stopped}.parquet"))
    run_road(tmp_path, geolocator, OPTIONS)
    assert contents(tmp_path) == contents(run_folder)


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (GeoAlignment, "embed", 4),
        (GeoIndex, "search", 4),
        (Geolocator, "propose", 4),
        (Geolocator, "posterior", 4),
        (Geolocator, "pool", 4 + 4),  # four variants make a pool of one kind
        (Geolocator, "match", 4),
        (Geolocator, "verify", 4 + 3 + 3),  # three verifiers
    ],
)
def test_stopped_inside_a_stage_goes_on_with_the_block_that_is_missing(
    owner: type,
    name: str,
    count: int,
    run_folder: Path,
    geolocator: Geolocator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrieval, "BLOCK", 11)  # 30 photos: three blocks
    begin(run_folder, tmp_path / "through")
    run_road(tmp_path / "through", geolocator, OPTIONS)
    method = getattr(owner, name)
    calls: list[int] = []

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return method(*given, **named)

    begin(run_folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(KeyboardInterrupt):
            run_road(tmp_path / "run", geolocator, OPTIONS)
        run_road(tmp_path / "run", geolocator, OPTIONS)
    assert len(calls) == count  # the block that was stopped is done again, no other
    assert contents(tmp_path / "run") == contents(tmp_path / "through")


def test_killed_processes_end_in_the_same_bytes(weights: Path, tmp_path: Path) -> None:
    run_demo(tmp_path / "through", 20, 1, weights, 100)
    program = (
        "from pathlib import Path; from rag_geotoken.run.demo import run_demo; "
        f"run_demo(Path({str(tmp_path / 'run')!r}), 20, 1, Path({str(weights)!r}), 100)"
    )
    # Killed as soon as a table of the next folder is there, wherever the process is by then.
    for marker in ("index/stages/photos.parquet", "test/candidates.parquet"):
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not (tmp_path / "run" / marker).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run_demo(tmp_path / "run", 20, 1, weights, 100)
    assert contents(tmp_path / "run") == contents(tmp_path / "through")


def test_done_stages_are_not_done_again(
    run_folder: Path, geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    forbid(monkeypatch, "alignment.load_pictures", *MODELS)
    run_road(folder, geolocator, OPTIONS)
    assert contents(folder) == contents(run_folder)


def test_one_lost_table_is_made_again_and_nothing_before_it(
    run_folder: Path, geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    for name in ("pool.parquet", "predictions-density.parquet", "verdicts-alignment.json"):
        (folder / name).unlink()
    forbid(monkeypatch, "alignment.load_pictures", "index.GeoIndex.search", "pipeline.Geolocator.memory")
    run_road(folder, geolocator, OPTIONS)
    assert contents(folder) == contents(run_folder)


def other(geolocator: Geolocator, **changes: Any) -> Geolocator:
    names = ("alignment", "tokens", "index", "tuning", "reward")
    return Geolocator(**{name: getattr(geolocator, name) for name in names} | changes)


def other_tokens() -> torch.nn.Module:
    model = tiny_tokens()
    with torch.no_grad():
        model.output_layers[0].bias[2] += 0.5  # type: ignore[index, operator]
    return model


POOLED = {"pool", "verdicts-alignment", "verdicts-reward", "verdicts-visual"}
DECIDED = {f"predictions-{variant}" for variant in VARIANTS}
REWARDED = {f"predictions-{variant}" for variant, (inputs, _) in VARIANTS.items() if "verdicts-reward" in inputs}
NO_CELLS = ("nearest", "density", "gps", "tokens-frontier", "visual-best", "visual-consensus")
WITHOUT_CELLS = {f"predictions-{variant}" for variant in NO_CELLS}
SAMPLED: dict[str, dict[str, Any]] = {
    "samples": {"samples": 7},
    "seed": {"seed": 1},
    "top_p": {"top_p": 0.5},
    "epsilon": {"epsilon": 0.1},
    "temperature": {"temperature": 0.5},
    "within": {"within": (20.0, 20.0, 4000.0)},
}
ANEW: dict[str, tuple[Callable[[Geolocator], Geolocator], Options, set[str]]] = {
    "nothing": (lambda to: to, OPTIONS, set()),
    "tokens": (lambda to: other(to, tokens=other_tokens()), OPTIONS, {"candidates", "posterior", *POOLED, *DECIDED}),
    "reward": (lambda to: other(to, reward=RewardHead(REWARD)), OPTIONS, {"verdicts-reward", *REWARDED}),
    "spread": (lambda to: other(to, tuning=replace(to.tuning, spread_km=99.0)), OPTIONS, DECIDED),
    # Places have no weight in the tests' tuning: the pool is made again and stays the same, so nothing follows it.
    "gps_places": (lambda to: to, replace(OPTIONS, gps_places=3), {"places", "pool", "predictions-gps"}),
    "openings": (lambda to: to, replace(OPTIONS, openings=2), {"posterior", *DECIDED}),
    **{
        name: (lambda to: to, replace(OPTIONS, **change), {"candidates", *POOLED, *DECIDED} - WITHOUT_CELLS)
        for name, change in SAMPLED.items()
    },
}


@pytest.mark.parametrize("change", ANEW)
def test_other_weights_and_options_redo_what_depends_on_them_and_no_more(
    change: str, run_folder: Path, geolocator: Geolocator, tmp_path: Path
) -> None:
    changed, options, expected = ANEW[change]
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    before = {path.stem: path.stat().st_ino for path in folder.glob("*.parquet")}
    run_road(folder, changed(geolocator), options)
    after = {path.stem: path.stat().st_ino for path in folder.glob("*.parquet")}
    assert before.keys() == after.keys()
    redone = {name for name in after if after[name] != before[name]}
    assert redone == expected
