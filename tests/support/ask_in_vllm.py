"""Run by test_in_vllm.py in the server's environment: asks vLLM in process and writes its replies."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from tiny_llava import SCHEMA, sample_request

from rag_geotoken.mllm import Request, open_client


def requests() -> list[Request]:
    """Options, one too long, a schema, and samples."""
    options = [sample_request(seed) for seed in range(12)]
    long = replace(options[0], parts=(*options[0].parts, "x" * 50_000))
    schema = sample_request(3, schema=SCHEMA, max_tokens=150, temperature=0.5, n=3)
    return [*options, long, schema, sample_request(4, max_tokens=8), sample_request(4, max_tokens=8)]


if __name__ == "__main__":  # vLLM may start processes that import this file
    client = open_client(f"vllm:{sys.argv[1]}")
    replies = dict(client.ask(requests()))
    told = {"model": client.model, "replies": [asdict(replies[i]) for i in range(len(replies))]}
    Path(sys.argv[2]).write_text(json.dumps(told))
