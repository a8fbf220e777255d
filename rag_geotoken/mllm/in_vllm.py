"""This module runs a multimodal model in this process through vLLM."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rag_geotoken.errors import GeoError
from rag_geotoken.mllm.chat import LISTED, SAMPLING, messages, with_log_probs
from rag_geotoken.mllm.request import Reply, Request
from rag_geotoken.mllm.start import ENVIRONMENT, IMAGES, on_cpu
from rag_geotoken.storage.model_folder import brief, find_model, model_identity

BATCH = 256


class VllmClient:
    """This client runs a model of a folder or of the hub by ``vllm.LLM``."""

    def __init__(self, name: str) -> None:
        """Load the model. Raises GeoError where vLLM is not installed, or does not take the model."""
        folder = find_model(name)
        settings: dict[str, Any] = {}
        if on_cpu():
            for variable, value in ENVIRONMENT.items():  # read when vLLM is imported
                os.environ.setdefault(variable, value)
            settings = {"dtype": "float32", "enforce_eager": True}
        try:
            from vllm import LLM
        except ImportError as error:
            raise GeoError(f"vLLM cannot be imported ({brief(error)}): install it, or serve the model") from None
        try:
            self.llm = LLM(model=str(folder), seed=0, limit_mm_per_prompt={"image": IMAGES}, **settings)
        except Exception as error:  # vLLM refuses models in many ways
            raise GeoError(f"vLLM cannot run {folder}: {brief(error)}") from None
        self.model = model_identity(folder)

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield (position, reply), a batch at a time."""
        for begin in range(0, len(requests), BATCH):
            yield from enumerate(self._replies(requests[begin : begin + BATCH]), begin)

    def _replies(self, requests: Sequence[Request]) -> list[Reply]:
        begun = time.perf_counter()
        try:
            outputs = self.llm.chat(list(map(messages, requests)), list(map(_sampling, requests)), use_tqdm=False)
        except Exception as error:  # one request too long or with a broken picture stops them all
            if len(requests) > 1:
                return [reply for request in requests for reply in self._replies([request])]
            return [Reply(error=f"vLLM refused the request: {brief(error)}")]
        seconds = (time.perf_counter() - begun) / len(requests)
        return [_read(request, output, seconds) for request, output in zip(requests, outputs, strict=True)]


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    structure = StructuredOutputsParams(choice=list(request.options)) if request.options else None
    if request.schema is not None:
        structure = StructuredOutputsParams(json=request.schema)
    return SamplingParams(
        n=request.n,
        temperature=request.temperature,
        top_p=1.0,
        seed=request.seed,
        max_tokens=request.max_tokens,
        logprobs=LISTED if request.options else None,
        structured_outputs=structure,
        **SAMPLING,
    )


def _read(request: Request, output: Any, seconds: float) -> Reply:
    first = output.outputs[0].logprobs[0] if request.options else {}
    reply = Reply(
        tuple(answer.text for answer in output.outputs),
        prompt_tokens=len(output.prompt_token_ids),
        output_tokens=sum(len(answer.token_ids) for answer in output.outputs),
        seconds=seconds,
    )
    return with_log_probs(reply, request.options, [(entry.decoded_token, entry.logprob) for entry in first.values()])
