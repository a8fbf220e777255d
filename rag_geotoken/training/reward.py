"""These functions train the reward head on pools of gallery photos: how far is each entry from the photo's place?"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.sphere import haversine_km
from rag_geotoken.models import Models
from rag_geotoken.options import Options
from rag_geotoken.run.walk import answered
from rag_geotoken.tokens.reward import RewardConfig, RewardHead
from rag_geotoken.training.loop import Log, one_cycle
from rag_geotoken.training.processes import make_accelerator
from rag_geotoken.training.setup import Setup
from rag_geotoken.types import RADII_KM, Embeddings, Photos, Pool, Tables

BLOCK = 256


def train(setup: Setup) -> None:
    """Train the reward head with a recipe's settings, for the models in its folder."""
    head = train_reward(setup.models(Tuning()), **setup.settings, log=setup.log)
    head.save_pretrained(setup.out, half=True)


def train_reward(
    models: Models, *, photos: int, epochs: int, batch: int, rate: float, seed: int, log: Log
) -> RewardHead:
    """Train a reward head on the pools of ``photos`` gallery photos, a tenth of which is held out to validate.

    The token model stays as it is. No photo is among its own neighbors. Cross-entropy over the bins of error, every
    entry alike. Raises GeoError when the gallery has fewer photos, or too few are left to validate or to fill a batch.
    """
    rows = np.random.default_rng(seed).permutation(models.index.faiss_index.ntotal)
    held_out = photos // 10
    if photos > len(rows) or held_out < 1 or photos - held_out < batch:
        raise GeoError(f"photos = {photos}, batch = {batch} do not fit: the gallery has {len(rows)} photos, a tenth of "
                       "those asked for is held out, and the rest must fill a batch")  # fmt: skip
    states, bins, mask = pools_of(models, rows[:photos], log)
    accelerator = make_accelerator()
    torch.manual_seed(seed)
    head = RewardHead(RewardConfig(states.shape[-1]))
    adam = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.02)
    steps = (photos - held_out) // batch
    schedule = one_cycle(adam, rate, steps * epochs)
    model, optimizer = accelerator.prepare(head, adam)

    def loss_of(drawn: Tensor) -> Tensor:
        entries = mask[drawn]
        logits = model(states[drawn][entries].float().to(accelerator.device))
        return cross_entropy(logits, bins[drawn][entries].to(accelerator.device))

    for epoch in range(epochs):
        order = held_out + torch.randperm(photos - held_out, generator=torch.Generator().manual_seed(seed + epoch))
        for drawn in torch.split(order[: steps * batch], batch):
            loss = loss_of(drawn)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            validation = loss_of(torch.arange(held_out)).item()
        log(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.4f}, held out {validation:.4f}")
    return head.cpu().eval()


def pools_of(models: Models, rows: NDArray[np.int64], log: Log) -> tuple[Tensor, ...]:
    """Return the pools of N gallery photos: last states (N, C, d) half of the entries, bins (N, C) and mask (N, C)."""
    index, parts = models.index, []
    options = Options(gps_places=0, verify=())
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        lat_lon, digests = index.lat_lon[block], index.rows["digest"].take(block).to_pylist()
        ids = [str(row) for row in block.tolist()]
        tables = Tables(Photos.of(ids, ids))
        tables.put("embeddings", Embeddings(index.vectors(block), digests, [None] * len(block)))
        pool: Pool = answered(models, options, tables, until="pool")
        km = haversine_km(lat_lon[:, :1], lat_lon[:, 1:], pool.lat_lon[..., 0], pool.lat_lon[..., 1])
        states = models.states(tables.embeddings, tables.neighbors, pool).half()
        parts.append((states, torch.from_numpy(np.searchsorted(RADII_KM, km)), torch.from_numpy(pool.mask)))
        if start // BLOCK % 8 == 0:
            log(f"pools of {start + len(block)} of {len(rows)} photos")
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
