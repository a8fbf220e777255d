"""Recipes that ship fit what reads them, and errors name broken ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import OneLine

from rag_geotoken.photos import blue_marble
from rag_geotoken.photos.sources import SCHEMES
from rag_geotoken.storage.recipes import index_source, read_recipe, training_recipe

INDEXES = Path(__file__).parents[2] / "indexes"


def test_a_source_stays_as_it_is() -> None:
    assert index_source("blue-marble:gallery,n=3") == "blue-marble:gallery,n=3"
    assert index_source("folder:photos") == "folder:photos"


def test_a_recipe_names_its_source(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('# a gallery\nsource = "folder:photos of São Paulo"\n', encoding="utf-8")
    assert index_source(str(path)) == "folder:photos of São Paulo"


@pytest.mark.parametrize("path", sorted(INDEXES.glob("*.toml")), ids=lambda path: path.name)
def test_index_recipes_that_ship(path: Path) -> None:
    scheme, _, rest = index_source(str(path)).partition(":")
    assert scheme in SCHEMES
    if scheme == "blue-marble":
        assert blue_marble.parse(rest)[0] == "gallery"


def test_the_training_recipe_that_ships_fits_the_trainings() -> None:
    recipe = training_recipe(None)
    scheme, _, rest = recipe.pop("gallery").partition(":")
    assert scheme == "blue-marble" and blue_marble.parse(rest)[0] == "gallery"
    assert set(recipe) == {"alignment", "tokens", "reward", "tuning", "verifier"}
    assert set(training_recipe(None, "g3")) == {"heads"}
    # The tokens train on other views than the alignment, whose stream is its own seed's.
    assert recipe["tokens"]["source"].endswith(f"seed={recipe['alignment']['seed'] + 1}")
    scheme, _, rest = recipe["tuning"]["source"].partition(":")
    assert scheme == "blue-marble" and blue_marble.parse(rest)[0] == "validation"


def test_a_training_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[alignment]\nsteps = 3\nrate = 1e-3\n")
    assert training_recipe(path) == {"alignment": {"steps": 3, "rate": 0.001}}


@pytest.mark.parametrize(
    "content",
    [b"source = ", b"source = 'a'\nsource = 'b'", b"\xff\xfe", b"source = " + b"[" * 100_000],
    ids=["cut", "twice", "bytes", "deep"],
)
def test_broken_and_missing_recipes_are_named(content: bytes, tmp_path: Path, one_line: OneLine) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    for read in (read_recipe, training_recipe, lambda path: index_source(str(path))):
        for name in (path, tmp_path / "none.toml"):
            with one_line(f"cannot read the recipe .*{name.name}"):
                read(name)
    with one_line("cannot read the recipe"):
        read_recipe(tmp_path)


@pytest.mark.parametrize("content", ["", "source = 3", "[source]\nn = 3", 'sauce = "blue-marble:gallery"'])
def test_a_recipe_without_a_source_is_named(content: str, tmp_path: Path, one_line: OneLine) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with one_line("mine.toml names no source"):
        index_source(str(path))
