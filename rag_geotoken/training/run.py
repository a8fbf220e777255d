"""Run one of the trainings of a recipe and write its weights into a folder."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rag_geotoken.alignment import G3, GeoAlignment
from rag_geotoken.decision.tuning import Tuning, load_tuning
from rag_geotoken.encoders import load_backbone
from rag_geotoken.errors import GeoError
from rag_geotoken.files import check_writable, file_sha256, write_json
from rag_geotoken.index import GeoIndex
from rag_geotoken.location import LocationEncoder
from rag_geotoken.options import Options
from rag_geotoken.recipes import training_recipe
from rag_geotoken.reward import RewardHead
from rag_geotoken.run.build_index import gallery_tables, index_for_training
from rag_geotoken.run.models import Models
from rag_geotoken.run.walk import RunFolder, write_photos
from rag_geotoken.sources import check_use
from rag_geotoken.token_model import TokenConfig, TokenModel
from rag_geotoken.training.processes import world_size
from rag_geotoken.weights import fingerprint

Log = Callable[[str], None]
LEAST = {"seed": 0, "rate": 1e-9, "decay": 0.0}  # every other number at least 1


def train(what: str, recipe: dict[str, Any], out: Path, index: Path | None = None) -> None:
    """Train ``alignment``, ``heads``, ``tokens``, ``reward``, ``tuning`` or ``verifier`` with the recipe's section.

    ``alignment`` (of satellite views) or ``heads`` (on a frozen backbone) is the first, the others follow in this order
    in one folder; the multimodal verifier goes to ``OUT-verifier``. index: the gallery they are trained with; else one
    of the recipe's ``gallery`` is kept in ``OUT-index``. Raises GeoError when an earlier one is missing, the recipe
    does not fit, its source is kept for something else, or OUT-index holds another index.
    """
    settings, out, log = _settings(recipe, what), out.resolve(), _log()  # resolved, so that "." has a name
    if what not in ("tokens", "heads") and world_size() > 1:
        raise GeoError(
            f"{world_size()} processes were started to train {what}: start one, tokens and heads take several"
        )
    check_writable(out)
    if what == "alignment":
        from rag_geotoken.training.alignment import train_alignment

        train_alignment(out, _identity({"alignment": settings}), **settings, log=log)
    elif what == "heads":
        _train_heads(settings, out, log)
    elif what == "tokens":
        _train_tokens(settings, recipe, out, index, log)
    elif what == "reward":
        from rag_geotoken.training.reward import train_reward

        train_reward(_models(recipe, out, index, Tuning()), **settings, log=log).save_pretrained(out, half=True)
    elif what == "tuning":
        from rag_geotoken.training.tuning import tune

        models = _models(recipe, out, index, Tuning(), reward=RewardHead.from_pretrained(out))
        write_json(out / "tuning.json", asdict(tune(models, **settings, log=log)))
    else:
        _train_verifier(settings, _models(recipe, out, index, load_tuning(out)), out, log)


def _log() -> Log:
    """Lines on standard error, with the seconds since now."""
    begun = time.monotonic()
    return lambda line: print(f"{time.monotonic() - begun:7.0f} s  {line}", file=sys.stderr, flush=True)


def _models(recipe: dict[str, Any], out: Path, index: Path | None, tuning: Tuning, **more: Any) -> Models:
    """The models trained so far, with the gallery; more: as :class:`.Models` takes it."""
    alignment, tokens = GeoAlignment.from_pretrained(out), TokenModel.from_pretrained(out)
    return Models(alignment, tokens, _gallery(alignment, recipe, out, index), tuning, **more)


def _gallery(alignment: GeoAlignment, recipe: dict[str, Any], out: Path, index: Path | None) -> GeoIndex:
    """The index that all but the alignment are trained with; a given one is only read, another made where missing."""
    if index is None:
        source = recipe.get("gallery")
        if not isinstance(source, str):
            raise GeoError('the recipe names no gallery: give --index DIR, or write gallery = "SCHEME:REST" into it')
        index = index_for_training(out.with_name(f"{out.name}-index"), source, alignment)
    return GeoIndex.load(index, alignment.heads)


def _train_tokens(settings: dict[str, Any], recipe: dict[str, Any], out: Path, index: Path | None, log: Log) -> None:
    """Photos through the stages up to their neighbours, then the training itself."""
    from rag_geotoken.training.processes import make_accelerator
    from rag_geotoken.training.tokens import read_photos, train_tokens

    alignment = GeoAlignment.from_pretrained(out)
    config = TokenConfig(dim=alignment.config.dim, neighbor_positions=settings["neighbor_positions"])
    TokenModel(config)  # refuses what cannot be built, before the long work
    # "gallery" is GeoToken's way: the index's own photos, each without itself among its neighbours.
    own, folder = settings["source"] == "gallery", out.with_name(f"{out.name}-photos")
    options = Options(neighbors=config.neighbors, propose=(), gps_places=0, verify=())
    accelerator = make_accelerator()
    with accelerator.main_process_first():  # the others find every table made
        models = Models(alignment, None, _gallery(alignment, recipe, out, index), Tuning())
        if own:
            gallery_tables(folder, models.index)
        else:
            write_photos(folder, settings["source"])
        run = RunFolder(folder, models)
        files = run.walk(options, until="neighbours", given=("embeddings",) * own)
    tables = [file_sha256(folder / f"{name}.parquet") for name in ("photos", "embeddings", "neighbours")]
    facts = {"settings": settings, "config": asdict(config), "tables": tables, "index": models.index.identity}
    photos = run.tables(options, files)
    train_on, validation = read_photos(photos, models.index, config, settings["held_out"], settings["seed"])
    numbers = {name: settings[name] for name in ("epochs", "batch", "rate", "seed")}
    train_tokens(config, models.index, train_on, validation, out, _identity(facts), **numbers, log=log)
    accelerator.end_training()


def _train_heads(settings: dict[str, Any], out: Path, log: Log) -> None:
    """Photos and their place texts through the frozen backbone, once, then the training itself."""
    from rag_geotoken.training.examples import read_examples, write_examples
    from rag_geotoken.training.heads import train_heads
    from rag_geotoken.training.processes import make_accelerator

    name, start = settings["backbone"], settings["start"]
    config = replace(G3, dim=load_backbone(name).dim, backbone=name, location=settings["location"])
    alignment = GeoAlignment(config)  # refuses what cannot be built, before the long work
    begin = LocationEncoder.from_pretrained(start) if start else None
    # Where the index of the same photos will look for what it needs of them.
    photos = out.with_name(f"{out.name}-index") / "stages"
    accelerator = make_accelerator()
    with accelerator.main_process_first():  # the others find every table made
        write_examples(photos, settings["source"], alignment)
    tables = [file_sha256(photos / f"{name}.parquet") for name in ("photos", "projections", "texts")]
    begun_with = fingerprint(begin) if begin else ""
    facts = {"settings": settings, "config": asdict(config), "tables": tables, "start": begun_with}
    train_on, validation = read_examples(photos, settings["held_out"], settings["seed"])
    numbers = {name: settings[name] for name in ("epochs", "batch", "rate", "decay", "seed")}
    train_heads(config, train_on, validation, out, _identity(facts), **numbers, start=begin, log=log)
    accelerator.end_training()


def train_mllm(
    recipe: dict[str, Any],
    out: Path,
    where: str | None,
    model: str | None,
    concurrent: int | None,
    index: Path | None = None,
) -> None:
    """Choose what a multimodal model's verdicts are worth on photos with places, for the models in ``out``.

    where, model, concurrent: as :func:`.open_client` takes them; None is the verifier trained beside ``out``. index:
    see :func:`train`. Replaces tuning.json; the photos' tables and the model's answers are kept in ``OUT-mllm``.
    """
    from rag_geotoken.mllm.session import MllmSession
    from rag_geotoken.training.mllm import tune_mllm

    settings, out = _settings(recipe, "tuning"), out.resolve()
    check_writable(out)
    session = MllmSession.open(where or str(out.with_name(f"{out.name}-verifier")), model, concurrent)
    models = _models(recipe, out, index, load_tuning(out), mllm=session)
    tuned = tune_mllm(out.with_name(f"{out.name}-mllm"), settings["source"], models, _log())
    write_json(out / "tuning.json", asdict(tuned))


def _train_verifier(settings: dict[str, Any], models: Models, out: Path, log: Log) -> None:
    """Photos through the stages up to the alignment's verdicts, then the training itself."""
    from rag_geotoken.training.verifier import train_verifier
    from rag_geotoken.training.verifier_examples import read_examples

    folder, photos = (out.with_name(f"{out.name}-{name}") for name in ("verifier", "verifier-photos"))
    check_writable(folder)
    write_photos(photos, settings["source"])
    run, options = RunFolder(photos, models), Options(verify=("alignment", "visual"))
    files = run.walk(options, until="verdicts-alignment")
    if len(run.readable) < len(run.photos):
        raise GeoError(f"{photos.name}: give pictures that can be read")
    examples = read_examples(run.tables(options, files), models.index, models.tuning)
    identity = _identity({"settings": settings, "photos": file_sha256(photos / "verdicts-alignment.parquet")})
    train_verifier(examples, models.alignment, folder, identity, **settings, log=log)


def _identity(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _settings(recipe: dict[str, Any], what: str) -> dict[str, Any]:
    """The recipe's section of a training: every setting that the recipe which ships has, and of the same kind."""
    section, wanted = recipe.get(what), training_recipe(None, "g3" if what == "heads" else "earth")[what]
    if not isinstance(section, dict) or section.keys() != wanted.keys():
        given = ", ".join(section) if isinstance(section, dict) else section
        raise GeoError(f"the recipe's section [{what}] has {given or 'nothing'}: give it {', '.join(wanted)}")
    for name, kind in ((name, type(value)) for name, value in wanted.items()):
        value = section[name]
        if type(value) is not kind or (kind in (int, float) and not LEAST.get(name, 1) <= value < math.inf):
            raise GeoError(f"the recipe's [{what}] {name} = {value!r} does not fit: give {kind.__name__}, above zero")
    if section.get("source", "gallery") != "gallery":
        check_use(section["source"], f"train {what}")
    return section
