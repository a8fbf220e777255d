"""This module asks a multimodal model behind an OpenAI-compatible server, such as vLLM's."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import openai
from anyio.from_thread import start_blocking_portal

from rag_geotoken.errors import GeoError
from rag_geotoken.mllm.chat import LISTED, SAMPLING, messages, with_log_probs
from rag_geotoken.mllm.request import Reply, Request
from rag_geotoken.photos.pictures import UNPRINTABLE
from rag_geotoken.storage.model_folder import brief

KEY = "RAG_GEOTOKEN_MLLM_KEY"  # not OpenAI's own variable: that key is not for just any server
CONCURRENT = 16
RETRIES = 4  # after about 0.5, 1, 2 and 4 s
REQUEST_S = 120.0
CHECK_S = 10.0


class ServerClient:
    """This client sends requests to a server, several at a time, and repeats those that failed for a passing reason.

    That is a lost connection, a time-out and the statuses 408, 409, 429 and 5xx. Once no connection can be made any
    more, the rest is not tried: each gets an error, and the journal knows what to ask when the server is back.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        concurrent: int | None = None,
        retries: int = RETRIES,
        request_s: float = REQUEST_S,
        total_s: float = math.inf,
    ) -> None:
        """Ask the server at a URL such as http://127.0.0.1:8000/v1 which models it has.

        model: The name under which it is served; None where there is only one. concurrent: Requests at a time,
        ``CONCURRENT`` unless given. retries: Further tries of a request. request_s, total_s: Seconds that one try, and
        all of one ``ask``, may take. Raises GeoError when the server does not answer, or has no such model.
        """
        self.url = url.rstrip("/") if urlsplit(url).path.strip("/") else url.rstrip("/") + "/v1"
        self.concurrent, self.retries = concurrent or CONCURRENT, retries
        self.request_s, self.total_s = request_s, total_s
        self.model = self._served(model)

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield (position, reply) as they come. A caller that stops early ends the requests under way."""
        replies: SimpleQueue[tuple[int, Reply] | None] = SimpleQueue()
        waiting, gone, deadline = iter(enumerate(requests)), asyncio.Event(), time.monotonic() + self.total_s

        async def work(client: openai.AsyncOpenAI) -> None:
            for position, request in waiting:
                replies.put((position, await self._reply(client, request, deadline, gone)))

        async def work_all() -> None:
            settings = self._settings(openai.DefaultAsyncHttpxClient, self.request_s, self.retries)
            async with openai.AsyncOpenAI(**settings) as client, asyncio.TaskGroup() as tasks:
                for _ in range(self.concurrent):
                    tasks.create_task(work(client))

        with start_blocking_portal() as portal:  # in a thread, so that it works within a notebook's own loop too
            working = portal.start_task_soon(work_all)
            working.add_done_callback(lambda _: replies.put(None))
            yield from iter(replies.get, None)
            working.result()  # raises what went wrong

    async def _reply(self, client: openai.AsyncOpenAI, request: Request, deadline: float, gone: asyncio.Event) -> Reply:
        begun, gone_error = time.perf_counter(), f"the server at {self.url} was gone"
        if gone.is_set():
            return Reply(error=gone_error)
        try:
            async with asyncio.timeout_at(deadline):
                completion = await client.chat.completions.create(**self._body(request))
            return _read(request, completion, time.perf_counter() - begun)
        except TimeoutError:
            error = f"no time was left of the {self.total_s:g} s for all requests"
        except openai.APITimeoutError:
            error = f"the server did not answer within {self.request_s:g} s"
        except openai.APIConnectionError:
            gone.set()
            error = gone_error
        except openai.APIStatusError as status:
            error = f"the server answered {status.status_code}: {_one_line(status)}"
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError) as invalid:
            error = f"the server's answer cannot be read: {_one_line(invalid)}"
        return Reply(seconds=time.perf_counter() - begun, error=error)

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages(request),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": 1.0,
            "n": request.n,
            "seed": request.seed,
            "extra_body": dict(SAMPLING),
        }
        if request.options:
            body |= {"logprobs": True, "top_logprobs": LISTED}
            body["extra_body"]["structured_outputs"] = {"choice": list(request.options)}
        if request.schema is not None:
            schema = {"name": "answer", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _settings(self, http_client: type[Any], timeout: float, retries: int) -> dict[str, Any]:
        """Return an openai client's settings: pictures are redirected nowhere, and no local server needs a proxy."""
        is_local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        return {
            "http_client": http_client(follow_redirects=False, trust_env=not is_local),
            "base_url": self.url,
            "api_key": os.environ.get(KEY) or "none",
            "timeout": timeout,
            "max_retries": retries,
        }

    def _served(self, model: str | None) -> str:
        """Return the model's name if the server has it, or the only one it has."""
        try:
            with openai.OpenAI(**self._settings(openai.DefaultHttpxClient, CHECK_S, 1)) as client:
                names = [served.id for served in client.models.list()]
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise GeoError(f"the server at {self.url} wants a key: set {KEY}") from None
        except openai.APITimeoutError:
            raise GeoError(f"the server at {self.url} does not answer within {CHECK_S:g} s: try again later") from None
        except openai.APIConnectionError:
            raise GeoError(f"no server answers at {self.url}: start it first, or correct the address") from None
        except Exception as error:  # anything may answer at an address
            raise GeoError(f"what answers at {self.url} is no OpenAI-compatible server: {_one_line(error)}") from None
        listed = UNPRINTABLE.sub(" ", ", ".join(names[:8])) or "none"
        if model is None and len(names) != 1:
            raise GeoError(f"name the model with --mllm-model: the server at {self.url} has {listed}")
        if model is not None and model not in names:
            raise GeoError(f"the server at {self.url} has no model {model}: it has {listed}")
        return model or str(names[0])


def _read(request: Request, completion: Any, seconds: float) -> Reply:
    texts = tuple(choice.message.content or "" for choice in completion.choices)
    if len(texts) != request.n:
        return Reply(seconds=seconds, error=f"the server gave {len(texts)} answers, not {request.n}")
    listed, usage = completion.choices[0].logprobs, completion.usage
    top = (
        [(entry.token, entry.logprob) for entry in listed.content[0].top_logprobs] if listed and listed.content else []
    )
    prompt_tokens, output_tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    reply = Reply(texts, prompt_tokens=prompt_tokens, output_tokens=output_tokens, seconds=seconds)
    return with_log_probs(reply, request.options, top)


def _one_line(error: Exception) -> str:
    return UNPRINTABLE.sub(" ", brief(error))
