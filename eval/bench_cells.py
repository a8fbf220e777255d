"""Are our S2 cells s2sphere's, and how much faster: `python eval/bench_cells.py [--points N] [--seed S] [--json OUT]`.

Random points uniform by area and the special places (poles, date line, edges and corners of faces and cells) are
compared bit for bit at every level; exits 1 when one differs or when the speed ratio is under 100. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import s2sphere  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

from rag_geotoken.cells import MAX_LEVEL, S2Tokenizer, cell_centers, cell_ids, parent_ids

Floats = NDArray[np.float64]
Ids = NDArray[np.uint64]


def random_points(n: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Lat (n,), lon (n,) in degrees, uniform by area."""
    return np.degrees(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)


def special_points(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """About 11,000 places where a cell is easy to miss, each with the neighbouring floating-point numbers."""
    grid_lat, grid_lon = np.meshgrid(np.arange(-90, 91, 7.5), np.arange(-180, 181, 7.5))
    tiny = [-1e-8, -1e-16, -5e-324, -0.0, 0.0, 5e-324, 1e-16, 1e-8]
    tiny_lat, tiny_lon = np.meshgrid(tiny, [*tiny, -180.0, 180.0, 90.0])
    # An edge between cells at s = k / 2**level, s in 0..1 across a face; level 0 gives the edges of the faces.
    level = rng.integers(0, MAX_LEVEL + 1, 1500)
    s = np.floor(rng.uniform(0, 2.0**level + 1)) / 2.0**level
    s[:300] = rng.integers(0, 2, 300)
    u = np.where(s >= 0.5, 4 * s * s - 1, 1 - 4 * (1 - s) ** 2) / 3
    other = rng.uniform(-1, 1, u.size)
    other[:100] = rng.choice([-1.0, 1.0], 100)  # corners of the faces
    lats, lons = [grid_lat.ravel(), tiny_lat.ravel()], [grid_lon.ravel(), tiny_lon.ravel()]
    for y, z in ((u, other), (other, u)):
        axis, sign = rng.integers(0, 3, u.size), rng.choice([-1.0, 1.0], u.size)
        xyz = np.stack([sign, y, z])
        xyz = np.take_along_axis(xyz, (np.arange(3)[:, None] + axis) % 3, axis=0)
        lats.append(np.degrees(np.arctan2(xyz[2], np.hypot(xyz[0], xyz[1]))))
        lons.append(np.degrees(np.arctan2(xyz[1], xyz[0])))
    lat, lon = np.concatenate(lats), np.concatenate(lons)
    lat = np.concatenate([lat, np.nextafter(lat, 90), np.nextafter(lat, -90), lat])
    lon = np.concatenate([lon, np.nextafter(lon, 180), lon, np.nextafter(lon, -180)])
    return lat, lon


def s2sphere_ids(lat: Floats, lon: Floats, level: int | None = None) -> Ids:
    """Ids by s2sphere, one point at a time: leaves, or their parents at `level` by its own `parent`."""
    cells = (
        s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(a, b))
        for a, b in zip(lat.tolist(), lon.tolist(), strict=True)
    )
    found = [cell.id() for cell in cells] if level is None else [cell.parent(level).id() for cell in cells]
    return np.array(found, np.uint64)


def s2sphere_centers(ids: Ids) -> tuple[Floats, Floats]:
    """Lat (N,), lon (N,) of cell centres by s2sphere, in degrees."""
    places = [s2sphere.CellId(i).to_lat_lng() for i in ids.tolist()]
    return np.array([p.lat().degrees for p in places]), np.array([p.lng().degrees for p in places])


def parents_by_bits(leaves: Ids, level: int) -> Ids:
    """What s2sphere's `parent(level)` does to an id, on an array."""
    low = 1 << (2 * (MAX_LEVEL - level))
    return (leaves & np.uint64(2**64 - low)) | np.uint64(low)


def timed(work: Callable[[], Any], repeat: int = 1) -> tuple[Any, float]:
    """The result of `work` and the seconds of its quickest run."""
    best = math.inf
    for _ in range(repeat):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return result, best


def bench(points: int, seed: int) -> dict[str, Any]:
    """Compare and time; the record that is printed and written."""
    rng = np.random.default_rng(seed)
    lat, lon = random_points(points, rng)
    edge_lat, edge_lon = special_points(rng)
    tokenizer = S2Tokenizer()
    cell_ids(0, 0)  # builds the curve tables

    leaves, slow_30 = timed(lambda: s2sphere_ids(lat, lon))
    few = slice(0, min(points, 100_000))
    _, slow_20 = timed(lambda: s2sphere_ids(lat[few], lon[few], 20))
    _, fast_20 = timed(lambda: cell_ids(lat, lon, 20), 5)
    _, fast_30 = timed(lambda: cell_ids(lat, lon, 30), 5)
    seconds = {"cell_ids level 20": fast_20, "cell_ids level 30": fast_30}
    tokens, seconds["encode level 20"] = timed(lambda: tokenizer.encode(lat, lon), 3)
    _, seconds["decode level 20"] = timed(lambda: tokenizer.decode(tokens), 3)
    nanoseconds = {name: 1e9 * s / points for name, s in seconds.items()}
    nanoseconds["s2sphere level 20"] = 1e9 * slow_20 / lat[few].size
    nanoseconds["s2sphere level 30"] = 1e9 * slow_30 / points
    # every point on an edge, so that every sine is libm's
    nanoseconds["cell_ids level 30, on an edge"] = 1e9 * timed(lambda: cell_ids(0 * lat, lon), 3)[1] / points

    lat, lon = np.concatenate([lat, edge_lat]), np.concatenate([lon, edge_lon])
    leaves = np.concatenate([leaves, s2sphere_ids(edge_lat, edge_lon)])
    sample = rng.choice(lat.size, min(lat.size, 2_000), replace=False)
    different, parents_differ, center_error = {}, 0, 0.0
    for level in range(MAX_LEVEL + 1):
        expected = parents_by_bits(leaves, level)
        parents_differ += int((s2sphere_ids(lat[sample], lon[sample], level) != expected[sample]).sum())
        ours = cell_ids(lat, lon, level)
        different[level] = int(((ours != expected) | (parent_ids(leaves, level) != expected)).sum())
        ours_at, theirs_at = cell_centers(ours[sample]), s2sphere_centers(expected[sample])
        center_error = max(center_error, *(float(np.abs(a - b).max()) for a, b in zip(ours_at, theirs_at, strict=True)))
    return {
        "seed": seed,
        "points": points,
        "special_points": edge_lat.size,
        "different_ids_by_level": different,
        "parents_checked": {"sample": sample.size, "different": parents_differ},
        "largest_center_difference_deg": center_error,
        "ns_per_point": {name: round(ns, 1) for name, ns in nanoseconds.items()},
        "times_faster": {
            k: round(nanoseconds[f"s2sphere level {k}"] / nanoseconds[f"cell_ids level {k}"], 1) for k in (20, 30)
        },
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "s2sphere": _s2sphere_version()},
    }


def _s2sphere_version() -> str:
    from importlib.metadata import version

    return version("s2sphere")


def main() -> int:
    """Print a small table, write the record, say by the exit status whether all is well."""
    parser = argparse.ArgumentParser(description="Compare and time our S2 cells against s2sphere.")
    parser.add_argument("--points", type=int, default=1_000_000, help="random points (default 1,000,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    if args.points < 1:
        parser.error("--points must be at least 1")

    record = bench(args.points, args.seed)
    wrong = sum(record["different_ids_by_level"].values()) + record["parents_checked"]["different"]
    print(f"{args.points:,} random and {record['special_points']:,} special points, levels 0-30: {wrong} different ids")
    print(f"centres differ by at most {record['largest_center_difference_deg']:.1e} degrees")
    for name, ns in sorted(record["ns_per_point"].items()):
        print(f"  {name:32}{ns:12,.1f} ns a point")
    for level, ratio in record["times_faster"].items():
        print(f"  level {level}: {ratio:,.0f} times as fast as s2sphere")
    if args.json:
        beside = args.json.with_name(args.json.name + ".part")
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, args.json)
    return 1 if wrong or min(record["times_faster"].values()) < 100 else 0


if __name__ == "__main__":
    sys.exit(main())
