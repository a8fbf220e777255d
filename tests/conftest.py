"""Tiny models, a tiny index and pools; models are saved and loaded, so that tests go the way users do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    ALIGNMENT,
    PHOTOS,
    REWARD,
    ROWS,
    TOKENIZER,
    TUNING,
    VARIANTS,
    VLLM_PYTHON,
    K,
    N,
    OneLine,
    tiny_tokens,
    write_test_photos,
)
from tiny_clip import save_clip, save_geoclip_package
from tiny_llava import save_llava

from rag_geotoken.decision.pool import make_pool
from rag_geotoken.decision.tuning import Tuning
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.index.geo_index import GeoIndex
from rag_geotoken.mllm.start import VllmServer
from rag_geotoken.peers.convert import convert_geoclip
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.ablate import walk_variants
from rag_geotoken.run.build_index import make_index
from rag_geotoken.run.walk import RunFolder
from rag_geotoken.storage.files import write_json
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.tokens.reward import RewardHead
from rag_geotoken.types import BEAM, GREEDY, SAMPLE, Candidates, Neighbors, Pool

collect_ignore = [] if VLLM_PYTHON else ["served"]


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


@pytest.fixture(scope="session")
def neighbors() -> Neighbors:
    """Neighbors around one place a photo, several of them in one cell."""
    rng = np.random.default_rng(0)
    around = np.column_stack([rng.uniform(-50, 70, PHOTOS), rng.uniform(-170, 170, PHOTOS)])
    lat_lon = around[:, None] + rng.normal(0, 1.5, (PHOTOS, K, 2))
    scores = -np.sort(-rng.uniform(0.5, 0.9, (PHOTOS, K)), axis=1).astype(np.float32)
    return Neighbors(rng.integers(0, 100, (PHOTOS, K)), lat_lon, scores)


@pytest.fixture(scope="session")
def candidates(neighbors: Neighbors) -> Candidates:
    """Cells near the neighbors: some theirs, some drawn twice."""
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
