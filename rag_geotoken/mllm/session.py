"""A multimodal model that is there, and where its answers are kept."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path

from rag_geotoken.mllm import Client, Reply, Request, open_client
from rag_geotoken.mllm.journal import ask_journaled

JOURNAL = "mllm-journal.sqlite"


class MllmSession:
    """Asks a client. In a folder, every answer is kept as soon as it is there, and nothing is asked twice."""

    def __init__(self, client: Client, resume: bool = False) -> None:
        """resume: ask again what failed before, where answers are kept."""
        self.client, self.resume = client, resume
        self.journal: Path | None = None

    @classmethod
    def open(
        cls, where: str, model: str | None = None, concurrent: int | None = None, resume: bool = False
    ) -> MllmSession:
        """The model at an address or in a folder, as :func:`.open_client` takes it. Raises GeoError as that does."""
        return cls(open_client(where, model, concurrent), resume)

    def kept_in(self, folder: Path) -> MllmSession:
        """The same with its answers kept in a folder."""
        session = copy(self)
        session.journal = folder / JOURNAL
        return session

    @property
    def model(self) -> str:
        """What answers follow from."""
        return self.client.model

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """A reply to every request, in order; a failure is a reply too."""
        if self.journal:
            return ask_journaled(self.client, requests, self.journal, again=self.resume)
        replies = dict(self.client.ask(requests))
        return [replies[i] for i in range(len(requests))]
