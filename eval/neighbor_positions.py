"""Sequence, none or spherical: how should the token model know its neighbors apart?

Trains the three with the embedded models' recipe (about a quarter of an hour each on 2 cores, after five minutes of
embedding), unless they are there already, and compares them on validation photos. No test photo is looked at.

    python eval/neighbor_positions.py --folder runs/positions --json eval/results/neighbor-positions.json
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.evaluation.metrics import accuracy, bootstrap
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.photos.sources import read_source
from rag_geotoken.run.walk import RunFolder, in_memory
from rag_geotoken.storage.files import write_json
from rag_geotoken.storage.parquet import versions
from rag_geotoken.storage.recipes import training_recipe
from rag_geotoken.storage.weights import EARTH
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.training.run import train
from rag_geotoken.training.tokens import Losses, read_photos, validate
from rag_geotoken.types import RADII_KM, Photos

POSITIONS = ("sequence", "none", "spherical")
SELECT = {"greedy": "log-probability", "beam": "log-probability", "sample": "bayes-risk"}
SOURCE = "blue-marble:validation,n=3000"


def main() -> None:
    """Train what is missing, compare, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/positions"), help="where the three are kept")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    recipe = training_recipe(None)
    rows = {}
    for name in POSITIONS:
        kept = given.folder / name
        if not (kept / "tokens.safetensors").is_file():
            _train(given.folder / "earth", kept, recipe, name)
        rows[name] = compare(given.folder / "earth", kept, recipe)
        print(name, rows[name], flush=True)
    result = {
        "command": "python eval/neighbor_positions.py --json eval/results/neighbor-positions.json",
        "recipe": recipe["tokens"],
        "photos": SOURCE,
        "positions": rows,
        "versions": versions(),
    }
    if given.json:
        write_json(given.json, result)


def _train(out: Path, kept: Path, recipe: dict[str, Any], positions: str) -> None:
    """Train in one folder, so that the photos are embedded once, and keep the weights elsewhere."""
    out.mkdir(parents=True, exist_ok=True)
    for file in EARTH.glob("alignment.*"):
        shutil.copy(file, out)
    train("tokens", recipe | {"tokens": recipe["tokens"] | {"neighbor_positions": positions}}, out)
    kept.mkdir(parents=True, exist_ok=True)
    for file in out.glob("tokens.*"):
        shutil.copy(file, kept)


def compare(out: Path, kept: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Loss a position on the held-out gallery photos; accuracy of greedy, beam and samples on validation photos."""
    alignment, index = GeoAlignment.from_pretrained(out), GeoIndex.load(out.with_name(f"{out.name}-index"))
    tokens = TokenModel.from_pretrained(kept)
    settings = recipe["tokens"]
    models = Models(alignment, tokens, index, Tuning())
    run = RunFolder(out.with_name(f"{out.name}-photos"), models)  # with the tables that the training left there
    options = Options(neighbors=tokens.config.neighbors, propose=(), gps_places=0, verify=())
    tables = run.tables(options, run.walk(options, until="neighbors"))
    _, held_out = read_photos(tables, index, tokens.config, settings["held_out"], settings["seed"])
    losses = validate(Losses(tokens, index), held_out, settings["batch"])
    photos, km = Photos.from_table(read_source(SOURCE)), {}
    for name, select in SELECT.items():
        options = Options(propose=(name,), gps_places=0, sources=(name,), verify=(), select=select)
        found = in_memory(models, options, photos)
        km[name] = haversine_km(*photos.lat_lon.T, *found.lat_lon.T)
    intervals = bootstrap(np.stack(list(km.values())), seed=0).accuracy
    return {
        "parameters": sum(p.numel() for p in tokens.parameters()),
        "loss_a_position": [round(float(x), 4) for x in losses],
        **{
            name: {
                "acc": {r: round(v, 2) for r, v in accuracy(away).items()},
                "ci95": {
                    str(r): [round(float(b), 2) for b in pair] for r, pair in zip(RADII_KM, intervals[i], strict=True)
                },
            }
            for i, (name, away) in enumerate(km.items())
        },
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
