"""Every answer of a model on disk as it arrives: nothing is asked twice, whenever a run is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag_geotoken.errors import GeoError
from rag_geotoken.mllm.request import Client, Reply, Request

Key = tuple[str, str, str]  # SHA-256 of the pictures, SHA-256 of the rest, model


def ask_journaled(
    client: Client,
    requests: Sequence[Request],
    journal: Path | str,
    again: bool = False,
    advance: Callable[[int], None] = lambda n: None,
    known: dict[Key, Reply] | None = None,
) -> list[Reply]:
    """Answers to all requests: those in the journal as they stand there, the rest asked and written as they come.

    Requests that are equal are asked once. Only ``seconds`` tells a resumed run's replies from an uninterrupted one's.

    Args:
        client: The model.
        requests: In the order in which replies are given back.
        journal: A file of JSON lines, made where missing; a last line that was cut short is cut off.
        again: Ask again what failed before. Otherwise a failure in the journal stands.
        advance: Told how many more requests are done.
        known: What :func:`read_journal` gave, kept in step from call to call; read anew where it is not given.

    Raises:
        GeoError: the journal cannot be written.
    """
    keys = [(request.image_hash(), request.prompt_hash(), client.model) for request in requests]
    replies = read_journal(journal) if known is None else known
    missing = {
        key: request
        for key, request in zip(keys, requests, strict=True)
        if key not in replies or (again and replies[key].error is not None)
    }
    advance(sum(key not in missing for key in keys))
    if missing:
        todo = list(missing)
        copies = {key: 0 for key in todo}
        for key in keys:
            if key in copies:
                copies[key] += 1
        with _Writer(Path(journal)) as writer:
            for position, reply in client.ask(list(missing.values())):
                writer.write(todo[position], reply)
                replies[todo[position]] = reply
                advance(copies[todo[position]])
    return [replies[key] for key in keys]


def read_journal(journal: Path | str) -> dict[Key, Reply]:
    """The last answer to each request, or the last failure where there is no answer. Broken lines are passed over."""
    try:
        lines = Path(journal).read_bytes().split(b"\n")[:-1]  # what follows the last line end was cut short
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise GeoError(f"cannot read the journal {journal}: {error.strerror}") from None
    replies: dict[Key, Reply] = {}
    for line in lines:
        entry = _parse(line)
        if entry and (entry[1].error is None or replies.get(entry[0], entry[1]).error is not None):
            replies[entry[0]] = entry[1]
    return replies


class _Writer:
    """Appends whole lines, each in one system call, so that a kill leaves at most the last one torn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Writer:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise GeoError(f"cannot write the journal {self.path}: {error.strerror}") from None
        _cut_torn_line(self.file)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def write(self, key: Key, reply: Reply) -> None:
        image, prompt, model = key
        told = {"image": image, "prompt": prompt, "model": model, **asdict(reply)}
        line = memoryview(json.dumps(told, allow_nan=False).encode() + b"\n")
        try:
            while line:  # a nearly full disk takes a part
                line = line[os.write(self.file, line) :]
        except OSError as error:
            raise GeoError(f"cannot write the journal {self.path}: {error.strerror}") from None


def _cut_torn_line(file: int) -> None:
    end = os.fstat(file).st_size
    at = end
    while at > 0:
        begin = max(0, at - 65536)
        last = os.pread(file, at - begin, begin).rfind(b"\n")
        if last >= 0:
            at = begin + last + 1
            break
        at = begin
    if at < end:
        os.ftruncate(file, at)


def _parse(line: bytes) -> tuple[Key, Reply] | None:
    """The entry in a line; None where it is broken."""
    try:
        told: dict[str, Any] = json.loads(line)
        key = told.pop("image"), told.pop("prompt"), told.pop("model")
        texts, log_probs = told.pop("texts"), told.pop("log_probs")
        reply = Reply(tuple(map(str, texts)), tuple(map(float, log_probs)), **told)
        return key, reply
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
