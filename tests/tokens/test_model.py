"""The token model: what its memory looks at, what its decoder may not look at, and saving.

That it computes what GeoToken's released code computes is in test_convert.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from tiny import TOKENS, OneLine, inputs, tiny_tokens
from torch import Tensor

from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.tokens.model import GEOTOKEN, TokenConfig, TokenModel

Positions = Literal["sequence", "none", "spherical"]
POSITIONS: tuple[Positions, ...] = ("sequence", "none", "spherical")
PLACES = torch.tensor([[[10.0, 20.0], [-60.0, 170.0], [45.0, -100.0]]])


def targets(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    sizes = S2Tokenizer(TOKENS.level, TOKENS.group).vocab_sizes
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes], dim=1)


def placed(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``inputs`` and the neighbors' places."""
    return *inputs(batch), PLACES.expand(batch, -1, -1) + torch.arange(batch)[:, None, None]


def alike(given: list[Tensor], wanted: list[Tensor], atol: float = 1e-5) -> None:
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def apart(given: list[Tensor], wanted: list[Tensor]) -> bool:
    return any(bool((a - b).abs().max() > 1e-3) for a, b in zip(given, wanted, strict=True))


@torch.no_grad()
def test_shapes(token_model: TokenModel) -> None:
    photo, neighbors, tokens = inputs(5)
    memory = token_model.memory(photo, neighbors, tokens)
    assert memory.shape == (5, 4 + 3 * (3 + 3), TOKENS.d_model)
    logits = token_model.logits(memory, targets(5))
    assert [tuple(logit.shape) for logit in logits] == [(5, 6), (5, 16), (5, 16)]
    assert all(torch.isfinite(logit).all() for logit in logits)


@torch.no_grad()
def test_the_papers_configuration() -> None:
    with torch.device("meta"):
        model = TokenModel(GEOTOKEN).eval()
        photo, neighbors = torch.empty(2, 3, 768), torch.empty(2, 15, 3, 768)
        memory = model.memory(photo, neighbors, torch.empty(2, 15, 11, dtype=torch.int64))
        logits = model.logits(memory, torch.empty(2, 11, dtype=torch.int64))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 54.8
    assert memory.shape == (2, 214, 512)
    assert [tuple(logit.shape) for logit in logits] == [(2, 6)] + 10 * [(2, 16)]
    assert model.offsets.shape == (11,) and model.embedding.weight.shape == (6 + 10 * 16, 512)


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_fewer_neighbors_than_usual_will_do(positions: Positions) -> None:
    model = tiny_tokens(replace(TOKENS, neighbor_positions=positions))
    photo, neighbors, tokens, places = placed(2)
    for k in range(3):
        memory = model.memory(photo, neighbors[:, :k], tokens[:, :k], places[:, :k])
        assert memory.shape == (2, 4 + 6 * k, TOKENS.d_model)
        assert torch.isfinite(model.logits(memory, targets(2))[-1]).all()


def test_too_many_neighbors_or_no_places_are_refused(token_model: TokenModel, one_line: OneLine) -> None:
    with one_line("3 neighbors at most, not 4"):
        token_model.memory(*inputs(2, neighbors=4))
    with one_line("need neighbor_places"):
        tiny_tokens(replace(TOKENS, neighbor_positions="spherical")).memory(*inputs(2))


def test_sizes_that_do_not_fit_are_refused(one_line: OneLine) -> None:
    for heads, width in ((5, 24), (0, 24), (-2, 24), (3, 9)):
        with one_line(f"{heads} heads cannot share a width of {width}"):
            TokenModel(replace(TOKENS, heads=heads, d_model=width))
    with one_line("'rotary': choose sequence, none or spherical"):
        TokenModel(replace(TOKENS, neighbor_positions="rotary"))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", range(7))
@torch.no_grad()
def test_every_input_counts(token_model: TokenModel, part: int) -> None:
    given, replaced = inputs(4), inputs(4, seed=1)
    which, column = divmod(part, 3)
    changed = [tensor.clone() for tensor in given]
    at = (..., column, slice(None)) if which < 2 else ...
    changed[which][at] = replaced[which][at]
    first, second = (token_model.logits(token_model.memory(*tensors), targets(4)) for tensors in (given, changed))
    assert apart(first, second)


@torch.no_grad()
def test_a_longer_embedding_is_no_louder() -> None:
    """An embedding enters the memory as a unit vector, so without biases a longer one is no louder."""
    model = tiny_tokens()
    for layers in (model.image_proj, model.loc_proj, model.text_proj):
        assert isinstance(layers, torch.nn.Sequential)
        for layer in (layers[0], layers[2]):
            assert isinstance(layer, torch.nn.Linear)
            layer.bias.zero_()
    photo, neighbors, tokens = inputs(2)
    torch.testing.assert_close(model.memory(5 * photo, 3 * neighbors, tokens), model.memory(photo, neighbors, tokens))


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_the_order_of_the_neighbors(positions: Positions) -> None:
    model, target = tiny_tokens(replace(TOKENS, neighbor_positions=positions)), targets(4)
    photo, neighbors, tokens, places = placed(4)
    logits = model.logits(model.memory(photo, neighbors, tokens, places), target)
    for order in ([2, 1, 0], [1, 2, 0], [0, 2, 1]):
        reordered = model.logits(model.memory(photo, neighbors[:, order], tokens[:, order], places[:, order]), target)
        if positions == "sequence":
            assert apart(reordered, logits)
        else:
            alike(reordered, logits)


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_the_places_of_the_neighbors(positions: Positions) -> None:
    model, target = tiny_tokens(replace(TOKENS, neighbor_positions=positions)), targets(4)
    photo, neighbors, tokens, places = placed(4)
    logits = model.logits(model.memory(photo, neighbors, tokens, places), target)
    exchanged = model.memory(photo, neighbors, tokens, places.flip(1))
    moved = model.memory(photo, neighbors, tokens, places * torch.tensor([0.5, 1.0]))
    for memory in (exchanged, moved):
        if positions == "spherical":
            assert apart(model.logits(memory, target), logits)
        else:
            alike(model.logits(memory, target), logits, atol=0)
    west, east = places.clone(), places.clone()
    west[..., 1], east[..., 1] = -180, 180
    memories = [model.memory(photo, neighbors, tokens, around) for around in (west, east)]
    torch.testing.assert_close(*memories, rtol=0, atol=1e-5)


@torch.no_grad()
def test_photos_do_not_see_each_other(token_model: TokenModel) -> None:
    together = inputs(6)
    memory = token_model.memory(*together)
    for i in range(6):
        photo, neighbors, tokens = (part[i : i + 1] for part in together)
        alone = token_model.memory(photo, neighbors, tokens)
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


@torch.no_grad()
def test_states_of_a_prefix_are_those_of_the_whole(token_model: TokenModel) -> None:
    memory, tokens = token_model.memory(*inputs(4)), targets(4)
    states = token_model.states(memory, tokens)
    assert states.shape == (4, 4, TOKENS.d_model)
    for length in range(3):
        prefix = token_model.states(memory, tokens[:, :length])
        torch.testing.assert_close(prefix, states[:, : length + 1], rtol=0, atol=1e-5)


def test_every_position_has_embeddings_of_its_own(token_model: TokenModel) -> None:
    photo, neighbors, tokens = inputs(1)
    memory, target = token_model.memory(photo, neighbors, tokens), targets(1)
    read, written, start = torch.autograd.grad(
        sum(logit.square().sum() for logit in token_model.logits(memory, target)),  # type: ignore[arg-type]
        [token_model.retrieval_embedding.weight, token_model.embedding.weight, token_model.start_token_embedding],
    )
    offsets = torch.tensor([0, 6, 22])
    assert set(read.any(dim=1).nonzero()[:, 0].tolist()) == set((tokens + offsets).flatten().tolist())
    assert set(written.any(dim=1).nonzero()[:, 0].tolist()) == set((target + offsets)[0, :2].tolist())
    assert start.all()


@torch.no_grad()
def test_positions_are_sinusoids_and_count() -> None:
    model = tiny_tokens()
    d = TOKENS.d_model
    wanted = [
        [math.sin(p / 10_000 ** (i / d)), math.cos(p / 10_000 ** (i / d))] for p in range(22) for i in range(0, d, 2)
    ]
    torch.testing.assert_close(model.positions, torch.tensor(wanted).view(22, d), rtol=0, atol=1e-5)
    memory, target = model.memory(*inputs(2)), targets(2)
    logits = model.logits(memory, target)
    model.positions.zero_()
    assert apart([model.memory(*inputs(2))], [memory])
    assert apart(model.logits(memory, target), logits)


@pytest.mark.parametrize("positions", POSITIONS)
def test_training_and_answering_compute_the_same(positions: Positions) -> None:
    model, target = tiny_tokens(replace(TOKENS, neighbor_positions=positions)), targets(3)
    trained = model.logits(model.memory(*placed(3)), target)
    with torch.no_grad():
        alike(model.logits(model.memory(*placed(3)), target), trained)
    sum((logit.square().sum() for logit in trained), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


@torch.no_grad()
def test_dropout_in_training_only() -> None:
    model, given, target = tiny_tokens(replace(TOKENS, dropout=0.3)), inputs(2), targets(2)
    memory = model.memory(*given)
    logits = model.logits(memory, target)
    assert torch.equal(model.memory(*given), memory)
    alike(model.logits(memory, target), logits, atol=0)
    alike([memory], [tiny_tokens().memory(*given)], atol=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.train()
        first, second = model.memory(*given), model.memory(*given)
        assert apart([first], [second])
        assert apart(model.logits(memory, target), model.logits(memory, target))
        assert apart(model.logits(memory, target), logits)
    model.eval()
    alike(model.logits(memory, target), logits, atol=0)
    calm = tiny_tokens().train()
    assert torch.equal(calm.memory(*given), calm.memory(*given))


@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_saving_and_loading_keeps_the_logits(tmp_path: Path, half: bool) -> None:
    made = tiny_tokens(replace(TOKENS, level=3, neighbors=2, neighbor_positions="none", dropout=0.1))
    made.save_pretrained(tmp_path, half=half)
    saved = load_file(tmp_path / "tokens.safetensors")
    assert saved.keys() == {name for name, _ in made.named_parameters()}
    assert {value.dtype for value in saved.values()} == {torch.float16 if half else torch.float32}
    loaded = TokenModel.from_pretrained(tmp_path)
    assert loaded.config == made.config and loaded.vocab_sizes == (6, 16, 4) and not loaded.training
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    photo, neighbors, tokens = inputs(3, neighbors=2)
    tokens, target = tokens.clamp(max=3), targets(3).clamp(max=3)
    first, second = (m.logits(m.memory(photo, neighbors, tokens), target) for m in (made, loaded))
    alike([logit.softmax(-1) for logit in second], [logit.softmax(-1) for logit in first], atol=1e-2 if half else 0)


def test_sizes_of_the_vocabularies_and_of_the_default() -> None:
    assert TokenModel(replace(TOKENS, level=5)).vocab_sizes == (6, 16, 16, 4)
    assert TokenModel(replace(TOKENS, level=3, group=1)).vocab_sizes == (6, 4, 4, 4)
    assert sum(parameter.numel() for parameter in TokenModel(TokenConfig()).parameters()) < 3_000_000
