"""Run one of the trainings of a recipe and write its weights into a folder."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag_geotoken import stages
from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.demo import make_index
from rag_geotoken.errors import GeoError
from rag_geotoken.files import file_sha256, write_json
from rag_geotoken.index import GeoIndex
from rag_geotoken.pipeline import Geolocator, encoder_id
from rag_geotoken.reward import RewardHead
from rag_geotoken.token_model import TokenConfig, TokenModel
from rag_geotoken.tuning import Tuning

Log = Callable[[str], None]
GALLERY = "blue-marble:gallery"
SETTINGS: dict[str, dict[str, Any]] = {
    "alignment": {"steps": int, "batch": int, "rate": float, "seed": int},
    "tokens": {
        "source": str,
        "held_out": int,
        "neighbor_positions": str,
        "epochs": int,
        "batch": int,
        "rate": float,
        "seed": int,
    },
    "reward": {"photos": int, "epochs": int, "batch": int, "rate": float, "seed": int},
    "tuning": {"source": str},
}
LEAST = {"seed": 0, "rate": 1e-9}  # every other number at least 1


def train(what: str, recipe: dict[str, Any], out: Path) -> None:
    """Train ``alignment``, ``tokens``, ``reward`` or ``tuning`` with the recipe's section of that name.

    They are made in this order in one folder; the gallery's index is kept beside it in ``OUT-index``. Raises
    GeoError when an earlier one is missing or the recipe does not fit.
    """
    settings = _settings(recipe, what)
    begun = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - begun:7.0f} s  {line}", file=sys.stderr, flush=True)

    if what == "alignment":
        from rag_geotoken.training.alignment import train_alignment

        train_alignment(**settings, log=log).save_pretrained(out, half=True)
        return
    alignment = GeoAlignment.from_pretrained(out)
    folder = out.with_name(f"{out.name}-index")
    make_index(folder, GALLERY, alignment, out)
    index = GeoIndex.load(folder)
    if what == "tokens":
        _train_tokens(alignment, index, folder, settings, out, log)
        return
    tokens, encoder = TokenModel.from_pretrained(out), encoder_id(out)
    if what == "reward":
        from rag_geotoken.training.reward import train_reward

        geolocator = Geolocator(alignment, tokens, index, Tuning(), encoder)
        train_reward(geolocator, **settings, log=log).save_pretrained(out, half=True)
        return
    from rag_geotoken.training.tuning import tune

    geolocator = Geolocator(alignment, tokens, index, Tuning(), encoder, RewardHead.from_pretrained(out))
    write_json(out / "tuning.json", asdict(tune(geolocator, **settings, log=log)))


def _train_tokens(
    alignment: GeoAlignment, index: GeoIndex, folder: Path, settings: dict[str, Any], out: Path, log: Log
) -> None:
    """Photos through the stages photos, embeddings and neighbours, then the training itself."""
    from accelerate import PartialState

    from rag_geotoken.training.tokens import read_photos, train_tokens

    config = TokenConfig(dim=alignment.config.dim, neighbor_positions=settings["neighbor_positions"])
    # "gallery" is GeoToken's way: the index's own photos, each without itself among its neighbours.
    photos = folder / "stages" if settings["source"] == "gallery" else out.with_name(f"{out.name}-photos")
    with PartialState().main_process_first():
        if settings["source"] != "gallery":
            stages.write_photos(photos, settings["source"])
            stages.encode(photos, alignment, encoder_id(out))
        neighbors = stages.search(photos, index, config.neighbors, Tuning().search_weights)
    facts = {"settings": settings, "config": asdict(config), "photos": file_sha256(neighbors)}
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    train_on, validation = read_photos(photos, index, config, settings["held_out"], settings["seed"])
    numbers = {name: settings[name] for name in ("epochs", "batch", "rate", "seed")}
    train_tokens(config, index, train_on, validation, out, identity, **numbers, log=log)


def _settings(recipe: dict[str, Any], what: str) -> dict[str, Any]:
    """The recipe's section of a training, every setting there and of its kind."""
    section, wanted = recipe.get(what), SETTINGS[what]
    if not isinstance(section, dict) or section.keys() != wanted.keys():
        given = ", ".join(section) if isinstance(section, dict) else section
        raise GeoError(f"the recipe's section [{what}] has {given or 'nothing'}: give it {', '.join(wanted)}")
    for name, kind in wanted.items():
        value = section[name]
        if not isinstance(value, kind) or (kind is not str and value < LEAST.get(name, 1)):
            raise GeoError(f"the recipe's [{what}] {name} = {value!r} does not fit: give {kind.__name__}, above zero")
    return section
