"""Are our S2 cells s2sphere's, and how much faster: `python eval/bench_cells.py [--points N] [--seed S] [--json OUT]`.

Random points uniform by area and the special places (poles, date line, edges and corners of faces and cells) are
compared bit for bit at every level; exits 1 when one differs or when the speed ratio is under 100. One thread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
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

from rag_geotoken.geo.cells import MAX_LEVEL, S2Tokenizer, cell_centers, cell_ids, parent_ids

Floats = NDArray[np.float64]
Ids = NDArray[np.uint64]

SLICE = 20_000  # points that s2sphere is timed on at once


def random_points(n: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Lat (n,), lon (n,) in degrees, uniform by area."""
    return np.degrees(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)


def special_points(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """About 17,000 places where a cell is easy to miss, each with the neighboring floating-point numbers."""
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
    """Lat (N,), lon (N,) of cell centers by s2sphere, in degrees."""
    places = [s2sphere.CellId(i).to_lat_lng() for i in ids.tolist()]
    return np.array([p.lat().degrees for p in places]), np.array([p.lng().degrees for p in places])


def parents_by_bits(leaves: Ids, level: int) -> Ids:
    """What s2sphere's `parent(level)` does to an id, on an array."""
    low = 1 << (2 * (MAX_LEVEL - level))
    return (leaves & np.uint64(2**64 - low)) | np.uint64(low)


def timed(repeat: int, work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What `work(*args)` returns and the nanoseconds of its quickest run."""
    best = math.inf
    for _ in range(repeat):
        start = time.perf_counter_ns()
        result = work(*args)
        best = min(best, time.perf_counter_ns() - start)
    return result, best


def speed(lat: Floats, lon: Floats) -> tuple[dict[str, float], Ids]:
    """Nanoseconds a point by name, the quickest of several so that other work does not count; s2sphere's leaves."""
    parts = [slice(k, k + SLICE) for k in range(0, lat.size, SLICE)]
    theirs = [timed(1, s2sphere_ids, lat[part], lon[part]) for part in parts]
    theirs_20 = [timed(1, s2sphere_ids, lat[part], lon[part], 20) for part in parts[:5]]
    per_point = {
        "s2sphere level 20": min(ns / ids.size for ids, ns in theirs_20),
        "s2sphere level 30": min(ns / ids.size for ids, ns in theirs),
    }

    tokenizer = S2Tokenizer()
    tokens = tokenizer.encode(lat, lon)
    ours: dict[str, tuple[Any, ...]] = {
        "cell_ids level 20": (cell_ids, lat, lon, 20),
        "cell_ids level 30": (cell_ids, lat, lon, 30),
        "cell_ids level 30, all on an edge": (cell_ids, 0 * lat, lon, 30),
        "encode level 20": (tokenizer.encode, lat, lon),
        "decode level 20": (tokenizer.decode, tokens),
    }
    for name, call in ours.items():
        per_point[name] = timed(7, *call)[1] / lat.size
    return per_point, np.concatenate([ids for ids, _ in theirs])


def differences(lat: Floats, lon: Floats, leaves: Ids, sample: NDArray[np.int64]) -> dict[str, Any]:
    """How many ids differ from s2sphere's at each level, and how far centers are apart on the sample."""
    different: dict[int, int] = {}
    parents, degrees = 0, 0.0
    for level in range(MAX_LEVEL + 1):
        expected = parents_by_bits(leaves, level)
        parents += int((s2sphere_ids(lat[sample], lon[sample], level) != expected[sample]).sum())
        ids = cell_ids(lat, lon, level)
        different[level] = int(((ids != expected) | (parent_ids(leaves, level) != expected)).sum())
        pairs = zip(cell_centers(ids[sample]), s2sphere_centers(expected[sample]), strict=True)
        degrees = max(degrees, *(float(np.abs(a - b).max()) for a, b in pairs))
    return {
        "different_ids_by_level": different,
        "parents_checked": {"sample": sample.size, "different": parents},
        "largest_center_difference_deg": degrees,
    }


def bench(points: int, seed: int) -> dict[str, Any]:
    """Compare and time; the record that is printed and written."""
    rng = np.random.default_rng(seed)
    lat, lon = random_points(points, rng)
    edge_lat, edge_lon = special_points(rng)
    per_point, leaves = speed(lat, lon)
    lat, lon = np.concatenate([lat, edge_lat]), np.concatenate([lon, edge_lon])
    leaves = np.concatenate([leaves, s2sphere_ids(edge_lat, edge_lon)])
    sample = rng.choice(lat.size, 2_000, replace=False)
    return {
        "seed": seed,
        "points": points,
        "special_points": edge_lat.size,
        **differences(lat, lon, leaves, sample),
        "ns_per_point": {name: round(ns, 1) for name, ns in per_point.items()},
        "times_faster": {
            k: round(per_point[f"s2sphere level {k}"] / per_point[f"cell_ids level {k}"]) for k in (20, 30)
        },
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "s2sphere": importlib.metadata.version("s2sphere"),
        },
    }


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
    print(f"centers differ by at most {record['largest_center_difference_deg']:.1e} degrees")
    for name, ns in sorted(record["ns_per_point"].items()):
        print(f"  {name:34}{ns:12,.1f} ns a point")
    for level, ratio in record["times_faster"].items():
        print(f"  level {level}: {ratio:,.0f} times as fast as s2sphere")
    if args.json:
        beside = args.json.with_name(args.json.name + ".part")
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, args.json)
    return 1 if wrong or min(record["times_faster"].values()) < 100 else 0


if __name__ == "__main__":
    sys.exit(main())
