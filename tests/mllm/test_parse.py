"""Answers read out of whatever a model says."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_geotoken.mllm.parse import (
    LONGEST,
    OK,
    OUT_OF_RANGE,
    REFUSED,
    UNPARSABLE,
    Answer,
    parse_place,
)

REPLIES = [json.loads(line) for line in (Path(__file__).parents[1] / "data" / "replies.jsonl").open(encoding="utf-8")]


@pytest.mark.parametrize("reply", REPLIES, ids=[f"{i}-{reply['text'][:24]!a}" for i, reply in enumerate(REPLIES)])
def test_every_reply_of_the_corpus(reply: dict[str, Any]) -> None:
    answer = parse_place(reply["text"])
    assert answer.status == reply["status"]
    for name in ("lat", "lon", "confidence"):
        assert getattr(answer, name) == (pytest.approx(reply[name], abs=1e-9) if name in reply else None), name


def test_the_corpus_is_broad() -> None:
    assert len(REPLIES) >= 200 and len({reply["text"] for reply in REPLIES}) == len(REPLIES)
    statuses = [reply["status"] for reply in REPLIES]
    assert {status: statuses.count(status) >= 10 for status in (OK, UNPARSABLE, OUT_OF_RANGE, REFUSED)} == {
        status: True for status in statuses
    }


def whole(answer: Answer) -> bool:
    if answer.status != OK:
        return answer.lat is None and answer.lon is None and answer.confidence is None
    assert answer.lat is not None and answer.lon is not None
    return abs(answer.lat) <= 90 and abs(answer.lon) <= 180 and 0 <= (answer.confidence or 0) <= 1


@given(
    st.text(alphabet=st.sampled_from("NSEW0123456789.,-+°'\"{}[]:latonge \n\\eE%"), max_size=200)
    | st.text(max_size=200)
)
def test_anything_has_an_outcome(text: str) -> None:
    assert whole(parse_place(text))


KEYS = st.sampled_from(["lat", "lon", "confidence", "location", "coordinates", "a"])
LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=9)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


@given(VALUES)
def test_any_json_has_an_outcome(value: Any) -> None:
    assert whole(parse_place(json.dumps(value)))


@given(st.floats(-90, 90), st.floats(-180, 180), st.integers(0, 100))
def test_what_the_schema_asks_for_is_read_exactly(lat: float, lon: float, confidence: int) -> None:
    answer = parse_place(json.dumps({"latitude": lat, "longitude": lon, "confidence": confidence}))
    if lat == lon == 0 and confidence == 0:
        assert answer.status == REFUSED
    else:
        assert answer == Answer(OK, lat, lon, confidence / 100)


@given(st.floats(-89.9, 89.9), st.floats(-179.9, 179.9))
def test_degrees_minutes_seconds(lat: float, lon: float) -> None:
    def written(value: float, sides: str) -> str:
        seconds = round(abs(value) * 3600)
        return f"{seconds // 3600}°{seconds // 60 % 60}'{seconds % 60}\"{sides[value < 0]}"

    answer = parse_place(f"{written(lat, 'NS')} {written(lon, 'EW')}")
    if (round(lat * 3600), round(lon * 3600)) != (0, 0):
        assert answer.lat == pytest.approx(lat, abs=1 / 3600) and answer.lon == pytest.approx(lon, abs=1 / 3600)


@pytest.mark.parametrize(
    "piece",
    ["{", "[", "48.2 ", "lat: - ", '{"a":', "1,1,", "48°1'", "\\", '"', "ne ", "kann x ", " ", "n ", "lat,lon", "1"],
)
def test_long_answers_take_no_longer_a_letter(piece: str) -> None:
    def seconds(letters: int) -> float:
        text, begun = piece * (letters // len(piece)), time.process_time()
        assert whole(parse_place(text))
        return time.process_time() - begun

    seconds(1000)
    assert seconds(LONGEST) < 40 * seconds(LONGEST // 10) + 0.2  # 100 times if it were quadratic
    assert seconds(10 * LONGEST) < 3


def test_the_end_of_a_huge_answer_counts() -> None:
    assert parse_place("word " * 300_000 + "48.21, 16.37") == Answer(OK, 48.21, 16.37)
    assert math.isclose(parse_place('{"lat": 1.5, "lon": 2.5}' * 9000).lat or 0, 1.5)
