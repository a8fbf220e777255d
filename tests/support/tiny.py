"""Configurations of tiny models, the options that tests run them with, and tables made of them."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.encoders.alignment import AlignmentConfig
from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.options import Options
from rag_geotoken.photos.sources import read_source
from rag_geotoken.run.demo import RECIPE
from rag_geotoken.run.variants import Variant, read_variants
from rag_geotoken.storage.files import shipped
from rag_geotoken.storage.parquet import write_table
from rag_geotoken.storage.recipes import read_recipe
from rag_geotoken.tokens.model import TokenConfig, TokenModel
from rag_geotoken.tokens.reward import RewardConfig
from rag_geotoken.types import BEAM, Pool

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")  # of the server's own environment: `make test-vllm`


ALIGNMENT = AlignmentConfig(dim=32, sigmas=(2.0, 12.0), frequencies=8, hidden=32, text_buckets=256, text_dim=16)


TOKENS = TokenConfig(
    level=4, group=2, neighbors=3, dim=32, d_model=24, heads=2, ff=32, encoder_layers=1, decoder_layers=2
)


REWARD = RewardConfig(d_model=TOKENS.d_model, hidden=16)


ROWS = 200


OPTIONS = Options(neighbors=6, beam_width=4, samples=6, openings=8)


SMALL = {"neighbors": 6, "beam_width": 4, "samples": 6, "openings": 8}


def demo_variants() -> list[Variant]:
    """The demo's variants, but for those that ask a multimodal model, with ``SMALL`` options."""
    recipe = read_recipe(shipped(RECIPE))
    variants = read_variants(recipe | {"options": recipe["options"] | SMALL}).variants
    return [variant for variant in variants if not variant.options.asks_mllm]


VARIANTS = demo_variants()


# Of the pools below: B photos, K neighbors, N candidates each, cells of about 100 km.
PHOTOS, K, N = 6, 8, 12


TOKENIZER = S2Tokenizer(6, 2)


TUNING = Tuning(
    neighbor_share=0.3,
    gps_share=0.0,
    neighbor_scale=20.0,
    alignment_scale=10.0,
    reward_scale=2.0,
    spread_km=15.0,
    confidence_scale=0.5,
    confidence_km=15.0,
    density_scale=12.0,
    density_km=100.0,
)


OneLine = Callable[[str], AbstractContextManager[None]]


def tiny_tokens(config: TokenConfig = TOKENS) -> TokenModel:
    """A token model whose probabilities are far from uniform, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = TokenModel(config)
        with torch.no_grad():
            for head in model.output_layers:
                assert isinstance(head, torch.nn.Linear)
                head.weight *= 4.0
    return model.eval()


def inputs(batch: int, neighbors: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """For ``memory`` of the tiny model: photo (B, 3, dim), neighbors (B, K, 3, dim), their tokens (B, K, T)."""
    generator = torch.Generator().manual_seed(seed)
    photo = torch.randn(batch, 3, TOKENS.dim, generator=generator)
    near = torch.randn(batch, neighbors, 3, TOKENS.dim, generator=generator)
    sizes = S2Tokenizer(TOKENS.level, TOKENS.group).vocab_sizes
    tokens = [torch.randint(size, (batch, neighbors), generator=generator) for size in sizes]
    return photo, near, torch.stack(tokens, dim=-1)


def write_test_photos(folder: Path, count: int = 30) -> None:
    """A photos table of test photos, the third of which is no picture."""
    table = read_source(f"blue-marble:test,n={count},seed=1")
    images = table["image"].to_pylist()
    images[2] = "missing.png"
    table = table.set_column(table.column_names.index("image"), "image", pa.array(images))
    write_table(folder / "photos.parquet", table)


def kept(journal: Path) -> list[dict[str, Any]]:
    """The replies in a journal; none where it is not made yet."""
    if not journal.is_file():
        return []
    with closing(sqlite3.connect(journal)) as database, suppress(sqlite3.OperationalError):
        return [json.loads(reply) for (reply,) in database.execute("SELECT reply FROM replies")]
    return []


def pool_of(places: list[tuple[float, float]], weights: list[float], masked: int = 0) -> Pool:
    """One photo's pool, with entries that do not count at its end."""
    lat_lon = np.array([[*places, *[(0.0, 0.0)] * masked]])
    with np.errstate(divide="ignore"):
        log_weight = np.log(np.array([[*weights, *[0.0] * masked]])).astype(np.float32)
    return Pool(lat_lon, log_weight, np.full(log_weight.shape, BEAM, np.int8), np.isfinite(log_weight))
