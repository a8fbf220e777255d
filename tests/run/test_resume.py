"""Stopping and going on: between stages, inside one, and by a real kill; nothing is done twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import REWARD, VARIANTS, tiny_tokens

from rag_geotoken.models import Models
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run import resumable, stages
from rag_geotoken.run.ablate import walk_variants
from rag_geotoken.run.demo import run_demo
from rag_geotoken.run.variants import Variant
from rag_geotoken.run.walk import RunFolder
from rag_geotoken.storage.files import read_json
from rag_geotoken.tokens.reward import RewardHead

STAGES = (
    "embeddings",
    "neighbors",
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
    "encoders.alignment.GeoAlignment.embed",
    "encoders.alignment.GeoAlignment.embed_places",
    "index.geo_index.GeoIndex.search",
    "models.Models.memory",
    "photos.matching.AerialMatcher.match",
)
PICTURES = ("encoders.alignment.load_pictures", "run.stages.load_pictures")


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a run: bytes, and JSON without the seconds of the work; no page, which shows them."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "report.html"]
    return {str(path.relative_to(folder)): timeless(path) for path in files}


def timeless(path: Path) -> Any:
    if path.suffix != ".json":
        return path.read_bytes()
    facts = read_json(path)
    return {name: value for name, value in facts.items() if name not in ("seconds", "stages")} | {
        "variants": [{k: v for k, v in row.items() if k != "cost"} for row in facts.get("variants", [])]
    }


def walk(folder: Path, models: Models, variants: Sequence[Variant] = VARIANTS) -> RunFolder:
    """The road as a new process meets it."""
    run = RunFolder(folder, models)
    walk_variants(run, list(variants))
    return run


def begin(run_folder: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(run_folder / "photos.parquet", folder)
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(f"rag_geotoken.{name}", lambda *_, name=name, **__: pytest.fail(f"{name} again"))


def plain(name: str) -> str:
    """A table's stage: a second table of one has a part of its identity behind the name."""
    return re.sub(r"-[0-9a-f]{8}$", "", name)


def test_a_run_leaves_every_table_and_nothing_else(run_folder: Path) -> None:
    names = [*STAGES[:-1], *(f"predictions-{variant.name}" for variant in VARIANTS)]
    # A second pool, with moved places, and its verdicts; the pools of one source; the verdict of moved places alone.
    names += ["pool", "verdicts-alignment", *ALONE_POOLS, "verdicts-visual"]
    found = sorted(str(path.relative_to(run_folder)) for path in run_folder.rglob("*"))
    assert len(set(found)) == 2 * len(names) + 1 and "photos.parquet" in found
    for end in ("parquet", "json"):
        tables = [plain(name.removesuffix(f".{end}")) for name in found if name.endswith(f".{end}")]
        assert sorted(tables) == sorted([*names, *["photos"] * (end == "parquet")])


@pytest.mark.parametrize("stopped", STAGES)
def test_stopped_before_a_stage_ends_goes_on_to_the_same_bytes(
    stopped: str, run_folder: Path, geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = resumable.write_tables

    def stop(path: Path, parts: Any) -> int:
        if Path(path).name == f"{stopped}.parquet":
            raise KeyboardInterrupt
        return whole(path, parts)

    begin(run_folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "write_tables", stop)
        with pytest.raises(KeyboardInterrupt):
            walk(tmp_path, geolocator)
    assert not list(tmp_path.rglob(f"{stopped}.parquet"))
    walk(tmp_path, geolocator)
    assert contents(tmp_path) == contents(run_folder)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("embed", 1),
        ("search", 1),
        ("propose", 1),
        ("find_places", 1),
        ("believe", 1),
        ("match", 1),
        ("pool", 9),  # two of all sources, with moved places and without, and seven of one source
        ("verdict", 5),  # three verifiers, the alignment of both pools, and pictures of the moved places alone
        ("decide", len(VARIANTS)),
    ],
)
def test_stopped_inside_a_stage_goes_on_with_the_block_that_is_missing(
    name: str,
    tables: int,
    run_folder: Path,
    geolocator: Geolocator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resumable, "BLOCK", 11)  # 30 photos: three blocks
    begin(run_folder, tmp_path / "through")
    walk(tmp_path / "through", geolocator)
    work = getattr(stages, name)
    calls, numbers = list[int](), count(1)

    def counted(*given: Any, **named: Any) -> Any:
        number = next(numbers)  # blocks are made side by side
        calls.append(number)
        if number == 2:
            raise KeyboardInterrupt
        return work(*given, **named)

    begin(run_folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(stages, name, counted)
        with pytest.raises(KeyboardInterrupt):
            walk(tmp_path / "run", geolocator)
        walk(tmp_path / "run", geolocator)
    assert len(calls) == 3 * tables + 1  # the block that was stopped is done again, no other
    assert contents(tmp_path / "run") == contents(tmp_path / "through")


def test_killed_processes_end_in_the_same_bytes(weights: Path, tmp_path: Path) -> None:
    def demo(out: Path) -> None:
        run_demo(out, test_n=20, seed=1, weights=weights, gallery=100)

    demo(tmp_path / "through")
    program = (
        "from pathlib import Path; from rag_geotoken.run.demo import run_demo; "
        f"run_demo(Path({str(tmp_path / 'run')!r}), test_n=20, seed=1, weights=Path({str(weights)!r}), gallery=100)"
    )
    # Killed as soon as a table of the next folder is there, wherever the process is by then.
    for marker in ("index/stages/photos.parquet", "test/candidates.parquet"):
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not (tmp_path / "run" / marker).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert (tmp_path / "run" / marker).exists() and not (tmp_path / "run" / "metrics.json").exists()
    demo(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "through")


def test_done_stages_are_not_done_again(
    run_folder: Path, geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    forbid(monkeypatch, *PICTURES, *MODELS)
    run = walk(folder, geolocator)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert {f"{name}.parquet" for name in run.reused} == {p.name for p in before if p.suffix == ".parquet"} - {
        "photos.parquet"
    }


def test_one_lost_table_is_made_again_and_nothing_before_it(
    run_folder: Path, geolocator: Geolocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    lost = ("pool.parquet", "predictions-density.parquet", "verdicts-alignment.json")
    for name in lost:
        (folder / name).unlink()
    forbid(monkeypatch, *PICTURES, "index.geo_index.GeoIndex.search", "models.Models.memory")
    run = walk(folder, geolocator)
    assert contents(folder) == contents(run_folder)
    assert set(run.seconds) - set(run.reused) == {Path(name).stem for name in lost}


def other(geolocator: Geolocator, **changes: Any) -> Geolocator:
    names = ("alignment", "tokens", "index", "tuning", "reward")
    return Geolocator(**{name: getattr(geolocator, name) for name in names} | changes)


def other_tokens() -> torch.nn.Module:
    model = tiny_tokens()
    with torch.no_grad():
        model.output_layers[0].bias[2] += 0.5  # type: ignore[index, operator]
    return model


NAMED = {variant.name: variant.options for variant in VARIANTS}
POOLED = {"pool", "verdicts-alignment", "verdicts-reward", "verdicts-visual"}
DECIDED = {f"predictions-{name}" for name in NAMED}
REWARDED = {f"predictions-{name}" for name, options in NAMED.items() if "reward" in options.verify}
ALONE = {name: options.sources[0] for name, options in NAMED.items() if len(options.sources) == 1}
ALONE_POOLS = {f"pool-{source}" for source in ALONE.values()}
GENERATED = {"pool-greedy", "pool-beam", "pool-sample"}
# Of the decisions, those that follow from no sample: a pool that is made again and stays the same changes nothing.
WITHOUT_SAMPLES = {f"predictions-{name}" for name, source in ALONE.items() if source != "sample"}
SAMPLED: dict[str, dict[str, Any]] = {
    "samples": {"samples": 7},
    "seed": {"seed": 1},
    "top_p": {"top_p": 0.5},
    "epsilon": {"epsilon": 0.1},
    "temperature": {"temperature": 0.5},
}
ANEW: dict[str, tuple[Callable[[Geolocator], Geolocator], dict[str, Any], set[str]]] = {
    "nothing": (lambda to: to, {}, set()),
    "tokens": (
        lambda to: other(to, tokens=other_tokens()),
        {},
        {"candidates", "posterior", "pool-frontier", *GENERATED, *POOLED, *DECIDED},
    ),
    "reward": (lambda to: other(to, reward=RewardHead(REWARD)), {}, {"verdicts-reward", *REWARDED}),
    "spread": (lambda to: other(to, tuning=replace(to.tuning, spread_km=99.0)), {}, DECIDED),
    # All places of a photo lie in one cell: the pool is made again and stays the same, so nothing follows it.
    "gps_places": (lambda to: to, {"gps_places": 3}, {"places", "pool", "pool-gps"}),
    "openings": (lambda to: to, {"openings": 2}, {"posterior", "pool-frontier", *DECIDED}),
    # All but the embeddings and the places: what is found near a photo is another.
    "within": (
        lambda to: to,
        {"within": (20.0, 20.0, 4000.0)},
        {"neighbors", "candidates", "posterior", "matches", *ALONE_POOLS, *POOLED, *DECIDED},
    ),
    **{
        name: (lambda to: to, change, {"candidates", *GENERATED, *POOLED, *DECIDED} - WITHOUT_SAMPLES)
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
    variants = [replace(variant, options=replace(variant.options, **options)) for variant in VARIANTS]
    run = walk(folder, changed(geolocator), variants)
    after = {path.stem: path.stat().st_ino for path in folder.glob("*.parquet")}
    assert {plain(name) for name in after} == {plain(name) for name in before}
    redone = {name for name in after if after[name] != before.get(name)}
    assert redone == set(run.seconds) - set(run.reused)
    # The visual verdict of the moved places alone has a name of its own.
    assert {name for name in redone if plain(name) == name} == expected
