"""This module joins a multimodal model with the folder that its answers are kept in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rag_geotoken.mllm import Client, Reply, Request, open_client
from rag_geotoken.mllm.journal import ask_journaled

JOURNAL = "mllm-journal.sqlite"


class MllmSession:
    """This class asks a client; in a folder, every answer is kept as soon as it comes, and nothing is asked twice.

    resume: Ask again what failed before, where answers are kept.
    """

    def __init__(self, client: Client, resume: bool = False, journal: Path | None = None) -> None:
        self.client, self.resume, self.journal = client, resume, journal

    @classmethod
    def open(
        cls, where: str, model: str | None = None, concurrent: int | None = None, resume: bool = False
    ) -> MllmSession:
        """Open the model at an address or in a folder, as :func:`.open_client` does. Raises GeoError as that does."""
        return cls(open_client(where, model, concurrent), resume)

    def kept_in(self, folder: Path) -> MllmSession:
        """Return a session of this client whose answers are kept in a folder."""
        return MllmSession(self.client, self.resume, folder / JOURNAL)

    @property
    def model(self) -> str:
        """Return the identity of the model, which answers follow from."""
        return self.client.model

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Return a reply to every request, in order; a failure is a reply too."""
        if self.journal:
            return ask_journaled(self.client, requests, self.journal, again=self.resume)
        replies = dict(self.client.ask(requests))
        return [replies[i] for i in range(len(requests))]
