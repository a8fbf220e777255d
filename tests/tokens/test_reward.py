"""The reward head, and verification by it and by the alignment: pools at once against entries one by one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import REWARD, TOKENS, OneLine

from rag_geotoken.options import Options
from rag_geotoken.photos.blue_marble import cut, draw_views
from rag_geotoken.pipeline import Geolocator
from rag_geotoken.run.road import road
from rag_geotoken.run.walk import answered, embedded
from rag_geotoken.storage.weights import fingerprint
from rag_geotoken.tokens.reward import RewardConfig, RewardHead
from rag_geotoken.types import RADII_KM, Photos, Tables
from rag_geotoken.verifiers import load_verifier


@pytest.fixture(scope="module")
def head(weights: Path) -> RewardHead:
    return RewardHead.from_pretrained(weights)


OPTIONS = Options(neighbors=6, beam_width=4, samples=9, gps_places=0)


@pytest.fixture(scope="module")
def tables(geolocator: Geolocator) -> Tables:
    """What four photos have become before they are verified."""
    pixels = cut(draw_views("validation", 4, 0))
    tables = embedded(geolocator, OPTIONS, Photos.of(list(pixels), [str(i) for i in range(4)]))
    pool = answered(geolocator, OPTIONS, tables, until="pool")
    assert (~pool.mask).any() and pool.mask.sum(axis=1).min() > 5
    return tables


def scores_of(name: str, models: Geolocator, tables: Tables) -> NDArray[np.float32]:
    verdict = load_verifier(name).scores(models, OPTIONS, tables, tables.pool)
    scores, mask = verdict.scores, tables.pool.mask
    assert scores.shape == mask.shape and scores.dtype == np.float32 and (verdict.mask == mask).all()
    assert (scores[~mask] == 0).all()
    return scores


# the head


def test_the_head_is_two_layers_by_hand(head: RewardHead) -> None:
    states = torch.randn(5, TOKENS.d_model, generator=torch.Generator().manual_seed(0))
    logits = head(states)
    assert logits.shape == (5, len(RADII_KM) + 1)
    first, last = head.state_dict(), head.head
    for state, result in zip(states.tolist(), logits.tolist(), strict=True):
        pairs = zip(first["fc1.weight"].tolist(), first["fc1.bias"].tolist(), strict=True)
        hidden = [max(0.0, sum(w * x for w, x in zip(row, state, strict=True)) + b) for row, b in pairs]
        pairs = zip(last.weight.tolist(), last.bias.tolist(), strict=True)
        expected = [sum(w * x for w, x in zip(row, hidden, strict=True)) + b for row, b in pairs]
        assert result == pytest.approx(expected, abs=1e-5)


def test_a_score_is_the_log_of_the_mean_chance_within_the_radii(head: RewardHead) -> None:
    states = torch.randn(2, 3, TOKENS.d_model, generator=torch.Generator().manual_seed(1))
    scores = head.scores(states)
    assert scores.shape == (2, 3)
    for given, result in zip(head(states).flatten(0, 1).tolist(), scores.flatten().tolist(), strict=True):
        chances = [math.exp(x) / sum(math.exp(y) for y in given) for x in given]
        # Within the r-th radius lie the errors of the bins up to the r-th; the last bin lies beyond all.
        within = [sum(chances[: r + 1]) for r in range(5)]
        assert result == pytest.approx(math.log(sum(within) / 5), abs=1e-5)


def test_a_nearer_bin_scores_higher(head: RewardHead) -> None:
    sure = RewardHead(REWARD)
    scores = []
    for bin_ in range(6):
        with torch.no_grad():
            sure.head.weight.zero_()
            sure.head.bias.copy_(10.0 * torch.eye(6)[bin_])
        scores.append(sure.scores(torch.zeros(1, TOKENS.d_model)).item())
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(0.0, abs=1e-3)
    # The bins of 1 and 25 km differ by one radius of five.
    assert math.exp(scores[1]) == pytest.approx(0.8, abs=1e-3) and math.exp(scores[5]) < 1e-3


def test_saved_in_half_precision_it_scores_alike(head: RewardHead, tmp_path: Path) -> None:
    states = torch.randn(20, TOKENS.d_model, generator=torch.Generator().manual_seed(2))
    sizes = {}
    for half in (False, True):
        head.save_pretrained(tmp_path / str(half), half=half)
        loaded = RewardHead.from_pretrained(tmp_path / str(half))
        assert loaded.config == REWARD and not loaded.training
        assert all(value.dtype == torch.float32 for value in loaded.state_dict().values())
        torch.testing.assert_close(loaded.scores(states), head.scores(states), atol=2e-3 * half, rtol=0)
        sizes[half] = (tmp_path / str(half) / "reward.safetensors").stat().st_size
    assert sizes[True] < 0.7 * sizes[False]


@pytest.mark.parametrize("settings", ['{"d_model": 24}', '{"d_model": 24, "width": 3}', "[]", '{"hidden": "many"}'])
def test_settings_that_do_not_fit_are_named(settings: str, weights: Path, tmp_path: Path, one_line: OneLine) -> None:
    shutil.copy(weights / "reward.safetensors", tmp_path)
    (tmp_path / "reward.json").write_text(settings)
    with one_line(r"reward\.safetensors .* cannot be used as RewardHead weights"):
        RewardHead.from_pretrained(tmp_path)


# verification


def test_alignment_scores_are_cosines_one_by_one(geolocator: Geolocator, tables: Tables) -> None:
    pool, scores = tables.pool, scores_of("alignment", geolocator, tables)
    for b, c in np.argwhere(pool.mask).tolist():
        place = geolocator.alignment.embed_places(pool.lat_lon[b, c])[0]
        gps = tables.embeddings.gps[b]
        cosine = float(gps @ place) / math.sqrt(float(gps @ gps) * float(place @ place))
        assert scores[b, c] == pytest.approx(cosine, abs=1e-5)
    assert np.ptp(scores[pool.mask]) > 0.01


def test_reward_scores_follow_from_states_one_by_one(geolocator: Geolocator, tables: Tables, head: RewardHead) -> None:
    pool, scores = tables.pool, scores_of("reward", geolocator, tables)
    with torch.inference_mode():
        for b, c in np.argwhere(pool.mask).tolist():
            memory = geolocator.memory(tables.embeddings[b : b + 1], tables.neighbors[b : b + 1])
            cell = torch.from_numpy(geolocator.tokenizer.encode(*pool.lat_lon[b, c : c + 1].T))
            last = geolocator.tokens.states(memory, cell)[0, -1]
            chances = head(last).softmax(-1).tolist()
            expected = math.log(sum(sum(chances[: r + 1]) for r in range(5)) / 5)
            assert scores[b, c] == pytest.approx(expected, abs=1e-4)
    assert np.ptp(scores[pool.mask]) > 0.01


def test_states_of_other_photos_change_nothing(geolocator: Geolocator, tables: Tables) -> None:
    def states(part: Tables) -> torch.Tensor:
        return geolocator.states(part.embeddings, part.neighbors, part.pool)

    whole = states(tables)
    assert whole.shape == (*tables.pool.mask.shape, TOKENS.d_model)
    for b in range(4):
        alone, kept = states(tables[b : b + 1]), torch.from_numpy(tables.pool.mask[b])
        torch.testing.assert_close(alone[0][kept], whole[b][kept], atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", [(), ("alignment",), ("reward",), ("alignment", "reward")], ids="+".join)
def test_every_set_of_verifiers_decides(geolocator: Geolocator, names: Sequence[str]) -> None:
    pixels = list(cut(draw_views("validation", 3, 1)))
    answers = geolocator(pixels, Options(neighbors=6, samples=5, verify=tuple(names)))
    assert len(answers) == 3 and all(answer.verified == bool(names) for answer in answers)
    for answer in answers:
        assert answer.error is None and answer.lat is not None and answer.lon is not None
        assert math.isfinite(answer.lat) and math.isfinite(answer.lon)
        assert answer.confidence is not None and all(0 <= chance <= 1 for chance in answer.confidence)


def test_weights_without_a_reward_head(
    weights: Path, index_folder: Path, tables: Tables, tmp_path: Path, one_line: OneLine
) -> None:
    bare = shutil.copytree(weights, tmp_path / weights.name, ignore=shutil.ignore_patterns("reward*"))
    result = Geolocator.from_pretrained(index_folder, bare)
    assert result.reward is None and scores_of("alignment", result, tables).any()
    with one_line("these weights have no reward head: train one with rag-geotoken train reward"):
        scores_of("reward", result, tables)


def test_a_reward_head_of_another_width_is_refused(
    weights: Path, index_folder: Path, tmp_path: Path, one_line: OneLine
) -> None:
    replacement = shutil.copytree(weights, tmp_path / weights.name)
    RewardHead(RewardConfig(TOKENS.d_model + 2, 16)).save_pretrained(replacement)
    with one_line("a reward head of width 26, a token model of width 24: train the head again"):
        Geolocator.from_pretrained(index_folder, replacement)


def test_scores_are_known_by_the_weights_they_follow_from(geolocator: Geolocator, weights: Path) -> None:
    def identity(name: str, models: Geolocator) -> dict[str, object]:
        [stage] = [each for each in road(Options(verify=(name,))) if each.name == f"verdicts-{name}"]
        return stage.settings(models, OPTIONS)

    assert geolocator.reward is not None
    assert geolocator.alignment.identity in identity("alignment", geolocator).values()
    assert fingerprint(geolocator.tokens, geolocator.reward) in identity("reward", geolocator).values()
    replacement = RewardHead(REWARD)
    changed = Geolocator(geolocator.alignment, geolocator.tokens, geolocator.index, geolocator.tuning, replacement)
    assert identity("reward", changed) != identity("reward", geolocator)
    assert identity("alignment", changed) == identity("alignment", geolocator)


# fingerprints


def test_a_fingerprint_follows_from_tensors_and_names(head: RewardHead) -> None:
    same = RewardHead(REWARD)
    same.load_state_dict(head.state_dict())
    assert fingerprint(same) == fingerprint(head) and len(fingerprint(head)) == 64
    assert fingerprint(head, head) != fingerprint(head)
    with torch.no_grad():
        same.fc1.bias[3] = torch.nextafter(same.fc1.bias[3], torch.tensor(9.0))
    assert fingerprint(same) != fingerprint(head)
    square = torch.nn.Linear(4, 4, bias=False)
    wide, named = torch.nn.Linear(2, 8, bias=False), torch.nn.ModuleDict({"other": square})
    with torch.no_grad():
        wide.weight.copy_(square.weight.view(8, 2))
    assert len({fingerprint(square), fingerprint(wide), fingerprint(named)}) == 3
