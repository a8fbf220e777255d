"""How much a busy neighbor slows us: `python eval/bench_neighbor.py --index runs/demo/index [--json OUT]`.

Each task runs in processes of its own, alone and beside one process that never rests, with different settings of idle
OpenMP threads, in turn. ``before`` is what libgomp does by itself: idle threads spin 300,000 times before they sleep.
``ours`` is what the package sets on import. Exits 1 when ours is more than 8 % slower than before alone, or beside a
neighbor more than 2.2 times as long as alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POLICIES: dict[str, dict[str, str]] = {
    "before": {"GOMP_SPINCOUNT": "300000"},
    "ours": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
EVERYWHERE = ("before", "ours")  # the others are tried on decoding alone, to choose by
TASKS = ("decoding", "encoding", "search", "road")
REPEATS, PHOTOS = 3, 50
SLOWER, BESIDE = 1.08, 2.2


def work_of(task: str, index: Path) -> Callable[[], object]:
    """What is timed, its models loaded."""
    import rag_geotoken  # noqa: F401  sets how long threads spin, before torch is loaded

    if task == "decoding":
        import bench_decoding

        from rag_geotoken.tokens import decoding

        arguments = argparse.Namespace(seed=0, batch=32, dtype="float32", device="cpu", compile=False)
        model, inputs = bench_decoding.build(arguments)
        return lambda: decoding.beam(model, model.memory(*inputs), 4)
    import numpy as np

    from rag_geotoken import Geolocator, Options
    from rag_geotoken.photos.sources import read_source

    geolocator = Geolocator.from_pretrained(index)
    rng = np.random.default_rng(0)
    if task == "encoding":
        pixels = rng.integers(0, 256, (512, 64, 64, 3), np.uint8)
        return lambda: geolocator.alignment.embed(pixels)
    if task == "search":
        queries = geolocator.index.vectors(rng.integers(0, len(geolocator.index.rows), 1000))
        return lambda: geolocator.index.search(queries, 20, geolocator.tuning.search_weights)
    photos = read_source(f"blue-marble:validation,n={PHOTOS}")["image"].to_pylist()
    options = Options(verify=("visual", "alignment", "reward"), area=True)
    return lambda: geolocator(photos, options)


def run_task(task: str, index: Path) -> None:
    """Print the median seconds of a task, the first time left out."""
    work, seconds = work_of(task, index), []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    print(statistics.median(seconds[1:]))


def timed(task: str, policy: dict[str, str], index: Path, busy: bool) -> float:
    """Seconds of a task in a process of its own."""
    variables = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in variables} | policy
    neighbor = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, __file__, "--task", task, "--index", str(index)]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    finally:
        if neighbor:
            neighbor.kill()
            neighbor.wait()
    return float(output.split()[-1])


def ratio(seconds: list[float], of: list[float]) -> float:
    """The median of the rounds' ratios: a machine's slow minutes slow both of a round."""
    return round(statistics.median(a / b for a, b in zip(seconds, of, strict=True)), 3)


def main() -> int:
    """Run every task with every policy, alone and beside a neighbor, some rounds in turn."""
    parser = argparse.ArgumentParser(description="Time decoding, encoding, search and the road beside a busy process.")
    parser.add_argument("--index", type=Path, default=Path("runs/demo/index"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    if arguments.task:
        run_task(arguments.task, arguments.index)
        return 0
    from rag_geotoken.storage.files import write_json
    from rag_geotoken.storage.parquet import versions

    tasks: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        policies = [name for name in POLICIES if task == "decoding" or name in EVERYWHERE]
        found: dict[tuple[str, bool], list[float]] = {}
        for i in range(arguments.rounds):
            for name in policies if i % 2 else policies[::-1]:  # in turn, so that a drift favors none
                for busy in (False, True):
                    seconds = timed(task, POLICIES[name], arguments.index, busy)
                    found.setdefault((name, busy), []).append(seconds)
        rows: dict[str, Any] = {}
        for name in policies:
            alone, beside = found[name, False], found[name, True]
            ratios = {
                "alone_over_before": ratio(alone, found["before", False]),
                "beside_over_alone": ratio(beside, alone),
            }
            medians = {"alone_s": round(statistics.median(alone), 4), "beside_s": round(statistics.median(beside), 4)}
            rows[name] = medians | ratios
            print(f"{task:<10}{name:<12}{rows[name]}", flush=True)
        tasks[task] = rows
    met = all(
        rows["ours"]["alone_over_before"] <= SLOWER and rows["ours"]["beside_over_alone"] <= BESIDE
        for rows in tasks.values()
    )
    if arguments.json:
        command = f"python eval/bench_neighbor.py --index runs/demo/index --rounds {arguments.rounds}"
        record: dict[str, Any] = {"command": command, "rounds": arguments.rounds, "repeats": REPEATS, "photos": PHOTOS}
        record |= {"policies": POLICIES, "seed": 0, "threads": os.cpu_count(), "met": met, "tasks": tasks}
        write_json(arguments.json, record | {"versions": versions()})
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
