"""The token model: what its memory looks at, what its decoder may not look at, and saving."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOKENS, inputs, tiny_tokens
from torch import Tensor

from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.token_model import TokenConfig, TokenModel


def targets(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    sizes = S2Tokenizer(TOKENS.level, TOKENS.group).vocab_sizes
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes], dim=1)


@torch.no_grad()
def test_shapes(token_model: TokenModel) -> None:
    memory = token_model.memory(*inputs(5))
    assert memory.shape == (5, 4 + 3 * (3 + 3), TOKENS.d_model)
    logits = token_model.logits(memory, targets(5))
    assert [tuple(logit.shape) for logit in logits] == [(5, 6), (5, 16), (5, 16)]
    assert all(torch.isfinite(logit).all() for logit in logits)


@torch.no_grad()
def test_fewer_neighbours_than_usual_will_do(token_model: TokenModel) -> None:
    photo, near, tokens = inputs(2)
    for k in range(3):
        memory = token_model.memory(photo, near[:, :k], tokens[:, :k])
        assert memory.shape == (2, 4 + 6 * k, TOKENS.d_model)
        assert torch.isfinite(token_model.logits(memory, targets(2))[-1]).all()


@pytest.mark.parametrize("part", range(3))
@torch.no_grad()
def test_every_input_counts(token_model: TokenModel, part: int) -> None:
    given, other = inputs(4), inputs(4, seed=1)
    changed = [b if i == part else a for i, (a, b) in enumerate(zip(given, other, strict=True))]
    first, second = (token_model.logits(token_model.memory(*i), targets(4))[0] for i in (given, changed))
    assert (first - second).abs().max() > 1e-3


@torch.no_grad()
def test_the_rank_of_a_neighbour_counts(token_model: TokenModel) -> None:
    photo, near, tokens = inputs(4)
    turned = token_model.memory(photo, near.flip(1), tokens.flip(1))
    memory = token_model.memory(photo, near, tokens)
    first, second = (token_model.logits(m, targets(4))[0] for m in (memory, turned))
    assert (first - second).abs().max() > 1e-3


@torch.no_grad()
def test_photos_do_not_see_each_other(token_model: TokenModel) -> None:
    together = inputs(6)
    memory = token_model.memory(*together)
    for i in range(6):
        photo, near, tokens = (part[i : i + 1] for part in together)
        alone = token_model.memory(photo, near, tokens)
        torch.testing.assert_close(alone[0], memory[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", range(3))
@torch.no_grad()
def test_a_position_sees_the_tokens_before_it_only(token_model: TokenModel, position: int) -> None:
    memory, tokens = token_model.memory(*inputs(4)), targets(4)
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 6
    before, after = token_model.logits(memory, tokens), token_model.logits(memory, changed)
    for t, (a, b) in enumerate(zip(before, after, strict=True)):
        if t <= position:
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        else:
            assert (a - b).abs().max() > 1e-3


def test_every_position_has_embeddings_of_its_own(token_model: TokenModel) -> None:
    photo, near, tokens = inputs(1)
    memory = token_model.memory(photo, near, tokens)
    target = targets(1)
    read, seen = torch.autograd.grad(
        sum(logit.square().sum() for logit in token_model.logits(memory, target)),  # type: ignore[arg-type]
        [token_model.neighbor_tokens.weight, token_model.tokens.weight],
    )
    offsets = torch.tensor([0, 6, 22])
    assert set(read.any(dim=1).nonzero()[:, 0].tolist()) == set((tokens + offsets).flatten().tolist())
    start = 6 + 16 + 16
    assert set(seen.any(dim=1).nonzero()[:, 0].tolist()) == {start, *(target + offsets)[0, :2].tolist()}


@torch.no_grad()
def test_the_decoder_knows_where_it_is(token_model: TokenModel) -> None:
    target = targets(2)
    states = token_model.embed(target[:, :2])
    assert states.shape == (2, 3, TOKENS.d_model)
    start = token_model.tokens.weight[-1].expand(2, -1)
    words = [start, *(token_model.tokens.weight[offset + target[:, t]] for t, offset in enumerate((0, 6)))]
    torch.testing.assert_close(states - torch.stack(words, dim=1), token_model.position.expand(2, -1, -1))
    assert torch.dist(token_model.position[0], token_model.position[1]) > 0.01


def test_saving_and_loading_keeps_the_logits(tmp_path: Path) -> None:
    made = tiny_tokens(replace(TOKENS, level=3, neighbors=2))
    made.save_pretrained(tmp_path)
    loaded = TokenModel.from_pretrained(tmp_path)
    assert loaded.config == made.config and loaded.vocab_sizes == (6, 16, 4) and not loaded.training
    photo, near, tokens = inputs(3, neighbors=2)
    tokens, target = tokens.clamp(max=3), targets(3).clamp(max=3)
    with torch.no_grad():
        first, second = (m.logits(m.memory(photo, near, tokens), target) for m in (made, loaded))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.softmax(-1), b.softmax(-1), rtol=0, atol=1e-2)


def test_the_last_token_takes_the_levels_that_remain() -> None:
    assert TokenModel(replace(TOKENS, level=5)).vocab_sizes == (6, 16, 16, 4)
    assert TokenModel(replace(TOKENS, level=3, group=1)).vocab_sizes == (6, 4, 4, 4)


def test_the_default_is_small() -> None:
    assert sum(parameter.numel() for parameter in TokenModel(TokenConfig()).parameters()) < 3_000_000
