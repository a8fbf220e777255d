"""These functions run one of the trainings of a recipe, which writes its weights into a folder."""

from __future__ import annotations

import math
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.sources import check_use
from rag_geotoken.storage.files import check_writable
from rag_geotoken.storage.recipes import training_recipe
from rag_geotoken.training.processes import world_size
from rag_geotoken.training.setup import Setup

MODULES = {"verifier": "mllm.train", "mllm": "mllm.tuning"}  # else the module bears the training's name
LEAST = {"seed": 0, "rate": 1e-9, "decay": 0.0}  # every other number at least 1


def train(what: str, recipe: dict[str, Any], out: Path, index: Path | None = None, **more: Any) -> None:
    """Train ``alignment``, ``heads``, ``tokens``, ``reward``, ``tuning``, ``verifier`` or ``mllm`` into a folder.

    ``alignment`` (of satellite views) or ``heads`` (on a frozen backbone) is the first, the others follow in this order
    in one folder ``out``; the verifier goes to ``OUT-verifier``. recipe: has a section of that name (``mllm``: that of
    ``tuning``). index: the gallery to train with; else one of the recipe's is kept in ``OUT-index``. more: the model
    for ``mllm``. Raises GeoError when an earlier one is missing, the recipe does not fit, its source is kept for
    something else, or OUT-index holds another index.
    """
    settings, out = _settings(recipe, "tuning" if what == "mllm" else what), out.resolve()  # so that "." has a name
    if what not in ("tokens", "heads") and world_size() > 1:
        raise GeoError(
            f"{world_size()} processes were started to train {what}: start one, tokens and heads take several"
        )
    check_writable(out)
    begun = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - begun:7.0f} s  {line}", file=sys.stderr, flush=True)

    setup = Setup(settings, out, recipe.get("gallery"), index, log)
    import_module(f"rag_geotoken.training.{MODULES.get(what, what)}").train(setup, **more)


def _settings(recipe: dict[str, Any], what: str) -> dict[str, Any]:
    """Return a recipe's section of a training: every setting of the shipped recipe's, each of the same type."""
    section, shipped = recipe.get(what), training_recipe(None, "g3" if what == "heads" else "earth")[what]
    if not isinstance(section, dict) or section.keys() != shipped.keys():
        given = ", ".join(section) if isinstance(section, dict) else section
        raise GeoError(f"the recipe's section [{what}] has {given or 'nothing'}: give it {', '.join(shipped)}")
    for name, default in shipped.items():
        value, kind = section[name], type(default)
        if type(value) is not kind or (kind in (int, float) and not LEAST.get(name, 1) <= value < math.inf):
            raise GeoError(f"the recipe's [{what}] {name} = {value!r} does not fit: give {kind.__name__}, above zero")
    if section.get("source", "gallery") != "gallery":
        check_use(section["source"], f"train {what}")
    return section
