"""What a real server cannot be made to show on demand: busy and failing answers. The rest is in tests/served."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tiny import OneLine

from rag_geotoken.mllm import Reply, Request, open_client
from rag_geotoken.mllm.server import KEY, ServerClient

REQUEST = Request(("Where?", b"\xff\xd8\xff picture"), options=("A", "B", "Z"))


class Handler(BaseHTTPRequestHandler):
    """Gives the statuses in the list, then answers."""

    statuses: list[int]
    choice: dict[str, Any]
    seen: list[dict[str, Any]]
    headers_seen: list[dict[str, str]]
    models: tuple[str, ...] = ("tiny",)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        self.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        status = self.statuses.pop(0) if self.statuses else 200
        if status != 200:
            self.reply(status, {"error": {"message": "not\nnow\x1b[31m", "type": "x", "code": status}})
            return
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        told = {"id": "1", "object": "chat.completion", "model": "tiny", "created": 1}
        self.reply(200, {**told, "choices": [self.choice], "usage": usage})

    def reply(self, status: int, body: dict[str, Any]) -> None:
        encoded = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Location", "/v1/elsewhere")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)


def choice(text: str | None, **log_probs: float) -> dict[str, Any]:
    top = [{"token": token.replace("_", " "), "logprob": value, "bytes": None} for token, value in log_probs.items()]
    content = [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": top}]
    message = {"role": "assistant", "content": text}
    return {"index": 0, "finish_reason": "stop", "message": message, "logprobs": {"content": content} if top else None}


@pytest.fixture
def handler() -> Iterator[type[Handler]]:
    class Own(Handler):
        statuses: list[int] = []  # noqa: RUF012
        seen: list[dict[str, Any]] = []  # noqa: RUF012
        headers_seen: list[dict[str, str]] = []  # noqa: RUF012
        choice = choice("B", A=-2.0, B=-0.2)

    with ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Own.url = f"http://127.0.0.1:{server.server_port}/v1"  # type: ignore[attr-defined]
        yield Own
        server.shutdown()


def ask(handler: type[Handler], request: Request = REQUEST, **options: Any) -> Reply:
    ((position, reply),) = ServerClient(handler.url, **options).ask([request])  # type: ignore[attr-defined]
    assert position == 0
    return reply


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_worth_another_try(handler: type[Handler], status: int) -> None:
    handler.statuses = [status]
    reply = ask(handler)
    assert reply.error is None and reply.texts == ("B",) and len(handler.seen) == 2
    assert reply.seconds > 0.2  # it waited


@pytest.mark.parametrize("status", [307, 400, 401, 403, 404, 422])
def test_not_worth_another_try(handler: type[Handler], status: int) -> None:
    handler.statuses = [status]
    reply = ask(handler)
    assert reply.error is not None and reply.error.startswith(f"the server answered {status}: ")
    assert len(handler.seen) == 1 and reply.texts == () == reply.log_probs
    assert "\n" not in reply.error and "\x1b" not in reply.error


def test_tries_end(handler: type[Handler]) -> None:
    handler.statuses = [503] * 9
    begun = time.monotonic()
    reply = ask(handler, retries=2)
    assert len(handler.seen) == 3 and reply.error is not None and reply.error.startswith("the server answered 503")
    assert 0.8 < time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (choice("B is my answer", B=-0.1), "none of the options"),
        (choice("", B=-0.1), "none of the options"),
        (choice(None, B=-0.1), "none of the options"),
        (choice("b", b=-0.1), "none of the options"),
        (choice("B"), "no log-probabilities"),
        (choice("B", X=-0.1, _B=-0.2), "no log-probabilities"),
        ({"index": 0, "finish_reason": "stop", "message": None}, "cannot be read"),
    ],
)
def test_answers_that_leave_the_options_are_failures(handler: type[Handler], told: dict[str, Any], words: str) -> None:
    handler.choice = told
    reply = ask(handler)
    assert reply.error is not None and words in reply.error and reply.texts == () == reply.log_probs


def test_only_tokens_that_spell_an_option_count(handler: type[Handler]) -> None:
    handler.choice = choice("B", A=-2.0, _A=-0.5, B=-1.0, Bx=-0.1, the=-0.3)
    reply = ask(handler)
    a, b, z = reply.log_probs
    assert b - a == pytest.approx(1.0, abs=1e-5) and z == a  # Z is not listed: no more than the least
    assert reply.prompt_tokens == 9 and reply.output_tokens == 1


def test_nothing_but_pixels_and_words_is_sent(handler: type[Handler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-openai")
    monkeypatch.setenv(KEY, "key-of-this-server")
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):  # where nothing answers
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    ask(handler)
    (body,), (headers,) = handler.seen, handler.headers_seen
    assert headers["authorization"] == "Bearer key-of-this-server"
    assert "secret-of-openai" not in json.dumps([body, headers])
    text, picture = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Where?"}
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,") and len(picture["uuid"]) == 64
    assert body["structured_outputs"] == {"choice": ["A", "B", "Z"]} and body["max_tokens"] == 1
    assert (body["logprobs"], body["top_logprobs"], body["temperature"]) == (True, 20, 0.0)


def test_more_than_one_model(handler: type[Handler], one_line: OneLine) -> None:
    handler.models = ("one", "two")
    with one_line(r"^name the model with --mllm-model: the server at \S+ has one, two$"):
        open_client(handler.url)  # type: ignore[attr-defined]
    assert open_client(handler.url, "two").model == "two"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("given", "least", "most"), [(1, 1, 1), (3, 3, 3), (None, 4, 16)])
def test_so_many_requests_at_a_time(handler: type[Handler], given: int | None, least: int, most: int) -> None:
    answer, lock, there, counts = handler.do_POST, threading.Lock(), [0], []

    def slowly(self: Handler) -> None:
        with lock:
            there[0] += 1
            counts.append(there[0])
        time.sleep(0.05)
        with lock:
            there[0] -= 1
        answer(self)

    handler.do_POST = slowly  # type: ignore[method-assign]
    client = open_client(handler.url, concurrent=given)  # type: ignore[attr-defined]
    assert len(list(client.ask([REQUEST] * 40))) == 40 and least <= max(counts) <= most


def test_no_server(one_line: OneLine) -> None:
    with one_line(r"^no server answers at http://127.0.0.1:9/v1: start it first, or correct the address$"):
        open_client("http://127.0.0.1:9")
    with one_line("no server answers"):
        open_client("http://no-such-host.invalid/v1")
    with one_line("no OpenAI-compatible server|no server answers"):
        open_client("http://")
