"""This package asks multimodal models for verdicts: requests, ways to run a model, and how answers are read."""

from __future__ import annotations

from rag_geotoken.errors import GeoError
from rag_geotoken.mllm.request import Client, Reply, Request
from rag_geotoken.storage.weights import EARTH

__all__ = ["Client", "Reply", "Request", "open_client"]

IN_PROCESS = "vllm:"
EMBEDDED_FOLDER = EARTH.with_name("earth-verifier")  # the small model that ships, of the demo's satellite views


def open_client(where: str, model: str | None = None, concurrent: int | None = None) -> Client:
    """Open the model at an address or in a folder, after checking that it exists.

    where: ``embedded`` is the small model that ships, ``http://HOST:PORT/v1`` an OpenAI-compatible server, ``vllm:DIR``
    runs vLLM in this process, anything else is a folder or a hub's name for transformers in this process. model: Its
    name on a server; None where the server has only one. concurrent: Requests to a server at a time, 16 unless given.
    Raises GeoError, in one line, when the server is down or has no such model, or the model cannot be had or used.
    """
    if where == "embedded":
        where = str(EMBEDDED_FOLDER)
    if where.startswith(("http://", "https://")):
        from rag_geotoken.mllm.server import ServerClient

        return ServerClient(where, model, concurrent)
    if model is not None:
        raise GeoError(f"--mllm-model names a model of a server, and {where} is none: leave it out")
    if where.startswith(IN_PROCESS):
        from rag_geotoken.mllm.in_vllm import VllmClient

        return VllmClient(where.removeprefix(IN_PROCESS))
    from rag_geotoken.mllm.in_transformers import TransformersClient

    return TransformersClient(where)
