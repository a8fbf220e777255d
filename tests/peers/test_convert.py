"""Conversion of GeoToken checkpoints, and what the released code computes with the same weights (tests/data)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call, fails
from safetensors.torch import load_file, save_file
from tiny import OneLine
from torch import Tensor

from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.peers.convert import convert_geotoken
from rag_geotoken.tokens.decoding import beam, greedy
from rag_geotoken.tokens.model import TokenConfig, TokenModel

DATA = Path(__file__).parents[1] / "data"
WEIGHTS = DATA / "geotoken_small_weights.safetensors"
SIZES = TokenConfig(20, 2, 15, 768, 32, 4, 64, 2, 2, 0.1, "sequence")

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return load_file(WEIGHTS)


@pytest.fixture(scope="module")
def reference() -> State:
    return load_file(DATA / "geotoken_small_reference.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TokenModel:
    folder = tmp_path_factory.mktemp("converted")
    convert_geotoken(WEIGHTS, folder, heads=4)
    return TokenModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def memory(model: TokenModel, reference: State) -> Tensor:
    near = reference["neighbor_index"]
    query = torch.stack([reference[f"query_{part}"] for part in ("image", "gps", "text")], dim=1)
    around = torch.stack([reference[f"gallery_{part}"][near] for part in ("image", "gps", "text")], dim=2)
    with torch.no_grad():
        return model.memory(query, around, reference["gallery_tokens"][near])


def close(given: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-4)


def test_the_memory_is_the_released_codes(memory: Tensor, reference: State) -> None:
    assert memory.shape == (6, 214, 32)
    close(memory, reference["memory"])


@torch.no_grad()
def test_the_logits_are_the_released_codes(model: TokenModel, memory: Tensor, reference: State) -> None:
    face, *rest = model.logits(memory, reference["greedy_tokens"])
    close(face, reference["logits_face"])
    close(torch.stack(rest, dim=1), reference["logits_rest"])


def test_greedy_is_the_released_codes(model: TokenModel, memory: Tensor, reference: State) -> None:
    found = greedy(model, memory)
    assert torch.equal(found.tokens[:, 0], reference["greedy_tokens"])
    close(found.log_prob[:, 0], reference["greedy_logp"])
    places = np.stack(S2Tokenizer(20).decode(found.tokens[:, 0].numpy()), axis=-1)
    np.testing.assert_allclose(places, reference["greedy_latlng"].numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("width", [1, 4, 5])
def test_beams_are_the_released_codes(model: TokenModel, memory: Tensor, reference: State, width: int) -> None:
    assert torch.equal(beam(model, memory, width).tokens[:, 0], reference[f"beam{width}_best_tokens"])


@torch.no_grad()
def test_a_beam_wider_than_the_six_faces(model: TokenModel, memory: Tensor) -> None:
    wide, narrow = beam(model, memory, 10), beam(model, memory, 5)
    assert wide.tokens.shape == (6, 10, 11)
    assert all(len(cells.unique(dim=0)) == 10 for cells in wide.tokens)
    assert (wide.log_prob.diff(dim=1) <= 0).all()
    assert (wide.log_prob[:, 0] >= narrow.log_prob[:, 0] - 1e-4).all()
    flat = wide.tokens.flatten(0, 1)
    logits = model.logits(memory.repeat_interleave(10, dim=0), flat)
    scored = sum(layer.log_softmax(-1).gather(1, flat[:, t, None])[:, 0] for t, layer in enumerate(logits))
    assert isinstance(scored, Tensor)
    close(wide.log_prob.flatten(), scored)


def test_the_sizes_are_told_by_the_shapes(tmp_path: Path) -> None:
    assert convert_geotoken(WEIGHTS, tmp_path, heads=4) == SIZES
    assert json.loads((tmp_path / "tokens.json").read_text())["heads"] == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokens.json", "tokens.safetensors"]


def test_other_depths_levels_and_a_short_last_token(tmp_path: Path) -> None:
    sizes = TokenConfig(7, 3, 2, 48, 24, 2, 40, 3, 1, 0.1, "sequence")
    model = TokenModel(sizes)
    assert model.vocab_sizes == (6, 64, 64, 4)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert convert_geotoken(tmp_path / "m.safetensors", tmp_path / "out", heads=2, neighbors=2) == sizes


def test_every_number_is_kept(state: State, tmp_path: Path) -> None:
    convert_geotoken(WEIGHTS, tmp_path, heads=4)
    saved = load_file(tmp_path / "tokens.safetensors")
    dropped = {"coord_head", "metadata_proj", "similarity_embedding"}
    assert {name.split(".")[0] for name in state.keys() - saved.keys()} == dropped
    assert not saved.keys() - state.keys()
    assert all(torch.equal(value, state[name]) for name, value in saved.items())


PACKINGS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "distributed": lambda state: {f"module.{name}": value for name, value in state.items()},
    "nested": lambda state: {"epoch": 3, "model": state, "optimizer": {"step": torch.ones(1)}},
    "both": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "parameters": lambda state: {name: torch.nn.Parameter(value) for name, value in state.items()},
    "doubles": lambda state: {name: value.double() for name, value in state.items()},
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ending", ["pth", "pt"])
def test_checkpoints_of_torch(state: State, tmp_path: Path, packing: str, ending: str) -> None:
    sinusoids = {"encoder_pos_encoder.pe": torch.ones(500, 1, 32), "decoder_pos_encoder.pe": torch.ones(12, 1, 32)}
    path = tmp_path / f"model.{ending}"
    torch.save(PACKINGS[packing](state | sinusoids), path)
    assert convert_geotoken(path, tmp_path / "out", heads=4) == SIZES
    saved = load_file(tmp_path / "out" / "tokens.safetensors")
    assert all(value.dtype == torch.float32 and torch.equal(value, state[name]) for name, value in saved.items())


def changed(name: str, value: Tensor) -> Callable[[State], Any]:
    return lambda state: state | {name: value}


def without(*names: str) -> Callable[[State], Any]:
    return lambda state: {name: value for name, value in state.items() if not name.startswith(names)}


def itself(state: State) -> Any:
    nest: dict[str, Any] = {}
    nest["model"] = nest
    return nest


NAN = torch.full((32,), torch.nan)
WRONG: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (without("cls_token"), "cls_token is missing$"),
    "several missing": (without("cls_token", "embedding"), "cls_token is missing, and 1 more"),
    "missing size": (without("image_proj"), "image_proj.0.weight is missing"),
    "no vocabularies": (without("output_layers"), "output_layers.0.weight is missing"),
    "a layer in between": (without("encoder.layers.0.norm1"), "encoder.layers.0.norm1.weight is missing"),
    "no first layer": (without("encoder.layers.0."), "encoder.layers.0.linear1.weight is missing"),
    "no decoder": (without("decoder."), "decoder.layers.0.linear1.weight is missing"),
    "unknown": (changed("extra.weight", torch.ones(2)), "'extra.weight' is unknown"),
    "unknown in two lines": (changed("a\nb" * 99, torch.ones(2)), "unknown"),
    "a far layer": (changed("encoder.layers.999999999999.norm1.weight", torch.ones(32)), "missing"),
    "misshapen": (changed("cls_token", torch.ones(2, 32)), r"cls_token is \(2, 32\) where \(1, 32\) fits"),
    "misshapen size": (changed("image_proj.0.weight", torch.ones(32)), "image_proj.0.weight is .* matrix"),
    "empty": (changed("image_proj.0.weight", torch.ones(0, 768)), "image_proj.0.weight is .* matrix"),
    "not a number": (changed("encoder.layers.0.norm1.bias", NAN), "norm1.bias holds values that are not finite"),
    "infinite": (changed("encoder.layers.0.norm1.bias", NAN.new_full((32,), -torch.inf)), "not finite"),
    "too large for 32 bits": (changed("cls_token", torch.full((1, 32), 1e300, dtype=torch.float64)), "not finite"),
    "five faces": (changed("output_layers.0.weight", torch.ones(5, 32)), r"vocabularies \(5, 16.* S2 tokenizer"),
    "no power of four": (changed("output_layers.1.weight", torch.ones(15, 32)), r"vocabularies \(6, 15"),
    "unequal": (changed("output_layers.1.weight", torch.ones(4, 32)), r"vocabularies \(6, 4, 16"),
    "32 levels": (
        lambda state: state | {f"output_layers.{t}.weight": torch.ones(16, 32) for t in range(11, 17)},
        "vocabularies",
    ),
    "integers": (changed("cls_token", torch.ones(1, 32, dtype=torch.int64)), "'cls_token' is not made of floats"),
    "sparse": (changed("cls_token", torch.ones(1, 32).to_sparse()), "'cls_token' is not made of floats"),
    "no memory": (changed("cls_token", torch.ones(1, 32, device="meta")), "'cls_token' is not made of floats"),
    "one number as many": (changed("cls_token", torch.ones(1).expand(10**5, 10**5)), "more numbers than it holds"),
    "no tensors": (lambda state: {"epoch": 3}, "'epoch' is not made of floats"),
    "nothing": (lambda state: {}, "no state dict"),
    "numbered": (lambda state: {1: torch.ones(1)}, "no state dict"),
    "a list": (lambda state: list(state.values()), "no state dict"),
    "a nest of itself": (itself, "'model' is not made of floats"),
    "objects": (lambda state: state | {"when": Path("x")}, "refused"),
}


@pytest.mark.filterwarnings("ignore:.*Sparse:UserWarning")
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_state_dict_is_refused_in_one_line(state: State, tmp_path: Path, one_line: OneLine, case: str) -> None:
    change, words = WRONG[case]
    torch.save(change(state), tmp_path / "model.pth")
    with one_line(words):
        convert_geotoken(tmp_path / "model.pth", tmp_path / "out", heads=4)
    assert not (tmp_path / "out").exists()


class Tripwire:
    """Pickled, it makes a file when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(state: State, tmp_path: Path, one_line: OneLine) -> None:
    touched = tmp_path / "touched"
    torch.save(state | {"cls_token": Tripwire(touched)}, tmp_path / "model.pth")
    with one_line("refused"):
        convert_geotoken(tmp_path / "model.pth", tmp_path / "out")
    assert not touched.exists()
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert touched.exists()


@pytest.mark.filterwarnings("error")
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(state: State, tmp_path: Path, one_line: OneLine) -> None:
    def refused(name: str, content: bytes, words: str) -> None:
        (tmp_path / name).write_bytes(content)
        with one_line(f"{name} .*{words}"):
            convert_geotoken(tmp_path / name, tmp_path / "out")

    whole = WEIGHTS.read_bytes()
    torch.save(state, tmp_path / "whole.pth")
    for ending in ("safetensors", "pth", "pt"):
        refused(f"empty.{ending}", b"", "no checkpoint")
        refused(f"text.{ending}", b"hello, this is a text file\n" * 20, "no checkpoint|broken")
        refused(f"archive.{ending}", b"PK\x03\x04" + bytes(100), "no checkpoint|broken")
    refused("cut.safetensors", whole[: len(whole) // 2], "no checkpoint, or a truncated one")
    refused("cut.pth", (tmp_path / "whole.pth").read_bytes()[:300_000], "no checkpoint, or a truncated one")
    refused("raw.pth", pickle.dumps({"when": tmp_path}, protocol=4), "refused")
    refused("model.ckpt", whole, "no checkpoint by its name")
    with one_line("there is no file .*nowhere.pth"):
        convert_geotoken(tmp_path / "nowhere.pth", tmp_path / "out")
    (tmp_path / "folder.pth").mkdir()
    with one_line("there is no file .*folder.pth"):
        convert_geotoken(tmp_path / "folder.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heads_that_do_not_divide_the_width(tmp_path: Path, one_line: OneLine) -> None:
    with one_line("5 heads cannot share a width of 32"):
        convert_geotoken(WEIGHTS, tmp_path / "out", heads=5)
    assert not (tmp_path / "out").exists()


def test_a_refusal_leaves_the_folder_as_it_was(state: State, tmp_path: Path, one_line: OneLine) -> None:
    out = tmp_path / "out"
    convert_geotoken(WEIGHTS, out, heads=4)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    save_file(without("cls_token")(state), tmp_path / "wrong.safetensors")
    with one_line("cls_token"):
        convert_geotoken(tmp_path / "wrong.safetensors", out, heads=2)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("convert", "geotoken", WEIGHTS, "--out", tmp_path / "out", "--heads", 4) == 0
    shown = capsys.readouterr().out
    assert "level 20" in shown and "4 heads" in shown and "15 neighbors" in shown
    assert TokenModel.from_pretrained(tmp_path / "out").config == SIZES
    convert, other = ("convert", "geotoken", WEIGHTS), tmp_path / "other"
    assert "there is no file" in fails(capsys, "convert", "geotoken", tmp_path / "nowhere.pth", "--out", other)
    assert call(*convert, "--out", other, "--heads", 0) == 2
    assert call(*convert) == 2
    (tmp_path / "file").touch()
    assert "cannot write" in fails(capsys, *convert, "--out", tmp_path / "file", "--heads", 4)
    assert call("convert", "geotoken", "--help") == 0
    shown = capsys.readouterr().out
    assert "--heads" in shown and "safetensors" in shown
