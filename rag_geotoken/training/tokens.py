"""These functions train the token model on the photos of a source with their neighbors in a gallery."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.geo.sphere import Floats
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.photos.table import SCHEMA
from rag_geotoken.run.resumable import run_stage, stage
from rag_geotoken.run.walk import RunFolder, write_photos
from rag_geotoken.storage.files import file_sha256
from rag_geotoken.tokens.model import TokenConfig, TokenModel
from rag_geotoken.training.loop import Kept, Log, batch_of, one_cycle, run_steps
from rag_geotoken.training.processes import make_accelerator
from rag_geotoken.training.setup import Setup
from rag_geotoken.types import Embeddings, Tables

CHECKS = 10  # validations in a training, each with a checkpoint


@dataclass(frozen=True)
class Photos:
    """This class holds embeddings (N, 3, dim) half, neighbors' rows (N, K) and tokens (N, T) int64 of N photos."""

    vectors: Tensor
    neighbors: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> Photos:
        """Return the same photos on a device."""
        return Photos(*(tensor.to(device) for tensor in vars(self).values()))


def train(setup: Setup) -> None:
    """Take the photos through the road up to their neighbors and train the token model on them."""
    settings, alignment = setup.settings, GeoAlignment.from_pretrained(setup.out)
    config = TokenConfig(dim=alignment.config.dim, neighbor_positions=settings["neighbor_positions"])
    TokenModel(config)  # refuses what cannot be built, before the long work
    # GeoToken trains on the gallery itself, each photo without itself among its neighbors.
    of_gallery, folder = settings["source"] == "gallery", setup.beside("photos")
    options = Options(neighbors=config.neighbors, propose=(), gps_places=0, verify=())
    accelerator = make_accelerator()
    with accelerator.main_process_first():  # the other processes find every table made
        models = Models(alignment, None, setup.gallery(alignment), Tuning())
        if of_gallery:
            gallery_tables(folder, models.index)
        else:
            write_photos(folder, settings["source"])
        run = RunFolder(folder, models)
        files = run.walk(options, until="neighbors", given=("embeddings",) * of_gallery)
    hashes = [file_sha256(folder / f"{name}.parquet") for name in ("photos", "embeddings", "neighbors")]
    identity = setup.identity(config=asdict(config), tables=hashes, index=models.index.identity)
    tables = run.tables(options, files)
    photos, validation = read_photos(tables, models.index, config, settings["held_out"], settings["seed"])
    numbers = {name: settings[name] for name in ("epochs", "batch", "rate", "seed")}
    train_tokens(config, models.index, photos, validation=validation, out=setup.out, identity=identity, **numbers,
                 log=setup.log)  # fmt: skip
    accelerator.end_training()


def gallery_tables(folder: Path, index: GeoIndex) -> None:
    """Write an index's own photos as the tables photos and embeddings of a run."""
    recipe, rows = {"gallery": index.identity}, index.rows.select(SCHEMA.names)
    stage(folder, "photos", recipe, [], ["all"], lambda _: rows)
    ids, digests = rows["id"].to_pylist(), index.rows["digest"].to_pylist()

    def work(block: slice) -> pa.Table:
        vectors = index.vectors(np.arange(block.start, block.stop))
        return Embeddings(vectors, digests[block], [None] * len(vectors)).to_table(ids[block])

    run_stage(folder, "embeddings", recipe, ["photos"], ids, work, many=True)


def train_tokens(
    config: TokenConfig,
    index: GeoIndex,
    photos: Photos,
    validation: Photos,
    *,
    out: Path,
    identity: str,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    log: Log,
) -> None:
    """Train a token model and write the weights that do best on the validation photos into ``out``.

    Cross-entropy a position, its weight falling linearly from 2 (face) to 1 (last), as in GeoToken; AdamW, one cosine
    cycle, bf16. With several processes each takes its part of every batch. ``OUT-checkpoint.safetensors`` lets a
    stopped training with the same identity go on; with as many processes it ends in the same weights as one that ran
    through. Raises GeoError when the photos do not fill a batch, the processes cannot share one, or the loss diverges.
    """
    accelerator = make_accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    if len(photos.tokens) < batch or batch % world:
        raise GeoError(f"{len(photos.tokens)} photos, batches of {batch}, {world} processes: the first must fill the "
                       "second, and the third divide it")  # fmt: skip
    torch.manual_seed(seed)
    losses = Losses(TokenModel(config), index, accelerator.device)
    adam = torch.optim.AdamW(losses.parameters(), lr=rate, weight_decay=0.02)
    photos, validation = photos.to(accelerator.device), validation.to(accelerator.device)
    steps = len(photos.tokens) // batch * epochs

    def loss(model: nn.Module, step: int) -> Tensor:
        # Order and dropout follow from the step, not from what came before: a resumed training draws the same.
        torch.manual_seed(seed + step * world + rank)
        drawn = torch.from_numpy(batch_of(step, len(photos.tokens), batch, seed)[rank::world])
        return weighted(model(photos, drawn.to(accelerator.device)))

    def check() -> tuple[float, str]:
        positions = validate(losses, validation, batch)
        mean = float(weighted(positions))
        return mean, f"validation loss {mean:.4f}, a position {' '.join(f'{x:.4f}' for x in positions.tolist())}"

    save = partial(losses.tokens.save_pretrained, out, half=True)
    kept = Kept(out / "tokens.safetensors", out.with_name(f"{out.name}-checkpoint.safetensors"), identity)
    run_steps(accelerator, losses, one_cycle(adam, rate, steps), steps=steps, checks=CHECKS, loss=loss, check=check,
              save=save, kept=kept, log=log)  # fmt: skip


def weighted(losses: Tensor) -> Tensor:
    """Return the mean of the positions' losses (T,) with weights that fall linearly from 2 to 1."""
    weights = torch.linspace(2.0, 1.0, len(losses), device=losses.device)
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def validate(losses: Losses, photos: Photos, batch: int) -> Tensor:
    """Return the mean loss of each position (T,) over all photos."""
    losses.eval()
    rows = torch.arange(len(photos.tokens), device=photos.tokens.device)
    parts = [losses(photos, part) * len(part) for part in torch.split(rows, batch)]
    return torch.stack(parts).sum(dim=0) / len(photos.tokens)


class Losses(nn.Module):
    """This module computes the mean cross-entropy of each position; neighbors are looked up in the gallery."""

    def __init__(self, tokens: TokenModel, index: GeoIndex, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.tokens = tokens
        # No buffers: several processes would send them round before every step.
        vectors = index.vectors(np.arange(index.faiss_index.ntotal)).astype(np.float16)
        cells = S2Tokenizer(tokens.config.level, tokens.config.group).encode(*index.lat_lon.T)
        arrays = vectors, cells, index.lat_lon
        self.gallery, self.cells, self.places = (torch.from_numpy(array).to(device) for array in arrays)

    def memory(self, photos: Photos, drawn: Tensor) -> Tensor:
        """Return the token model's memory of the photos at ``drawn`` (B,)."""
        rows = photos.neighbors[drawn]
        query, neighbors = photos.vectors[drawn].float(), self.gallery[rows].float()
        return self.tokens.memory(query, neighbors, self.cells[rows], self.places[rows])

    def forward(self, photos: Photos, drawn: Tensor) -> Tensor:
        """Return the losses (T,) of the photos at ``drawn`` (B,)."""
        target = photos.tokens[drawn]
        logits = self.tokens.logits(self.memory(photos, drawn), target)
        return torch.stack([cross_entropy(logit.float(), target[:, t]) for t, logit in enumerate(logits)])


def read_photos(
    tables: Tables, index: GeoIndex, config: TokenConfig, held_out: int, seed: int
) -> tuple[Photos, Photos]:
    """Return the photos to train on, from tables up to their neighbors, and ``held_out`` gallery photos to validate by.

    Where the gallery is trained on, the held-out photos and all that show the same pixels are left out. A photo is
    never its own neighbor: GeoToken skips the first hit, this code all gallery photos with the same pixels.
    Raises GeoError when nothing is left to train on.
    """

    def photos_of(vectors: NDArray[np.float32], neighbors: NDArray[np.int64], lat_lon: Floats) -> Photos:
        arrays = vectors.astype(np.float16), neighbors, S2Tokenizer(config.level, config.group).encode(*lat_lon.T)
        return Photos(*map(torch.from_numpy, arrays))

    rows = np.random.default_rng([seed, held_out]).permutation(index.faiss_index.ntotal)[:held_out]
    vectors, digests = index.vectors(rows), index.rows["digest"].take(rows).to_pylist()
    neighbors = index.search(vectors, config.neighbors, Tuning().search_weights, digests).rows
    lat_lon = tables.photos.lat_lon
    usable = np.isfinite(lat_lon).all(axis=1) & ~np.isin(tables.embeddings.digests, digests)
    if not usable.any():
        raise GeoError("no photo with a place is left to train on: hold out fewer")
    photos = photos_of(tables.embeddings.vectors[usable], tables.neighbors.rows[usable], lat_lon[usable])
    return photos, photos_of(vectors, neighbors, index.lat_lon[rows])
