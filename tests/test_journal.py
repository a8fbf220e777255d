"""Nothing is asked twice, whenever a run is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import OneLine

from rag_geotoken.mllm import Reply, Request
from rag_geotoken.mllm.journal import ask_journaled, read_journal

REQUESTS = [Request((f"question {i}", bytes([i])), max_tokens=5) for i in range(10)]


class Echo:
    """Answers with the question's number; refuses some positions while `failing`."""

    def __init__(self, model: str = "echo", failing: Sequence[str] = (), stop_after: int = 99) -> None:
        self.model, self.failing, self.stop_after = model, failing, stop_after
        self.asked: list[str] = []

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for position in reversed(range(len(requests))):
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            text = str(requests[position].parts[0])
            self.asked.append(text)
            if text in self.failing:
                yield position, Reply(error="no answer")
            else:
                yield position, Reply((f"answer to {text}",), (-0.125,), 3, 1, 0.5)


def test_finished_answers_are_not_asked_again(tmp_path: Path) -> None:
    journal = tmp_path / "new" / "journal.jsonl"
    whole = ask_journaled(Echo(), REQUESTS, tmp_path / "whole.jsonl")
    assert [reply.texts for reply in whole] == [(f"answer to question {i}",) for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        ask_journaled(Echo(stop_after=4), REQUESTS, journal)
    assert len(read_journal(journal)) == 4
    second, done = Echo(), []
    assert ask_journaled(second, REQUESTS, journal, advance=done.append) == whole
    assert second.asked == [f"question {i}" for i in reversed(range(6))] and done == [4] + [1] * 6
    third = Echo()
    assert ask_journaled(third, REQUESTS, journal) == whole and third.asked == []


def test_what_is_known_is_kept_in_step_without_reading_the_journal_again(tmp_path: Path) -> None:
    journal, client = tmp_path / "journal.jsonl", Echo()
    known = read_journal(journal)
    for at in (slice(0, 6), slice(4, 10)):
        ask_journaled(client, REQUESTS[at], journal, known=known)
    assert len(client.asked) == 10 and known == read_journal(journal)
    journal.unlink()
    assert ask_journaled(client, REQUESTS, journal, known=known) and len(client.asked) == 10


@pytest.mark.parametrize("cut", [1, 2, 30, 150])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    journal = tmp_path / "journal.jsonl"
    whole = ask_journaled(Echo(), REQUESTS, journal)
    written = journal.read_bytes()
    os.truncate(journal, len(written) - cut)
    again = Echo()
    assert ask_journaled(again, REQUESTS, journal) == whole and len(again.asked) == 1
    assert sorted(journal.read_bytes().splitlines()) == sorted(written.splitlines())


def test_broken_lines_are_passed_over(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    whole = ask_journaled(Echo(), REQUESTS, journal)
    lines = journal.read_bytes().splitlines()
    lines[2], lines[5] = b"\x00" * 40, lines[5].replace(b'"texts"', b'"words"')
    lines[7:7] = [b"", b"null", b"[]", b"{}", b"[" * 100_000, b'{"image": 1}', lines[6]]
    journal.write_bytes(b"\n".join(lines) + b"\n")
    again = Echo()
    assert ask_journaled(again, REQUESTS, journal) == whole and len(again.asked) == 2


def test_failures_stand_until_asked_again(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    failing = ["question 3", "question 7"]
    first = ask_journaled(Echo(failing=failing), REQUESTS, journal)
    assert [i for i, reply in enumerate(first) if reply.error] == [3, 7]
    second = Echo()
    assert ask_journaled(second, REQUESTS, journal) == first and second.asked == []
    third = Echo(failing=["question 7"])
    replies = ask_journaled(third, REQUESTS, journal, again=True)
    assert sorted(third.asked) == failing and replies[3].error is None and replies[7].error == "no answer"
    assert ask_journaled(Echo(), REQUESTS, journal) == replies


def test_an_answer_outlives_a_later_failure(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    whole = ask_journaled(Echo(), REQUESTS, journal)
    line = json.loads(journal.read_bytes().splitlines()[0])
    with journal.open("a") as file:
        file.write(json.dumps({**line, "texts": [], "error": "later"}) + "\n")
    assert ask_journaled(Echo(), REQUESTS, journal) == whole


def test_equal_requests_are_asked_once(tmp_path: Path) -> None:
    client, done = Echo(), []
    replies = ask_journaled(client, [REQUESTS[0], REQUESTS[1], REQUESTS[0]], tmp_path / "j.jsonl", advance=done.append)
    assert len(client.asked) == 2 and replies[0] == replies[2] != replies[1] and sum(done) == 3


def test_whatever_differs_is_another_request(tmp_path: Path) -> None:
    one = Request(("a", b"1", "b"), max_tokens=5)
    others = [
        replace(one, parts=("a", b"2", "b")),
        replace(one, parts=("a", "b", b"1")),
        replace(one, parts=("ab", b"1")),
        replace(one, parts=("a", b"1", "c")),
        replace(one, options=("A", "B")),
        replace(one, options=("B", "A")),
        replace(one, schema={"type": "object"}),
        replace(one, schema={}),
        replace(one, max_tokens=6),
        replace(one, temperature=0.5),
        replace(one, n=2),
        replace(one, seed=1),
    ]
    keys = {(request.image_hash(), request.prompt_hash()) for request in [one, *others]}
    assert len(keys) == len(others) + 1
    assert others[0].prompt_hash() == one.prompt_hash() and others[3].image_hash() == one.image_hash()
    assert replace(one, temperature=0).prompt_hash() == one.prompt_hash()
    client = Echo("other")
    journal = tmp_path / "journal.jsonl"
    ask_journaled(Echo(), REQUESTS, journal)
    ask_journaled(client, REQUESTS, journal)
    assert len(client.asked) == 10  # another model's answers are not this one's


KILLED = """
import sys, time
from rag_geotoken.mllm import Reply, Request
from rag_geotoken.mllm.journal import ask_journaled

class Slow:
    model = "echo"
    def ask(self, requests):
        for i, request in enumerate(requests):
            yield i, Reply((request.parts[0] * 2000,))
            time.sleep(0.002)

ask_journaled(Slow(), [Request((f"question {i}",)) for i in range(5000)], sys.argv[1])
"""


def test_killed_outright(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(journal)])
    begun = time.monotonic()
    while not journal.exists() or journal.stat().st_size < 1_000_000:
        assert process.poll() is None and time.monotonic() - begun < 60
    process.kill()
    process.wait()
    kept = read_journal(journal)
    assert 0 < len(kept) < 5000 and all(len(reply.texts[0]) >= 2000 * len("question 0") for reply in kept.values())


def test_a_journal_that_cannot_be_written(tmp_path: Path, one_line: OneLine) -> None:
    (tmp_path / "file").touch()
    client = Echo()
    for path in (tmp_path, tmp_path / "file" / "journal.jsonl"):
        with one_line("cannot read the journal .*: (Is|Not) a directory$"):
            ask_journaled(client, REQUESTS, path)
    with one_line("cannot write the journal /proc/journal.jsonl: "):
        ask_journaled(client, REQUESTS, "/proc/journal.jsonl")
    assert client.asked == []


@pytest.mark.parametrize(
    "wrong",
    [{"options": ("A", "A")}, {"options": ("AB",)}, {"parts": ()}, {"n": 0}, {"max_tokens": 0}, {"temperature": -1.0}],
)
def test_requests_that_contradict_themselves(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        replace(REQUESTS[0], **wrong)
    with pytest.raises(ValueError, match="not both"):
        replace(REQUESTS[0], options=("A",), schema={})
