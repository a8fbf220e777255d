"""What a multimodal model is asked of a pool, and what its answers say. The model here is a function that we know."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rag_geotoken.mllm.request import Reply, Request
from rag_geotoken.types import MllmVerdict
from rag_geotoken.verifiers.questions import (
    NONE,
    SIMILAR,
    TURNS,
    Ask,
    ask_place,
    ask_pool,
    diverse_requests,
    free_request,
    zero_shot_request,
)
from rag_geotoken.verifiers.shortlist import Shortlist

PLACES = [{"lat": float(i), "lon": 10.0 * i, "place": f"Town {i}", "evidence": None} for i in range(6)]


def chosen_of(counts: Sequence[int]) -> tuple[Shortlist, NDArray[np.bool_]]:
    """Places that each stand for an entry of their own, and a last entry that none stands for; the pool's mask."""
    entries = np.array([[i if i < count else -1 for i in range(6)] for count in counts])
    stands = np.pad(entries, ((0, 0), (0, 1)), constant_values=-1)
    mask = stands >= 0
    mask[:, -1] = True
    return Shortlist(entries, stands, np.zeros((*entries.shape, 2))), mask


def asked_of_pool(
    photos: Sequence[bytes], counts: Sequence[int], shown: Sequence[Sequence[dict[str, Any]]], ask: Ask
) -> MllmVerdict:
    chosen, mask = chosen_of(counts)
    return ask_pool(photos, chosen, ask, shown=shown, near=[{}] * len(photos), mask=mask)


def lines(request: Request) -> dict[str, str]:
    """Letter -> town of a request."""
    text = request.parts[-1]
    assert isinstance(text, str)
    return {line[0]: line.rpartition(", ")[2] for line in text.splitlines() if "Town" in line}


def answer(request: Request, chances: dict[str, float]) -> Reply:
    """A reply that gives every town its chance, what is left to none of these."""
    towns = lines(request)
    given = [chances.get(towns.get(letter, ""), 1e-6) for letter in request.options]
    given[-1] = max(1 - sum(given[:-1]), 1e-6)
    logs = tuple(math.log(x / sum(given)) for x in given)
    return Reply((request.options[int(np.argmax(logs))],), logs, 100, 1, 0.5)


def test_a_sure_model_is_asked_twice_in_two_orders() -> None:
    asked: list[Request] = []

    def ask(requests: Sequence[Request]) -> list[Reply]:
        asked.extend(requests)
        return [answer(request, {"Town 4": 0.9}) for request in requests]

    found = asked_of_pool([b"photo"], [6], [PLACES], ask)
    assert found.status == ["ok"] and found.requests.tolist() == [2] and found.output_tokens.tolist() == [2]
    assert found.scores[0].argmax() == 4
    letters = [{town: letter for letter, town in lines(request).items()}["Town 4"] for request in asked]
    assert len(set(letters)) == 2  # another letter each time
    assert all(request.options == (*"ABCDEF", NONE) and request.max_tokens == 1 for request in asked)
    assert asked[0].parts[:2] == asked[1].parts[:2]  # instructions and photo first: a cache serves both


def test_a_model_that_likes_a_letter_is_asked_in_four_orders_and_says_nothing() -> None:
    def ask(requests: Sequence[Request]) -> list[Reply]:
        return [Reply(("A",), (math.log(0.94),) + (math.log(0.01),) * 6, 100, 1, 0.5) for _ in requests]

    found = asked_of_pool([b"photo"], [6], [PLACES], ask)
    assert found.requests.tolist() == [len(TURNS)] and found.output_tokens[0] <= 4
    # Four of six places had their turn at A; no other preference is left.
    assert sorted(np.round(found.scores[0, :6], 3))[2:] == pytest.approx(
        [np.mean(np.log([0.94, 0.01, 0.01, 0.01]))] * 4, abs=2e-3
    )


def test_orders_are_no_order_of_weights_and_differ_between_photos() -> None:
    asked: list[Request] = []

    def ask(requests: Sequence[Request]) -> list[Reply]:
        asked.extend(requests)
        return [answer(request, {"Town 1": 0.9}) for request in requests]

    photos = [bytes([i]) for i in range(20)]
    asked_of_pool(photos, [6] * 20, [PLACES] * 20, ask)
    first = [tuple(lines(request).values()) for request in asked[::2]]
    assert len(set(first)) > 15
    again: list[Request] = []
    asked_of_pool(
        photos,
        [6] * 20,
        [PLACES] * 20,
        lambda r: again.extend(r) or [answer(q, {"Town 1": 0.9}) for q in r],  # type: ignore[func-returns-value]
    )
    assert again == asked  # the same for the same photo: a journal knows it


def test_none_of_these_and_short_lists() -> None:
    def ask(requests: Sequence[Request]) -> list[Reply]:
        return [answer(request, {}) for request in requests]

    found = asked_of_pool([b"1", b"2", b"3"], [6, 2, 1], [PLACES, PLACES[:2], PLACES[:1]], ask)
    assert (found.scores[:, 6] > np.log(0.99)).all() and found.requests.tolist() == [2, 2, 1]
    assert (found.scores[2, 1:6] == 0).all()


def test_a_failure_is_a_status_and_no_score() -> None:
    def ask(requests: Sequence[Request]) -> list[Reply]:
        return [Reply(error="no server") if b"2" in r.parts else answer(r, {"Town 0": 0.9}) for r in requests]

    found = asked_of_pool([b"1", b"2"], [6, 6], [PLACES] * 2, ask)
    assert found.status == ["ok", "no server"] and not found.scores[1].any() and found.scores[0].argmax() == 0


def test_places_of_its_own() -> None:
    texts = [json.dumps({"latitude": 48.2, "longitude": 16.4, "confidence": 80}), "I cannot tell.", "Lat 95, lon 200"]

    def ask(requests: Sequence[Request]) -> list[Reply]:
        return [Reply((texts[i % 3],), (), 50, 20, 0.1) for i in range(len(requests))]

    prompts = [[zero_shot_request(photo)] for photo in (b"1", b"2", b"3")]
    found = ask_place(prompts, ask, 1, mask=np.ones((3, 2), bool))
    assert found.scores.shape == (3, 2) and not found.scores.any()
    assert found.status[0] == "ok" and found.lat_lon[0, 0].tolist() == [48.2, 16.4] and found.confidence[0, 0] == 0.8
    assert found.status[1:] == ["refused", "out of range"] and np.isnan(found.lat_lon[1:]).all()
    assert [raw[0] for raw in found.raw] == texts  # kept as they came


def test_several_answers_join_in_order() -> None:
    def ask(requests: Sequence[Request]) -> list[Reply]:
        return [
            Reply((f'{{"latitude": {i}, "longitude": 3, "confidence": 5}}', "no idea"), (), 50, 20, 0.1)
            for i in range(len(requests))
        ]

    near = np.arange(40, dtype=float).reshape(20, 2)
    prompts = diverse_requests(b"photo", near, near[::-1], n=2)
    assert len(prompts) == len(SIMILAR) and all(p.n == 2 and p.temperature > 0 for p in prompts)
    assert [str(p.parts[-1]).count(";") for p in prompts] == [0, 8, 18, 28]
    found = ask_place([prompts], ask, 2 * len(SIMILAR), mask=np.zeros((1, 1), bool))
    assert found.lat_lon[0, :4, 0].tolist() == [0, 1, 2, 3] and np.isnan(found.lat_lon[0, 4:]).all()
    assert found.status == ["ok"] and found.requests.tolist() == [4]


def test_hints_of_a_free_answer_are_in_no_order_of_weights() -> None:
    shown: list[dict[str, Any]] = PLACES
    first = {str(free_request(bytes([i]), shown, {}).parts[-1]).split("Town ")[1][0] for i in range(30)}
    assert len(first) > 3
