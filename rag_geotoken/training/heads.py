"""Train G3's heads and the location encoder on a frozen backbone, whose embeddings of the photos are there already."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from rag_geotoken.encoders import load_backbone
from rag_geotoken.encoders.alignment import G3, AlignmentConfig, GeoAlignment
from rag_geotoken.encoders.location import LocationEncoder
from rag_geotoken.errors import GeoError
from rag_geotoken.storage.files import file_sha256
from rag_geotoken.storage.weights import fingerprint
from rag_geotoken.training.contrast import Losses
from rag_geotoken.training.examples import Examples, read_examples, write_examples
from rag_geotoken.training.loop import Kept, Log, batch_of, run_steps
from rag_geotoken.training.processes import make_accelerator
from rag_geotoken.training.setup import Setup

GAMMA = 0.87  # of the rate, an epoch (G3)


def train(setup: Setup) -> None:
    """Photos and their place texts through the frozen backbone, once, then the training itself."""
    settings, start = setup.settings, setup.settings["start"]
    name = settings["backbone"]
    config = replace(G3, dim=load_backbone(name).dim, backbone=name, location=settings["location"])
    alignment = GeoAlignment(config)  # refuses what cannot be built, before the long work
    begin = LocationEncoder.from_pretrained(start) if start else None
    photos = setup.beside("index") / "stages"  # where the index of the same photos will look for what it needs of them
    accelerator = make_accelerator()
    with accelerator.main_process_first():  # the others find every table made
        write_examples(photos, settings["source"], alignment)
    tables = [file_sha256(photos / f"{name}.parquet") for name in ("photos", "projections", "texts")]
    identity = setup.identity(config=asdict(config), tables=tables, start=fingerprint(begin) if begin else "")
    train_on, validation = read_examples(photos, settings["held_out"], settings["seed"])
    numbers = setup.numbers("epochs", "batch", "rate", "decay", "seed")
    train_heads(config, train_on, validation, setup.out, identity, **numbers, start=begin, log=setup.log)
    accelerator.end_training()


def train_heads(
    config: AlignmentConfig,
    photos: Examples,
    validation: Examples,
    out: Path,
    identity: str,
    *,
    epochs: int,
    batch: int,
    rate: float,
    decay: float,
    seed: int,
    log: Log,
    start: LocationEncoder | None = None,
) -> None:
    """Train and write the weights that do best on the validation photos into ``out``.

    G3's losses and optimization: AdamW, the rate times 0.87 after every epoch; ``start``: the location encoder begins
    with these weights (GeoCLIP's in G3). With several processes each embeds its part of a batch, and all are compared
    with all, as in one. Looked at once an epoch; ``OUT-alignment-checkpoint.safetensors`` lets a stopped training go
    on. Raises GeoError when the photos do not fill a batch, the processes cannot share one, or the loss diverges.
    """
    accelerator = make_accelerator()
    here, world = accelerator.process_index, accelerator.num_processes
    if photos.count < batch or batch % world or not validation.count:
        raise GeoError(
            f"{photos.count} photos to train on, {validation.count} held out, batches of {batch}, {world} processes: "
            "the photos must fill a batch, the processes divide it, and some photos be held out"
        )
    torch.manual_seed(seed)
    losses = Losses(GeoAlignment(config), accelerator)
    if start is not None:
        _begin_with(losses.alignment, start)
    adam = torch.optim.AdamW(losses.parameters(), lr=rate, weight_decay=decay)
    epoch = photos.count // batch

    def loss(model: nn.Module, step: int) -> Tensor:
        drawn = torch.from_numpy(batch_of(step, photos.count, batch, seed)[here::world])
        total: Tensor = sum(model(*photos.batch(drawn, accelerator.device)))
        return total

    def look() -> tuple[float, str]:
        gps, text = validate(losses, validation, batch).tolist()
        return gps + text, f"validation loss {gps + text:.4f}, of gps {gps:.4f}, of text {text:.4f}"

    schedule = LambdaLR(adam, lambda step: GAMMA ** (step // epoch))
    save = partial(losses.alignment.save_pretrained, out)
    kept = Kept(out / "alignment.safetensors", out.with_name(f"{out.name}-alignment-checkpoint.safetensors"), identity)
    run_steps(accelerator, losses, schedule, epoch * epochs, epochs, loss, look, save, kept, log)


@torch.no_grad()
def validate(losses: Losses, photos: Examples, batch: int) -> Tensor:
    """Mean gps and text loss (2,) float64 in batches; the last may be smaller, so that all photos count."""
    losses.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for rows in torch.split(torch.arange(photos.count), batch):
        found = losses(*photos.batch(rows, losses.accelerator.device))
        total += len(rows) * torch.stack(found).double().cpu()
    return total / photos.count


def _begin_with(alignment: GeoAlignment, start: LocationEncoder) -> None:
    encoder = alignment.location[0] if isinstance(alignment.location, nn.Sequential) else alignment.location
    try:
        encoder.load_state_dict(start.state_dict())
    except RuntimeError:
        raise GeoError(
            "the location encoder to begin with has other sizes than the recipe's: GeoCLIP's goes with location "
            '"mercator" or "equal_earth"'
        ) from None
