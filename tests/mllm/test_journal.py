"""Nothing is asked twice, whenever a run is killed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import OneLine, kept

from rag_geotoken.mllm import Reply, Request
from rag_geotoken.mllm.journal import ask_journaled

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
    journal = tmp_path / "journal.sqlite"
    whole = ask_journaled(Echo(), REQUESTS, tmp_path / "whole.sqlite")
    assert [reply.texts for reply in whole] == [(f"answer to question {i}",) for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        ask_journaled(Echo(stop_after=4), REQUESTS, journal)
    assert len(kept(journal)) == 4
    second = Echo()
    assert ask_journaled(second, REQUESTS, journal) == whole
    assert second.asked == [f"question {i}" for i in reversed(range(6))]
    third = Echo()
    assert ask_journaled(third, REQUESTS, journal) == whole and third.asked == []


@pytest.mark.parametrize("cut", [1, 2, 30, 150])
def test_a_torn_last_write_costs_the_last_answer_alone(tmp_path: Path, cut: int) -> None:
    killed = tmp_path / "killed"

    class Killed(Echo):
        def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            yield from super().ask(requests)
            shutil.copytree(tmp_path, killed)  # as it stands there if the process ends here

    whole = ask_journaled(Killed(), REQUESTS, tmp_path / "journal.sqlite")
    log = killed / "journal.sqlite-wal"
    os.truncate(log, log.stat().st_size - cut)
    again = Echo()
    assert ask_journaled(again, REQUESTS, killed / "journal.sqlite") == whole and again.asked == ["question 0"]


def test_failures_stand_until_asked_again(tmp_path: Path) -> None:
    journal = tmp_path / "journal.sqlite"
    failing = ["question 3", "question 7"]
    first = ask_journaled(Echo(failing=failing), REQUESTS, journal)
    assert [i for i, reply in enumerate(first) if reply.error] == [3, 7]
    second = Echo()
    assert ask_journaled(second, REQUESTS, journal) == first and second.asked == []
    third = Echo(failing=["question 7"])
    replies = ask_journaled(third, REQUESTS, journal, again=True)
    assert sorted(third.asked) == failing and replies[3].error is None and replies[7].error == "no answer"
    assert ask_journaled(Echo(), REQUESTS, journal) == replies


def test_an_answer_outlives_the_failure_of_a_run_beside_it(tmp_path: Path) -> None:
    journal = tmp_path / "journal.sqlite"

    class Beside(Echo):
        def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            ask_journaled(Echo(), REQUESTS, journal)
            yield from super().ask(requests)

    failing = Beside(failing=["question 3"])
    assert ask_journaled(failing, REQUESTS, journal)[3].error and len(failing.asked) == 10
    assert all(reply["error"] is None for reply in kept(journal)) and len(kept(journal)) == 10


def test_equal_requests_are_asked_once(tmp_path: Path) -> None:
    client = Echo()
    replies = ask_journaled(client, [REQUESTS[0], REQUESTS[1], REQUESTS[0]], tmp_path / "journal.sqlite")
    assert len(client.asked) == 2 and replies[0] == replies[2] != replies[1]


def test_whatever_differs_is_another_request(tmp_path: Path) -> None:
    one = Request(("a", b"1", "b"), max_tokens=5)
    others = [
        replace(one, parts=("a", b"2", "b")),
        replace(one, parts=("a", "b", b"1")),
        replace(one, parts=("ab", b"1")),
        replace(one, parts=("a", b"1", "c")),
        replace(one, options=("A", "B"), max_tokens=1),
        replace(one, options=("B", "A"), max_tokens=1),
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
    journal = tmp_path / "journal.sqlite"
    ask_journaled(Echo(), REQUESTS, journal)
    ask_journaled(client, REQUESTS, journal)
    assert len(client.asked) == 10  # another model's answers are not this one's


KILLED = """
import sys, time
from pathlib import Path
from rag_geotoken.mllm import Reply, Request
from rag_geotoken.mllm.journal import ask_journaled

class Slow:
    model = "echo"
    def ask(self, requests):
        for i, request in enumerate(requests):
            print(i, flush=True)  # so many are kept
            yield i, Reply((request.parts[0] * 2000,))
            time.sleep(0.002)

ask_journaled(Slow(), [Request((f"question {i}",)) for i in range(5000)], Path(sys.argv[1]))
"""


def test_killed_outright(tmp_path: Path) -> None:
    journal = tmp_path / "journal.sqlite"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(journal)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    done = [next(process.stdout) for _ in range(300)]
    process.kill()
    done += process.stdout.readlines()
    process.wait()
    texts = [reply["texts"][0] for reply in kept(journal)]
    assert len(done) - 1 <= len(texts) <= len(done) < 5000
    assert all(len(text) >= 2000 * len("question 0") for text in texts)


def test_a_journal_that_cannot_be_used(tmp_path: Path, one_line: OneLine) -> None:
    wrong = tmp_path / "journal.sqlite"
    wrong.write_text("no database\n" * 99)
    client = Echo()
    with one_line("cannot use the journal .*/journal.sqlite: file is not a database$"):
        ask_journaled(client, REQUESTS, wrong)
    for path in (tmp_path, wrong / "journal.sqlite", Path("/proc/journal.sqlite")):
        with one_line("cannot use the journal .*: unable to open database file$"):
            ask_journaled(client, REQUESTS, path)
    assert client.asked == [] and wrong.read_text() == "no database\n" * 99


@pytest.mark.parametrize("broken", ["no JSON", "[]", "{}", '{"texts": 3}', '{"texts": [], "log_probs": [], "more": 1}'])
def test_a_broken_answer_in_a_journal_is_named(broken: str, tmp_path: Path, one_line: OneLine) -> None:
    journal = tmp_path / "journal.sqlite"
    ask_journaled(Echo(), REQUESTS, journal)
    with sqlite3.connect(journal) as database:
        database.execute("UPDATE replies SET reply = ?", (broken,))
    with one_line("an answer in the journal of a multimodal model is broken: delete the journal$"):
        ask_journaled(Echo(), REQUESTS, journal)


@pytest.mark.parametrize(
    "wrong",
    [{"options": ("A", "A")}, {"options": ("AB",)}, {"parts": ()}, {"n": 0}, {"max_tokens": 0}, {"temperature": -1.0}],
)
def test_requests_that_contradict_themselves(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        replace(REQUESTS[0], **wrong)
    with pytest.raises(ValueError, match="not both"):
        replace(REQUESTS[0], options=("A",), schema={})
