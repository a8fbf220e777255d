"""These functions write a run's report: one HTML page that holds everything it shows and loads nothing.

Every word, table, plot and mark is in ``report.html.jinja``; :mod:`.maps` prepares places and pictures. The page has no
script: maps and plots are SVG, and a policy in its head forbids loading anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from rag_geotoken.evaluation import maps
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.storage import files
from rag_geotoken.tokens.posterior import heat_map
from rag_geotoken.types import RADII_KM, SOURCES, Answers, Tables

NEIGHBORS, CROP = 8, 64  # neighbors shown beside a photo, and pixels of a picture's side


def write_report(
    path: Path,
    *,
    metrics: Mapping[str, Any],
    errors: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    about: str = "",
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: Of the HTML file.
        metrics: The contents of ``metrics.json``: variants (rows of :func:`.summary`), seed, versions, seconds; and
            possibly stages, :func:`.calibration` and :func:`.abstention`. Rows of verified variants may have gain,
            gain_ci95, gap_closed, mended, broken and cost. A variant named oracle-... competes with none.
        errors: The map: name, a variant of the first row's split, and its lat, lon, km, each (N,): true places and
            errors, NaN without an answer.
        examples: Photos, each with id, split, crop (H, W, 3) uint8, true (lat, lon), answer (lat, lon), km (NaN without
            an answer), confidence (by radius), neighbors (crop or None, lat, lon, score, km to the truth) and
            candidates (lat, lon, source, weight); and possibly of the posterior heat (H, 2H), see :func:`.heat_map`,
            and area_km2.
        notes: Paragraphs for the end of the page, as plain text.
        about: A paragraph for the top of the page.

    Raises:
        GeoError: The map's arrays differ in length, a crop or heat map has another shape, or writing fails.
    """
    from jinja2 import Environment, StrictUndefined

    # The template is a file of the package, never a user's: what is shown comes in as values, which are escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"place": _place, "km": maps.format_km, "km2": maps.format_km2, "duration": _duration}
    environment.tests["oracle"] = _is_oracle
    template = resources.files("rag_geotoken.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    rows = metrics["variants"]
    first = {row["name"]: row for row in rows if row["split"] == rows[0]["split"]}
    page = environment.from_string(template).render(
        wilson=_wilson,
        radii=[str(r) for r in RADII_KM],
        earth=maps.earth_picture(),
        metrics=metrics,
        chosen=first[errors["name"]],
        nearest=first.get("nearest"),
        error_map=maps.error_map(errors["lat"], errors["lon"], errors["km"]),
        splits=_splits(rows),
        gains=[row for row in rows if "gain" in row],
        examples=[maps.draw_example(example) for example in examples],
        notes=notes,
        about=about.strip(),
    )
    files.write_text(path, page)


def example_of(tables: Tables, answers: Answers, index: GeoIndex, at: int) -> dict[str, Any]:
    """Return photo number ``at`` as :func:`write_report` shows it, without its split."""
    truth, answer, near, pool = tables.photos.lat_lon[at], answers.lat_lon[at], tables.neighbors, tables.pool
    lat, lon = near.lat_lon[at, :NEIGHBORS].T
    neighbors = {"crop": index.pictures(near.rows[at, :NEIGHBORS], CROP), "lat": lat.tolist(), "lon": lon.tolist()}
    neighbors["score"] = near.scores[at, :NEIGHBORS].tolist()
    neighbors["km"] = haversine_km(truth[0], truth[1], lat, lon).tolist()
    mask = pool.mask[at]
    candidates = {"lat": pool.lat_lon[at, mask, 0].tolist(), "lon": pool.lat_lon[at, mask, 1].tolist()}
    candidates["source"] = np.array(SOURCES)[pool.source[at, mask]].tolist()
    candidates["weight"] = np.exp(pool.log_weight[at, mask]).tolist()
    example = {
        "id": tables.photos.ids[at],
        "crop": load_pictures([tables.photos.images[at]], CROP)[0][0],
        "true": tuple(truth.tolist()),
        "neighbors": _records(neighbors),
        "candidates": _records(candidates),
        "answer": tuple(answer.tolist()),
        "km": float(haversine_km(truth[0], truth[1], answer[0], answer[1])),
        "confidence": dict(zip(RADII_KM, answers.confidence[at].tolist(), strict=True)),
    }
    if hasattr(tables, "posterior"):
        example["heat"] = heat_map(tables.posterior, at, height=360, detail=9)
        example["area_km2"] = float(answers.area_km2[at])
    return example


def _records(columns: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Return a dictionary a row."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def table_text(metrics: dict[str, Any]) -> str:
    """Format the table of ``metrics.json`` as plain text: shares, median, gain by verification within 200 km, cost."""
    radii, rows = "".join(f"{f'<= {r} km':>11}" for r in RADII_KM), metrics["variants"]
    width = max(len(row["name"]) for row in rows) + 2
    lines = [f"{'split':<10}{'variant':<{width}}{'n':>6}{radii}{'median km':>11}  {'gain at 200 km':<24}{'ms':>7}"]
    for row in rows:
        shares = "".join(f"{row['acc'][str(r)]:>10.2f}%" for r in RADII_KM)
        median, gain = "-" if row["median_km"] is None else f"{row['median_km']:.1f}", ""
        if "gain" in row:
            low, high = row["gain_ci95"]["200"]
            gain = f"{row['gain']['200']:+.2f} [{low:+.2f}, {high:+.2f}]"
        spent = f"{1000 * row['cost']['seconds']:.1f}" if "cost" in row else ""
        lines.append(f"{row['split']:<10}{row['name']:<{width}}{row['n']:>6}{shares}{median:>11}  {gain:<24}{spent:>7}")
    return "\n".join(line.rstrip() for line in lines)


def _is_oracle(row: Mapping[str, Any]) -> bool:
    return str(row["name"]).startswith("oracle")


def _splits(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of each split in order, and the best of each column, where oracles do not compete."""
    splits = []
    for name in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == name]
        methods = [row for row in own if not _is_oracle(row)]
        best = {str(r): max((row["acc"][str(r)] for row in methods), default=None) for r in RADII_KM}
        medians = [row["median_km"] for row in methods if row["median_km"] is not None]
        splits.append({"name": name, "rows": own, "best": best, "best_median": min(medians, default=None)})
    return splits


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share 0..1 of n photos (Wilson, JASA 1927), which holds for few photos too."""
    z2 = 1.959964**2 / n
    middle, half = (share + z2 / 2) / (1 + z2), math.sqrt(z2 * share * (1 - share) + z2 * z2 / 4) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def _place(lat_lon: tuple[float, float]) -> str:
    lat, lon = lat_lon
    return f"{abs(lat):.2f}° {'N' if lat >= 0 else 'S'}, {abs(lon):.2f}° {'E' if lon >= 0 else 'W'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
