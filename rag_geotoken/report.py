"""The report of a run: one HTML page that holds everything it shows and asks nothing of the network.

Here the figures become tables and plots, in `maps` the places become pictures; every word and every mark is in
`report.html.jinja`. The page has no script: maps and plots are SVG, and a policy in its head forbids loading anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rag_geotoken import files, maps
from rag_geotoken.metrics import wilson_interval
from rag_geotoken.types import RADII_KM


def write_report(
    path: str | Path,
    *,
    metrics: Mapping[str, Any],
    errors: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    about: str = "",
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the HTML file.
        metrics: what `metrics.json` holds: variants (rows of `metrics.summary`), seed, versions (name to version),
            seconds (of the whole run); and, if there, stages (name to seconds), calibration (`metrics.calibration`) and
            abstention (`metrics.abstention`).
            Rows of verified variants may have gain, gain_ci95, gap_closed, mended, broken (numbers) and cost besides.
            A variant named oracle-... is marked as an oracle and competes with none.
        errors: the map: lat, lon, km, each (N,), true places and errors of one variant on the test split; km is NaN
            without an answer. The key name says which variant; without it the best one at 200 km is taken.
        examples: photos to show, each with id, split, crop (H, W, 3) uint8, true (lat, lon), answer (lat, lon) or None,
            km (NaN without an answer), confidence (by radius), neighbours (crop or None, lat, lon, score, km to the
            truth) and candidates (lat, lon, source, weight); and, if there, of the token model's posterior heat, mass
            (H, 2H) as `posterior.heat_map` gives it, and area_km2, its effective area.
        notes: paragraphs for the end of the page, as plain text.
        about: a paragraph for the top, what the photos are.

    Raises:
        GeoError: the map's arrays differ in length, a crop or heat map is none, or the file cannot be written.
    """
    files.write_text(Path(path), render(metrics, errors, examples, notes, about))


def render(
    metrics: Mapping[str, Any],
    errors: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    about: str = "",
) -> str:
    """The page as text; the arguments are those of `write_report`."""
    from jinja2 import Environment, StrictUndefined

    rows = list(metrics["variants"])
    stages = metrics.get("stages") or {}
    # The template is a file of the package, never a user's: what is shown comes in as values, which are escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["place"] = _place
    environment.filters["km"] = maps.format_km
    environment.filters["km2"] = maps.format_km2
    environment.filters["duration"] = _duration
    text = resources.files("rag_geotoken").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        radii=[str(r) for r in RADII_KM],
        earth=maps.earth_picture(),
        headline=_headline(rows, errors.get("name")),
        error_map=maps.error_map(errors["lat"], errors["lon"], errors["km"]),
        splits=_ablation(rows),
        gains=[row for row in rows if "gain" in row],
        examples=[maps.draw_example(example) for example in examples],
        reliability=_reliability(metrics.get("calibration") or {}),
        silence=_silence(metrics.get("abstention") or []),
        run={
            "seed": metrics["seed"],
            "seconds": float(metrics["seconds"]),
            "versions": dict(metrics["versions"]),
            "stages": {name: float(s) for name, s in stages.items()},
        },
        notes=list(notes),
        about=about.strip(),
    )


def _is_oracle(row: Mapping[str, Any]) -> bool:
    return str(row["name"]).startswith("oracle")


def _headline(rows: Sequence[Mapping[str, Any]], name: str | None) -> dict[str, Any]:
    """The variant that the page opens with, beside the nearest neighbour of the same split."""
    split = rows[0]["split"]
    here = [row for row in rows if row["split"] == split]
    methods = [row for row in here if not _is_oracle(row)] or here
    best = max(methods, key=lambda row: float(row["acc"]["200"]))
    return {
        "split": split,
        "chosen": next((row for row in methods if row["name"] == name), best),
        "nearest": next((row for row in here if row["name"] == "nearest"), None),
    }


def _ablation(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One table a split, in the order the rows come; the best that is no oracle marked in each column."""
    out = []
    for split in dict.fromkeys(row["split"] for row in rows):
        here = [row for row in rows if row["split"] == split]
        methods = [row for row in here if not _is_oracle(row)]
        best = {str(r): max((float(row["acc"][str(r)]) for row in methods), default=None) for r in RADII_KM}
        nearest = min((row["median_km"] for row in methods if row["median_km"] is not None), default=None)
        lines = [
            {
                "name": row["name"],
                "oracle": _is_oracle(row),
                "median": row["median_km"],
                "median_best": not _is_oracle(row) and row["median_km"] is not None and row["median_km"] == nearest,
                "cells": [
                    {
                        "radius": r,
                        "value": float(row["acc"][r]),
                        "low": float(row["ci95"][r][0]),
                        "high": float(row["ci95"][r][1]),
                        "best": not _is_oracle(row) and float(row["acc"][r]) == best[r],
                    }
                    for r in best
                ],
            }
            for row in here
        ]
        out.append({"name": split, "n": here[0]["n"], "rows": lines})
    return out


def _reliability(calibration: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One panel a radius: stated against found, dots grown with the photos in the bin, in units of 100."""
    panels = []
    for radius, table in calibration.items():
        most = max((b["n"] for b in table["bins"]), default=1)
        dots = []
        for b in table["bins"]:
            low, high = wilson_interval(b["correct"], b["n"])
            found = f"stated {b['confidence']:.0%}, found {b['correct']:.0%} (95 % interval {low:.0%} to {high:.0%})"
            dots.append(
                {
                    "x": 100 * b["confidence"],
                    "y": 100 - 100 * b["correct"],
                    "top": 100 - 100 * high,
                    "bottom": 100 - 100 * low,
                    "r": 1.5 + 2.5 * math.sqrt(b["n"] / most),
                    "title": f"{b['n']:,} photo{'s' if b['n'] > 1 else ''}: {found}",
                }
            )
        points = None if table["ece"] is None else 100 * table["ece"]
        panels.append({"radius": int(radius), "points": points, "n": table["n"], "dots": dots})
    return panels


def _silence(abstention: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Accuracy against the share of photos answered: a curve for 25 and for 200 km, in units of 100, and the rows."""
    if not abstention:
        return None
    rows = sorted(abstention, key=lambda row: -float(row["kept"]))
    silent = max(1 - float(rows[-1]["kept"]), 1e-9)
    curves = [
        {
            "radius": radius,
            "dots": [
                {
                    "x": 100 * (1 - row["kept"]) / silent,  # all photos on the left, the most silence on the right
                    "y": 100 - row["acc"][radius],
                    "title": f"{row['kept']:.0%} answered: {row['acc'][radius]:.1f} % within {radius} km",
                }
                for row in rows
            ],
        }
        for radius in ("25", "200")
    ]
    return {"curves": curves, "rows": rows}


def _place(lat_lon: tuple[float, float]) -> str:
    lat, lon = lat_lon
    return f"{abs(lat):.2f}° {'N' if lat >= 0 else 'S'}, {abs(lon):.2f}° {'E' if lon >= 0 else 'W'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
