"""These functions read recipes: TOML files that say what to index or how to train."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import shipped


def index_source(text: str) -> str:
    """Return a source as it is, or the ``source`` of a recipe file ``NAME.toml``; GeoError where it has none."""
    if not text.endswith(".toml"):
        return text
    source = read_recipe(Path(text)).get("source")
    if not isinstance(source, str):
        raise GeoError(f'{text} names no source: write source = "folder:my-photos"')
    return source


def training_recipe(path: Path | None, name: str = "earth") -> dict[str, Any]:
    """Return the settings of a training recipe: a file, or without one what ships, ``earth`` or ``g3``."""
    return read_recipe(path or shipped(f"training/{name}.toml"))


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a TOML file; GeoError when it is missing or broken."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise GeoError(f"cannot read the recipe {path}: {error}") from None
