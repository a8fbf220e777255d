"""Tiny models and a tiny index, saved to a folder, so that tests go through saving and loading as users do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rag_geotoken.alignment import AlignmentConfig, GeoAlignment
from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.demo import make_index
from rag_geotoken.errors import GeoError
from rag_geotoken.files import write_json
from rag_geotoken.index import GeoIndex
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.selection import Tuning
from rag_geotoken.token_model import TokenConfig, TokenModel

ALIGNMENT = AlignmentConfig(dim=32, sigmas=(2.0, 12.0), frequencies=8, hidden=32, text_buckets=256, text_dim=16)
TOKENS = TokenConfig(
    level=4, group=2, neighbors=3, dim=32, d_model=24, heads=2, ff=32, encoder_layers=1, decoder_layers=2
)
ROWS = 200

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
    """For ``memory_of`` of the tiny model: photo (B, 3, dim), neighbours (B, K, 3, dim), their tokens (B, K, T)."""
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
    make_index(folder, f"blue-marble:gallery,n={ROWS}", alignment, weights)
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
def one_line() -> OneLine:
    """A context that expects a GeoError of one line, matching a regular expression."""

    @contextmanager
    def expect(words: str) -> Iterator[None]:
        with pytest.raises(GeoError, match=words) as caught:
            yield
        assert len(str(caught.value).splitlines()) == 1

    return expect
