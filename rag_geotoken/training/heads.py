"""These functions train G3's heads and the location encoder on the embeddings that a frozen backbone made of photos."""

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
    """Embed photos and their place texts with the frozen backbone, once, and train the heads on them."""
    settings, folder, backbone = setup.settings, setup.settings["start"], setup.settings["backbone"]
    config = replace(G3, dim=load_backbone(backbone).dim, backbone=backbone, location=settings["location"])
    alignment = GeoAlignment(config)  # refuses what cannot be built, before the long work
    start = LocationEncoder.from_pretrained(folder) if folder else None
    stages = setup.beside("index") / "stages"  # an index of the same photos reads them too
    accelerator = make_accelerator()
    with accelerator.main_process_first():  # the other processes find every table made
        write_examples(stages, settings["source"], alignment)
    tables = [file_sha256(stages / f"{name}.parquet") for name in ("photos", "projections", "texts")]
    identity = setup.identity(config=asdict(config), tables=tables, start=fingerprint(start) if start else "")
    photos, validation = read_examples(stages, settings["held_out"], settings["seed"])
    numbers = {name: settings[name] for name in ("epochs", "batch", "rate", "decay", "seed")}
    train_heads(config, photos, validation, out=setup.out, identity=identity, **numbers, start=start, log=setup.log)
    accelerator.end_training()


def train_heads(
    config: AlignmentConfig,
    photos: Examples,
    validation: Examples,
    *,
    out: Path,
    identity: str,
    epochs: int,
    batch: int,
    rate: float,
    decay: float,
    seed: int,
    log: Log,
    start: LocationEncoder | None = None,
) -> None:
    """Train heads and write the weights that do best on the validation photos into ``out``.

    G3's losses and optimization: AdamW, the rate times 0.87 after every epoch; ``start``: the location encoder begins
    with these weights (GeoCLIP's in G3). With several processes each embeds its part of a batch, and all are compared
    with all, as in one. Validated once an epoch; ``OUT-alignment-checkpoint.safetensors`` lets a stopped training go
    on. Raises GeoError when the photos do not fill a batch, the processes cannot share one, or the loss diverges.
    """
    accelerator = make_accelerator()
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(photos.rows)
    if count < batch or batch % world or not len(validation.rows):
        raise GeoError(
            f"{count} photos to train on, {len(validation.rows)} held out, batches of {batch}, {world} processes: "
            "the photos must fill a batch, the processes divide it, and some photos be held out"
        )
    torch.manual_seed(seed)
    losses = Losses(GeoAlignment(config), accelerator)
    if start is not None:
        _start_with(losses.alignment, start)
    adam = torch.optim.AdamW(losses.parameters(), lr=rate, weight_decay=decay)
    epoch_steps = count // batch

    def loss(model: nn.Module, step: int) -> Tensor:
        drawn = torch.from_numpy(batch_of(step, count, batch, seed)[rank::world])
        total: Tensor = sum(model(*photos.batch(drawn, accelerator.device)))
        return total

    def check() -> tuple[float, str]:
        gps, text = validate(losses, validation, batch).tolist()
        return gps + text, f"validation loss {gps + text:.4f}, of gps {gps:.4f}, of text {text:.4f}"

    schedule = LambdaLR(adam, lambda step: GAMMA ** (step // epoch_steps))
    save = partial(losses.alignment.save_pretrained, out)
    kept = Kept(out / "alignment.safetensors", out.with_name(f"{out.name}-alignment-checkpoint.safetensors"), identity)
    run_steps(accelerator, losses, schedule, steps=epoch_steps * epochs, checks=epochs, loss=loss, check=check,
              save=save, kept=kept, log=log)  # fmt: skip


@torch.no_grad()
def validate(losses: Losses, photos: Examples, batch: int) -> Tensor:
    """Return the mean gps and text loss (2,) float64 in batches; the last may be smaller, so that all photos count."""
    losses.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for rows in torch.split(torch.arange(len(photos.rows)), batch):
        values = losses(*photos.batch(rows, losses.accelerator.device))
        total += len(rows) * torch.stack(values).double().cpu()
    return total / len(photos.rows)


def _start_with(alignment: GeoAlignment, start: LocationEncoder) -> None:
    encoder = alignment.location[0] if isinstance(alignment.location, nn.Sequential) else alignment.location
    try:
        encoder.load_state_dict(start.state_dict())
    except RuntimeError:
        raise GeoError(
            "the location encoder to begin with has other sizes than the recipe's: GeoCLIP's goes with location "
            '"mercator" or "equal_earth"'
        ) from None
