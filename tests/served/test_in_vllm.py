"""The model in process through vLLM, in vLLM's own environment: `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
from ask_in_vllm import requests
from tiny import VLLM_PYTHON
from tiny_llava import SCHEMA

from rag_geotoken.mllm import Reply
from rag_geotoken.mllm.in_transformers import TransformersClient

SUPPORT = Path(__file__).parents[1] / "support"


def test_in_process_as_through_transformers(llava: Path, tmp_path: Path) -> None:
    assert VLLM_PYTHON is not None
    paths = os.pathsep.join(map(str, (SUPPORT.parents[1], SUPPORT)))
    done = subprocess.run(
        [VLLM_PYTHON, str(SUPPORT / "ask_in_vllm.py"), str(llava), str(tmp_path / "replies.json")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "replies.json").read_text())
    replies = [Reply(tuple(reply.pop("texts")), tuple(reply.pop("log_probs")), **reply) for reply in told["replies"]]
    local = TransformersClient(llava)
    expected = dict(local.ask(requests()[:12]))
    assert told["model"] == local.model
    for position in range(12):
        assert replies[position].texts == expected[position].texts
        np.testing.assert_allclose(replies[position].log_probs, expected[position].log_probs, atol=1e-3)
        assert (replies[position].prompt_tokens, replies[position].output_tokens) == (
            expected[position].prompt_tokens,
            1,
        )
    long, schema, free, same = replies[12:]
    assert long.error is not None and long.error.startswith("vLLM refused the request") and not long.texts
    assert len(schema.texts) == 3 and all(text.startswith("{") for text in schema.texts)
    whole = [text for text in schema.texts if text.rstrip().endswith("}")]
    assert all(set(json.loads(text)) == set(SCHEMA["properties"]) for text in whole)  # type: ignore[call-overload]
    assert free.texts == same.texts and free.output_tokens <= 8 and free.error is None
