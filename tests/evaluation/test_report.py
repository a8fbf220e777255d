"""The report page: whole, self-contained, safe with hostile text, honest about the oracle."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from numpy.typing import ArrayLike
from PIL import Image

from rag_geotoken.errors import GeoError
from rag_geotoken.evaluation import maps, metrics, report
from rag_geotoken.run.demo import RECIPE
from rag_geotoken.run.variants import read_variants
from rag_geotoken.storage.files import shipped
from rag_geotoken.storage.recipes import read_recipe

DEMO = read_variants(read_recipe(shipped(RECIPE)))

HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/a.png onerror=alert(1)>"
NAMES = ("nearest", "density", "tokens-greedy", "tokens-beam", "tokens-samples", "pool", "pool+alignment", "oracle-20")


def _row(name: str, split: str, km: ArrayLike) -> dict[str, Any]:
    return {"name": name, "split": split} | metrics.summary(km, metrics.bootstrap(km, 0, draws=50).accuracy[0])


def _metrics() -> dict[str, Any]:
    """Each variant better than the one before it, the oracle best of all."""
    base = np.random.default_rng(0).lognormal(5, 2, 300)
    rows = [
        _row(name, split, base / (1 + rank))
        for split in ("test", "unseen", "relief")
        for rank, name in enumerate(NAMES)
    ]
    return {"variants": rows, "seed": 7, "versions": {"numpy": "2.4.0"}, "seconds": 83.0}


def _example(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    example = {
        "id": "test-0-000001",
        "split": "test",
        "crop": rng.integers(0, 255, (64, 64, 3), np.uint8),
        "true": (47.0, 8.0),
        "answer": (47.5, 8.5),
        "km": 67.3,
        "neighbors": [
            {"crop": rng.integers(0, 255, (64, 64, 3), np.uint8), "lat": 46.0, "lon": 7.0, "score": 0.9, "km": 135.0},
            {"crop": None, "lat": -20.0, "lon": 130.0, "score": 0.8, "km": 13_000.0},
        ],
        "candidates": [{"lat": 47.4, "lon": 8.4, "source": "beam", "weight": 0.6}],
        "confidence": {1: 0.1, 25: 0.4, 200: 0.9, 750: 0.95, 2500: 1.0},
    }
    return {**example, **changes}


def _errors() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    km = np.array([3.0, 100.0, 500.0, 2000.0, 9000.0, math.nan])
    return {"lat": rng.uniform(-50, 70, 6), "lon": rng.uniform(-180, 180, 6), "km": km, "name": "pool+alignment"}


def _page(folder: Path, **changes: Any) -> str:
    path = folder / "report.html"
    given = {"metrics": _metrics(), "errors": _errors(), "examples": [_example()], "notes": ["A note."]}
    given |= {"about": DEMO.about, **changes}
    report.write_report(path, **given)
    return path.read_text(encoding="utf-8")


class _Tags(HTMLParser):
    """Every tag with its attributes, and whether what is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def test_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = _page(tmp_path)
    parsed = _Tags(page)
    assert not parsed.open
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "srcset", "action", "data", "xlink:href"):
                assert str(value).startswith(("data:", "#")), (tag, name, str(value)[:60])
    assert not re.search(r"https?://", page)
    assert not re.search(r"@import|url\(", page)
    policy = next(a for t, a in parsed.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")


def test_earth_is_embedded_once(tmp_path: Path) -> None:
    page = _page(tmp_path, examples=[_example(), _example(), _example()])
    assert page.count('id="earth"') == 1
    assert page.count('href="#earth"') == 1 + 2 * 3  # the error map, and two maps an example
    assert len(page) < 3_000_000


def test_page_without_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "earth_picture", lambda: None)
    page = _page(tmp_path)
    assert '<rect id="earth"' in page and len(page) < 100_000


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    figures = _metrics()
    figures["variants"][0]["name"] = HOSTILE
    figures["variants"][-1]["split"] = HOSTILE
    figures["versions"] = {HOSTILE: HOSTILE}
    figures["stages"] = {HOSTILE: 1.0}
    example = _example(id=HOSTILE, split=HOSTILE)
    example["candidates"][0]["source"] = HOSTILE
    verified = figures["variants"][1]
    verified |= {"name": HOSTILE, "gain": verified["acc"], "gain_ci95": verified["ci95"], "gap_closed": None}
    verified |= {"mended": 1, "broken": 0, "cost": {"seconds": 0.0}}
    page = _page(tmp_path, metrics=figures, examples=[example], notes=[HOSTILE], about=HOSTILE)
    parsed = _Tags(page)
    assert not parsed.open and "script" not in {tag for tag, _ in parsed.tags}
    assert all("evil" not in str(attributes.get("src", "")) for _, attributes in parsed.tags)
    assert "<script>" in html.unescape(page)  # it is shown, as text


def test_all_variants_and_splits_with_their_figures(tmp_path: Path) -> None:
    figures = json.loads(json.dumps(_metrics()))  # as read back from metrics.json
    page = _page(tmp_path, metrics=figures)
    assert page.count('<table class="ablation">') == 3
    for name in NAMES:
        assert len(re.findall(f'<th scope="row"><b>{re.escape(name)}[ <]', page)) == 3
    for row in figures["variants"]:
        for radius, value in row["acc"].items():
            low, high = row["ci95"][radius]
            assert f'<span class="n">{value:.1f}</span>' in page
            assert f"<small>{low:.1f}\N{EN DASH}{high:.1f}</small>" in page


def test_oracle_is_marked_and_competes_with_none(tmp_path: Path) -> None:
    table = _page(tmp_path).split('<table class="ablation">')[1].split("</table>")[0]
    rows = {name: next(r for r in table.split("<tr")[2:] if f"<b>{name}" in r) for name in NAMES}
    assert 'class="oracle"' in rows["oracle-20"] and "not a method" in rows["oracle-20"]
    assert 'class="best"' not in rows["oracle-20"]
    assert rows["pool+alignment"].count('class="best"') == 6
    assert "oracle" not in rows["nearest"]


def test_headline_is_of_the_chosen_variant(tmp_path: Path) -> None:
    figures = _metrics()
    chosen = next(row for row in figures["variants"] if row["name"] == "pool+alignment")
    best = figures["variants"][NAMES.index("tokens-beam")]
    assert f"<h1>{chosen['acc']['200']:.1f} % of photos" in _page(tmp_path, metrics=figures)
    errors = _errors() | {"name": "tokens-beam"}
    assert f"<h1>{best['acc']['200']:.1f} % of photos" in _page(tmp_path, metrics=figures, errors=errors)


def test_page_says_what_the_photos_are_and_how_to_use_it(tmp_path: Path) -> None:
    page = _page(tmp_path)
    assert "Blue Marble" in page and "not street photos" in page and "Use it with care" in page and "A note." in page


def test_error_map_puts_every_photo_in_its_class() -> None:
    drawn = maps.error_map([0, 0, 0, 0, 0, 90], [-180, 0, 90, 179.95, 0, 0], [25, 25.1, 750, 2500, 2501, math.nan])
    assert [(layer["css"], layer["n"]) for layer in drawn["layers"]] == [
        ("e0", 1), ("e1", 1), ("e2", 1), ("e3", 1), ("e4", 1), ("none", 1)
    ]  # fmt: skip
    assert drawn["layers"][0]["dots"] == "M0.0 180.0h0" and drawn["layers"][2]["dots"] == "M540.0 180.0h0"
    assert drawn["layers"][5]["dots"] == "M360.0 0.0h0"
    assert drawn["view"].startswith("0 0.0 720 ")  # the pole is on the map
    assert "none" not in [layer["css"] for layer in maps.error_map([0], [0], [1])["layers"]]
    with pytest.raises(GeoError, match="one length"):
        maps.error_map([0, 1], [0], [1])


def test_close_up_is_true_to_scale_across_the_date_line() -> None:
    drawn = maps.draw_example(_example(true=(60.0, 179.9), answer=(60.0, -179.9), km=11.1))
    truth = next(m for m in drawn["marks"] if m["kind"] == "truth")
    answer = next(m for m in drawn["marks"] if m["kind"] == "answer")
    assert (truth["inset_x"], truth["inset_y"]) == (150.0, 150.0)
    km_per_unit = drawn["inset"]["bar_km"] / drawn["inset"]["bar"]
    assert (answer["inset_x"] - 150) * km_per_unit == pytest.approx(
        11.12, abs=0.01
    )  # 0.2 degrees, half as long at 60 N
    assert len(drawn["inset"]["shifts"]) == 2 and drawn["marks"][-1] is truth
    assert maps.draw_example(_example())["inset"]["shifts"] == [0]
    assert maps.draw_example(_example(answer=(-47.0, 8.0), km=10_450.0))["inset"]["outside"]


def test_photo_without_an_answer(tmp_path: Path) -> None:
    silent = _example(answer=(math.nan, math.nan), km=math.nan, confidence={1: math.nan})
    page = _page(tmp_path, examples=[silent])
    assert "<h3>no answer</h3>" in page
    assert not re.search(r"\bnan\b", re.sub(r"data:[^\"]*", "", page))
    drawn = maps.draw_example(silent)
    assert "answer" not in [m["kind"] for m in drawn["marks"]] and drawn["css"] == "none"
    with pytest.raises(GeoError, match=r"\(64, 64\)"):
        maps.draw_example(_example(crop=np.zeros((64, 64), np.uint8)))


def test_optional_parts_come_and_go(tmp_path: Path) -> None:
    plain = _page(tmp_path, examples=[])
    assert (
        "Does it know when it knows" not in plain and "Photo by photo" not in plain and "Seconds a stage" not in plain
    )
    stated = np.random.default_rng(0).random((50, 5))
    extra = {"stages": {"encode": 12.0, "search": 0.0}, "calibration": metrics.calibration(stated, np.full(50, 10.0))}
    full = _page(tmp_path, metrics={**_metrics(), **extra})
    assert full.count('<div class="card"><h3>') == 5 and "12.0 s" in full and "1 min 23 s" in full
    assert not _Tags(full).open


def test_calibration_error_is_in_points_with_intervals(tmp_path: Path) -> None:
    stated = np.repeat([[0.9], [0.9], [0.123], [0.1]], 5, axis=1)
    table = metrics.calibration(stated, [10.0, 9999.0, 10.0, math.nan])
    assert table["25"]["ece"] == pytest.approx(0.394, abs=5e-4)
    page = _page(tmp_path, metrics={**_metrics(), "calibration": table})
    assert page.count("ECE <b>39.4</b> points") == 4 and page.count("ECE <b>50.6</b> points") == 1  # 1 km: none right
    # One of two right: Wilson gives 9 to 91 %, the bar from 90.5 down to 9.5 of 100 on a panel whose y runs down.
    assert page.count("2 photos: stated 90%, found 50% (95 % interval 9% to 91%)") == 4
    assert page.count('d="M90.0 9.5V90.5"') == 4
    assert "no photos" in _page(
        tmp_path, metrics={**_metrics(), "calibration": metrics.calibration([[math.nan] * 5], [1.0])}
    )


def test_when_to_stay_silent(tmp_path: Path) -> None:
    assert "When to stay silent" not in _page(tmp_path)
    areas = np.array([math.nan, *np.geomspace(3.21, 8e6, 19)])
    km = np.array([math.nan, *np.linspace(1, 400, 19)])
    rows = json.loads(json.dumps(metrics.abstention(areas, km)))
    page = _page(tmp_path, metrics={**_metrics(), "abstention": rows})
    assert not _Tags(page).open
    section = page.split("When to stay silent")[1].split("</section>")[0]
    assert "spatial entropy" in section
    table = section.split("<tbody>")[1].split("</tbody>")[0].split("</tr>")
    assert table[0].count("<td>—</td>") == 1 and "100 %<span>20 photos</span>" in table[0]
    for row, line in zip(rows, table, strict=False):
        assert f"<td>{row['acc']['25']:.1f} %</td><td>{row['acc']['200']:.1f} %</td>" in line
    # From all answered on the left (0) to the least on the right (150), high shares up.
    curves = [re.findall(r"[\d.]+,[\d.]+", points) for points in re.findall('points="([^"]*)"', section)]
    assert [(len(c), c[0], c[-1]) for c in curves] == [
        (5, f"0.0,{100 - rows[0]['acc'][r]:.1f}", f"150.0,{100 - rows[-1]['acc'][r]:.1f}") for r in ("25", "200")
    ]
    alone = rows[:1]  # one point is no curve, and no division by nothing
    assert "When to stay silent" in _page(tmp_path, metrics={**_metrics(), "abstention": alone})


def test_heat_lies_under_the_marks_of_both_maps(tmp_path: Path) -> None:
    heat = np.zeros((90, 180))
    heat[20, 94] = 1.0
    shown = _example(heat=heat, area_km2=12_345.6)
    page = _page(tmp_path, examples=[shown, _example(), shown])
    assert not _Tags(page).open and page.count('href="#heat-') == 2
    for at in ("heat-1", "heat-3"):
        assert page.index(f'<image id="{at}"') < page.index("<use", page.index(f'id="{at}"')) < page.index(f"#{at}")
    assert page.count("belief is spread over about 12,000 km².") == 2
    assert "mass lies, lighter where there is more" in page
    assert len(page) < len(_page(tmp_path, examples=[_example()] * 3)) + 5_000
    plain = _page(tmp_path, examples=[_example(area_km2=math.nan)])
    assert "mass lies" not in plain and 'id="heat-' not in plain and "belief is spread" not in plain
    across = _page(tmp_path, examples=[_example(true=(10.0, 179.9), heat=heat)])
    assert across.count('href="#heat-1"') == 2  # a second one beyond the date line, as the Earth itself


def test_heat_picture_by_its_pixels() -> None:
    heat = np.zeros((2, 4))
    heat[0, 1], heat[1, 2], heat[1, 3], heat[0, 0] = 0.9, 0.099, 1e-5, 0.9e-5
    uri = maps.heat_picture(heat)
    assert uri.startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as picture:
        pixels = np.asarray(picture.convert("RGBA")).astype(int)
    alpha = pixels[..., 3]
    assert pixels.shape == (2, 4, 4)
    assert alpha[0, 0] == alpha[0, 2] == 0  # too little to be seen, and nothing
    assert 0 < alpha[1, 3] < alpha[1, 2] < alpha[0, 1]
    assert tuple(pixels[0, 1]) == tuple(maps.HEAT_COLORS[-1][1:]) and tuple(pixels[1, 3]) == maps.HEAT_COLORS[0][1:]
    assert maps.heat_picture(np.full((90, 180), 1 / 16200))  # spread over all the Earth
    assert maps.heat_picture(np.zeros((90, 180)))


def test_heat_that_is_none_is_named() -> None:
    for wrong in (np.zeros((4, 4)), np.zeros(8), np.zeros((0, 0))):
        with pytest.raises(GeoError, match="heat map of shape"):
            maps.draw_example(_example(heat=wrong))
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(GeoError, match="negative or not finite"):
            maps.heat_picture(np.full((2, 4), value))


def test_areas_in_words() -> None:
    given = {0.02: "under 1 km²", 1.0: "1.0 km²", 3.21: "3.2 km²", 9.99: "10 km²", 12_345.0: "12,000 km²"}
    assert {value: maps.format_km2(value) for value in given} == given
    assert maps.draw_example(_example(area_km2=0.02))["area"] == "under 1 km²"
    assert maps.draw_example(_example(area_km2=5.1e8))["area"] == "about 510,000,000 km²"


def test_every_variant_of_the_ablation_is_described_and_grouped(tmp_path: Path) -> None:
    names = [*(variant.name for variant in DEMO.variants), "oracle-20"]
    rows = [_row(name, "test", [1.0, 300.0]) for name in [*names, "one-of-your-own"]]
    page = _page(tmp_path, metrics=_metrics() | {"variants": rows})
    assert not _Tags(page).open
    table = page.split('<table class="ablation">')[1].split("</table>")[0]
    told = re.findall(r'<th scope="row"><b>([\w+-]+)(?: <span.*?</span>)?</b><span>(.*?)</span>', table)
    assert [name for name, _ in told] == [*names, "one-of-your-own"]
    assert all(text for _, text in told[:-1]) and len({text for _, text in told}) == len(told)
    assert told[-1][1] == ""
    groups = re.findall(r'<th scope="rowgroup" colspan="7">(.*?)</th>', table)
    assert len(groups) == len(set(groups)) == 7  # each group stands once: its variants come together
    assert table.count("<tbody>") == table.count("</tbody>")


def test_gains_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    assert "What verification gains" not in _page(tmp_path)
    figures = _metrics()
    row = next(row for row in figures["variants"] if row["name"] == "pool+alignment")
    row |= {"gain": dict.fromkeys(row["acc"], 2.5), "gain_ci95": {radius: [1.5, 3.5] for radius in row["acc"]}}
    row |= {"gap_closed": 0.25, "mended": 12, "broken": 3, "cost": {"seconds": 0.0123}}
    page = _page(tmp_path, metrics=figures)
    assert not _Tags(page).open
    section = page.split("What verification gains")[1].split("</section>")[0]
    table = section.split("<tbody>")[1].split("</tbody>")[0]
    assert table.count("<tr>") == 1 and "pool+alignment" in table
    assert all(f'<span class="n">{shown}</span>' in table for shown in ("12", "3", "12.3", "\N{EN DASH}"))
    assert "2.5" in table and "1.5" in table and "3.5" in table and "25" in table


def test_median_that_is_infinite_is_a_dash(tmp_path: Path) -> None:
    figures = _metrics()
    figures["variants"][0]["median_km"] = None
    assert '<span class="n">—</span>' in _page(tmp_path, metrics=figures)


def test_page_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    _page(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    figures = _metrics()
    del figures["seed"]
    with pytest.raises(UndefinedError):
        _page(tmp_path, metrics=figures)
    assert (tmp_path / "report.html").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
