"""This module keeps every answer of a model on disk as it arrives, so that a killed run asks nothing twice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from rag_geotoken.errors import GeoError
from rag_geotoken.mllm.request import Client, Reply, Request

# A request is known by the SHA-256 of its pictures, that of all the rest, and the model. Replies are JSON.
TABLE = """CREATE TABLE IF NOT EXISTS replies (
    image TEXT, prompt TEXT, model TEXT, failed BOOLEAN, reply TEXT, PRIMARY KEY (image, prompt, model))"""
FIND = "SELECT reply FROM replies WHERE (image, prompt, model) = (?, ?, ?)"
# A later failure, as of a second run beside this one, does not take the place of an answer.
KEEP = """INSERT INTO replies VALUES (?, ?, ?, ?, ?) ON CONFLICT (image, prompt, model) DO UPDATE
    SET failed = excluded.failed, reply = excluded.reply WHERE failed OR NOT excluded.failed"""


def ask_journaled(client: Client, requests: Sequence[Request], journal: Path, again: bool = False) -> list[Reply]:
    """Return the replies to all requests: those in the journal as they are, the rest asked and kept as they come.

    Requests that are equal are asked once. Only ``seconds`` tells a resumed run's replies from an uninterrupted one's.
    The journal is an SQLite database, made where missing. again: Ask again what failed before; otherwise a failure in
    the journal stands. Raises GeoError where the journal cannot be read or written, or is none.
    """
    keys = [(request.image_hash(), request.prompt_hash(), client.model) for request in requests]
    with _opened(journal) as database:
        rows = {key: database.execute(FIND, key).fetchone() for key in keys}
        replies = {key: _reply(*row) for key, row in rows.items() if row}
        missing = {
            key: request
            for key, request in zip(keys, requests, strict=True)
            if key not in replies or (again and replies[key].error is not None)
        }
        missing_keys = list(missing)
        for position, reply in client.ask(list(missing.values())) if missing else ():
            key = missing_keys[position]
            database.execute(KEEP, (*key, reply.error is not None, json.dumps(asdict(reply), allow_nan=False)))
            replies[key] = reply
    return [replies[key] for key in keys]


@contextmanager
def _opened(journal: Path) -> Iterator[sqlite3.Connection]:
    """Open the journal's database, where every statement takes effect at once; its errors become GeoError."""
    try:
        with closing(sqlite3.connect(journal, isolation_level=None)) as database:
            # Without waiting for the disk: a killed process loses nothing, a power cut the last few answers.
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(TABLE)
            yield database
    except sqlite3.Error as error:
        raise GeoError(f"cannot use the journal {journal}: {error}") from None


def _reply(text: str) -> Reply:
    try:
        fields = json.loads(text)
        return Reply(**fields | {"texts": tuple(fields["texts"]), "log_probs": tuple(fields["log_probs"])})
    except (ValueError, TypeError, KeyError):
        raise GeoError("an answer in the journal of a multimodal model is broken: delete the journal") from None
