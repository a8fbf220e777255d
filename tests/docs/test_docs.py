"""The pages: every relative link leads somewhere, every command is one, and those for a user's own photos run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from command import call
from PIL import Image

from rag_geotoken.cli.app import app
from rag_geotoken.photos.sources import read_source

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "eval").glob("*.md"),
                *(ROOT / "indexes").glob("*.md"), *(ROOT / "prompts").glob("*.md")})  # fmt: skip
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^ +(?:\.venv/bin/)?rag-geotoken (.*?)(?:  +# .*)?$", re.MULTILINE)
GUIDE = ("README.md", "locate.md")  # their commands for photos of one's own are run
# What a reader puts in; of these alone a command that is run may speak.
OWN = ("GALLERY", "PHOTOS", "PHOTO", "my-index", "answers.geojson", "answers.csv", "figures.json")


def page_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(page: Path) -> list[list[str]]:
    return [shlex.split(line) for line in COMMAND.findall(page.read_text(encoding="utf-8"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as hosts and the site make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page_of(page)} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page_of(page)} links to {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=page_of)
def test_commands_are_known_with_their_options(page: Path) -> None:
    for words in commands(page):
        command: Any = typer.main.get_command(app)
        rest = list(words)
        while isinstance(command, click.Group) or hasattr(command, "commands"):
            name = rest.pop(0)
            assert name in command.commands, f"{page_of(page)}: rag-geotoken {' '.join(words)}"
            command = command.commands[name]
        command.make_context(command.name, rest, resilient_parsing=True)
        known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= known, f"{page_of(page)}: {' '.join(words)}"


def runnable(words: list[str]) -> bool:
    """Whether a command speaks of nothing but a reader's own photos and index."""
    text = " ".join(words)
    return "my-index" in text and "--mllm" not in words and "weights" not in text and words[0] in ("index", "locate")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a gallery, photos, and a photo, cut from the embedded Earth."""
    folder = tmp_path_factory.mktemp("home")
    for name, split, count in (("GALLERY", "gallery", 60), ("PHOTOS", "test", 2)):
        table = read_source(f"blue-marble:{split},n={count}").to_pylist()
        from rag_geotoken.photos.pictures import load_pictures

        pixels, _ = load_pictures([row["image"] for row in table], 64)
        (folder / name).mkdir()
        lines = ["file,lat,lon"]
        for i, (row, picture) in enumerate(zip(table, pixels, strict=True)):
            Image.fromarray(picture).save(folder / name / f"{i}.png")
            lines.append(f"{i}.png,{row['lat']},{row['lon']}")
        if name == "GALLERY":
            (folder / name / "photos.csv").write_text("\n".join(lines) + "\n")
    (folder / "PHOTO").write_bytes((folder / "PHOTOS" / "0.png").read_bytes())
    return folder


@pytest.mark.parametrize("name", GUIDE)
def test_commands_for_photos_of_ones_own_run(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / name if name == "README.md" else ROOT / "docs" / name
    monkeypatch.chdir(home)
    run = [words for words in commands(page) if runnable(words)]
    assert run[0][:2] == ["index", "build"] and len(run) >= 3
    for number, words in enumerate(run):
        out = [] if words[0] == "index" or "--out" in words else ["--out", f"answers-{number}.csv"]
        if "--within" in words:
            continue  # no photo of so small a gallery lies there
        assert call(*words, *out) == 0, " ".join(words)


@pytest.mark.parametrize("name", GUIDE)
def test_python_of_the_pages_runs(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / name if name == "README.md" else ROOT / "docs" / name
    monkeypatch.chdir(home)
    if not (home / "my-index" / "manifest.json").is_file():
        assert call("index", "build", "folder:GALLERY", "--out", "my-index") == 0
    for picture in ("a.png", "b.png", "photo.jpg"):
        (home / picture).write_bytes((home / "PHOTO").read_bytes())
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(code, name, "exec"), {})
