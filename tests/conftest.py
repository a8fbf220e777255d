"""Tiny models, a tiny index and pools; models are saved and loaded, so that tests go the way users do."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_clip import save_clip, save_geoclip_package
from tiny_llava import save_llava
from torch import Tensor

from rag_geotoken.alignment import AlignmentConfig, GeoAlignment
from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.convert import convert_geoclip
from rag_geotoken.decision.pool import make_pool
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.errors import GeoError
from rag_geotoken.files import shipped, write_json
from rag_geotoken.index import GeoIndex
from rag_geotoken.mllm.start import VllmServer
from rag_geotoken.options import Options
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.recipes import read_recipe
from rag_geotoken.reward import RewardConfig, RewardHead
from rag_geotoken.run.ablate import walk_variants
from rag_geotoken.run.build_index import make_index
from rag_geotoken.run.demo import RECIPE
from rag_geotoken.run.variants import Variant, read_variants
from rag_geotoken.run.walk import RunFolder
from rag_geotoken.sources import read_source
from rag_geotoken.tables import write_table
from rag_geotoken.token_model import TokenConfig, TokenModel
from rag_geotoken.types import BEAM, GREEDY, SAMPLE, Candidates, Neighbors, Pool

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")  # of the server's own environment: `make test-vllm`
collect_ignore = [] if VLLM_PYTHON else ["served"]

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

# Of the pools below: B photos, K neighbours, N candidates each, cells of about 100 km.
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
    """For ``memory`` of the tiny model: photo (B, 3, dim), neighbours (B, K, 3, dim), their tokens (B, K, T)."""
    generator = torch.Generator().manual_seed(seed)
    photo = torch.randn(batch, 3, TOKENS.dim, generator=generator)
    near = torch.randn(batch, neighbors, 3, TOKENS.dim, generator=generator)
    sizes = S2Tokenizer(TOKENS.level, TOKENS.group).vocab_sizes
    tokens = [torch.randint(size, (batch, neighbors), generator=generator) for size in sizes]
    return photo, near, torch.stack(tokens, dim=-1)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of untrained tiny weights."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GeoAlignment(ALIGNMENT).save_pretrained(folder)
        RewardHead(REWARD).save_pretrained(folder)
    tiny_tokens().save_pretrained(folder)
    write_json(folder / "tuning.json", asdict(Tuning()))
    return folder


@pytest.fixture(scope="session")
def alignment(weights: Path) -> GeoAlignment:
    """The tiny Geo-alignment, loaded."""
    return GeoAlignment.from_pretrained(weights)


@pytest.fixture(scope="session")
def token_model(weights: Path) -> TokenModel:
    """The tiny token model, loaded."""
    return TokenModel.from_pretrained(weights)


@pytest.fixture(scope="session")
def index_folder(tmp_path_factory: pytest.TempPathFactory, weights: Path, alignment: GeoAlignment) -> Path:
    """An index of ``ROWS`` gallery photos, its stage tables in stages/. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("index")
    make_index(folder, f"blue-marble:gallery,n={ROWS}", alignment)
    return folder


@pytest.fixture(scope="session")
def gallery(index_folder: Path) -> GeoIndex:
    """That index, loaded."""
    return GeoIndex.load(index_folder)


@pytest.fixture(scope="session")
def geolocator(index_folder: Path, weights: Path) -> Geolocator:
    """All of it together."""
    return Geolocator.from_pretrained(index_folder, weights)


def write_test_photos(folder: Path, count: int = 30) -> None:
    """A photos table of test photos, the third of which is no picture."""
    table = read_source(f"blue-marble:test,n={count},seed=1")
    images = table["image"].to_pylist()
    images[2] = "missing.png"
    table = table.set_column(table.column_names.index("image"), "image", pa.array(images))
    write_table(folder / "photos.parquet", table)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, geolocator: Geolocator) -> Path:
    """All stages and all variants of the ablation on those photos, with ``OPTIONS``. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("run")
    write_test_photos(folder)
    walk_variants(RunFolder(folder, geolocator), VARIANTS)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with embeddings of 768 numbers, as openai/clip-vit-large-patch14 has them."""
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="session")
def geoclip_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the package geoclip with random weights and a gallery of 300 places."""
    rng = np.random.default_rng(0)
    places = np.column_stack([np.degrees(np.arcsin(rng.uniform(-1, 1, 300))), rng.uniform(-180, 180, 300)])
    places[:3] = [[90.0, 0.0], [-90.0, 12.0], [-17.0, 180.0]]
    return save_geoclip_package(tmp_path_factory.mktemp("package") / "model", places)


@pytest.fixture(scope="session")
def geoclip_folder(tmp_path_factory: pytest.TempPathFactory, geoclip_package: Path) -> Path:
    """What `convert geoclip` makes of it. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("geoclip") / "converted"
    convert_geoclip(geoclip_package, folder)
    return folder


@pytest.fixture(scope="session")
def one_line() -> OneLine:
    """A context that expects a GeoError of one line, matching a regular expression."""

    @contextmanager
    def expect(words: str) -> Iterator[None]:
        with pytest.raises(GeoError, match=words) as caught:
            yield
        assert len(str(caught.value).splitlines()) == 1

    return expect


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


@pytest.fixture(scope="session")
def neighbors() -> Neighbors:
    """Neighbours around one place a photo, several of them in one cell."""
    rng = np.random.default_rng(0)
    around = np.column_stack([rng.uniform(-50, 70, PHOTOS), rng.uniform(-170, 170, PHOTOS)])
    lat_lon = around[:, None] + rng.normal(0, 1.5, (PHOTOS, K, 2))
    scores = -np.sort(-rng.uniform(0.5, 0.9, (PHOTOS, K)), axis=1).astype(np.float32)
    return Neighbors(rng.integers(0, 100, (PHOTOS, K)), lat_lon, scores)


@pytest.fixture(scope="session")
def candidates(neighbors: Neighbors) -> Candidates:
    """Cells near the neighbours: some theirs, some drawn twice."""
    rng = np.random.default_rng(1)
    lat_lon = neighbors.lat_lon[:, rng.integers(0, K, N)] + rng.choice([0.0, 1.0], (PHOTOS, N, 1))
    tokens = TOKENIZER.encode(*lat_lon.reshape(-1, 2).T).reshape(PHOTOS, N, -1)
    _, cell = np.unique(tokens.reshape(-1, tokens.shape[-1]), axis=0, return_inverse=True)
    log_prob = np.random.default_rng(2).uniform(-9, -1, cell.max() + 1)[cell].reshape(PHOTOS, N)
    source = np.tile(np.array([GREEDY, *[BEAM] * 4, *[SAMPLE] * 7], np.int8), (PHOTOS, 1))
    lat_lon = np.stack(TOKENIZER.decode(tokens.reshape(-1, tokens.shape[-1])), axis=-1).reshape(*tokens.shape[:2], 2)
    return Candidates(tokens, log_prob.astype(np.float32), source, lat_lon)


@pytest.fixture(scope="session")
def pool(neighbors: Neighbors, candidates: Candidates) -> Pool:
    """Both together: several entries a photo, and several places of the arrays without one."""
    return make_pool(neighbors, candidates, TOKENIZER, TUNING)


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with random weights."""
    return save_llava(tmp_path_factory.mktemp("llava") / "tiny-llava")


@pytest.fixture(scope="session")
def server(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A real server of that model, for tests/served alone. Starting takes half a minute."""
    assert VLLM_PYTHON is not None
    with VllmServer(llava, VLLM_PYTHON, tmp_path_factory.mktemp("server") / "server.log") as running:
        yield running
