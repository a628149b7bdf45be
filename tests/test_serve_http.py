"""The HTTP of `depthkv serve`, through a real server on a free port."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

from depthkv.serve.app import create_app
from depthkv.serve.engine import Engine
from depthkv.serve.request import EngineSettings
from serving import PLAN, endless_tokenizer, generated, listening, running
from tiny import tiny_model

PROMPT = "w3 w7 w50"
IDS = [6, 10, 53]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    tokenizer = endless_tokenizer()
    tokenizer.chat_template = TEMPLATE
    settings = EngineSettings(max_context=1000, kv_budget=4 * 64 * 4000)
    with running(tiny_model(eos_token_id=None), tokenizer, PLAN, settings, min_retention=0.25) as made:
        yield made


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Any]:
    app = create_app(engine, name="tiny", max_tokens=900, max_body=20_000, hosts=["127.0.0.1"])
    with listening(app) as address, httpx.Client(base_url=address, timeout=60) as made:
        yield made


def complete(client: Any, **options: Any) -> Any:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **options}
    return client.post("/v1/completions", json=body)


def chunks(text: str) -> list[dict[str, Any]]:
    """Events of a stream, which ends as OpenAI's do."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def test_completion_is_that_of_generate(client: Any, engine: Engine) -> None:
    for retention, leaders in ((None, 2), (1, 4), (0.25, 1)):
        plan = PLAN.for_retention(retention or 0.5, engine.kinds)
        engine_free = generated(tiny_model(eos_token_id=None), plan, IDS, pad_token_id=0)
        answer = complete(client, **({} if retention is None else {"kv_retention": retention})).json()
        (choice,) = answer["choices"]
        assert choice["text"].strip() == endless_tokenizer().decode(engine_free, skip_special_tokens=True)
        assert choice["finish_reason"] == "length"
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
        assert answer["depthkv"] == {"cache_bytes": 14 * leaders * 64, "num_leaders": leaders, "num_layers": 4}
    assert complete(client, prompt=IDS).json()["choices"] == complete(client).json()["choices"]


def test_stream_is_the_whole_in_pieces(client: Any) -> None:
    whole = complete(client).json()["choices"][0]["text"]
    response = complete(client, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = chunks(response.text)
    assert len(pieces) == 12 and "".join(piece["choices"][0]["text"] for piece in pieces) == whole
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * 11 + ["length"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    assert [piece["depthkv"]["cache_bytes"] for piece in pieces] == [128 * tokens for tokens in range(3, 15)]
    assert len(chunks(complete(client, stream=True).text)) == 12


def test_chat(client: Any) -> None:
    messages = [{"role": "system", "content": "w3"}, {"role": "user", "content": [{"type": "text", "text": "w7"}]}]
    body = {"model": "tiny", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    text = answer["choices"][0]["message"]["content"]
    assert text == complete(client, prompt="w3 w7 w9").json()["choices"][0]["text"]
    pieces = chunks(client.post("/v1/chat/completions", json=body | {"stream": True}).text)
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas[0]["role"] == "assistant" and "".join(delta.get("content", "") for delta in deltas) == text
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}


def test_stop(client: Any) -> None:
    words = complete(client).json()["choices"][0]["text"].split()
    for stop in (f" {words[5]}", ["nothing", f" {words[5]}"]):
        choice = complete(client, stop=stop).json()["choices"][0]
        assert choice["text"].split() == words[: words.index(words[5])]
        assert choice["finish_reason"] == "stop"


def test_a_seed_repeats_an_answer(client: Any) -> None:
    texts = {complete(client, temperature=1.5, seed=3).json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
    assert texts != {complete(client, temperature=1.5, seed=4).json()["choices"][0]["text"]}


@pytest.mark.parametrize(
    ("options", "status", "message", "param"),
    [
        ({"model": "other"}, 404, "expected the model 'tiny', got 'other'", "model"),
        ({"n": 2}, 400, "expected n to be left out, since this server does not support it, got 2", None),
        ({"logprobs": 3}, 400, "expected logprobs to be left out", None),
        ({"logprobs": 0}, 400, "expected logprobs to be left out", None),
        ({"kv_retention": True}, 400, 'expected a share of the layers or "adaptive"', "kv_retention"),
        ({"temperature": "hot"}, 400, "temperature: ", "temperature"),
        ({"n": "x" * 10_000}, 400, "x" * 90 + "...", None),
        ({"presence_penalty": 0.5}, 400, "expected presence_penalty to be left out", None),
        ({"colour": "red"}, 400, "colour: expected it to be left out", "colour"),
        ({"prompt": ""}, 400, "at least one token", None),
        ({"prompt": [1, 99]}, 400, "tokens from 0 to 63, got 99", None),
        ({"prompt": ["a", "b"]}, 400, "prompt", "prompt"),
        ({"max_tokens": 901}, 400, "max_tokens of at most 900, got 901", None),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens"),
        ({"prompt": "w1 " * 600, "max_tokens": 500}, 400, "at most 1000 tokens together", None),
        ({"temperature": -1}, 400, "temperature", "temperature"),
        ({"top_p": 0}, 400, "top_p", "top_p"),
        ({"kv_retention": 0.1}, 400, "kv_retention from 0.25 to 1, got 0.1", None),
        ({"kv_retention": "adaptive"}, 400, "--router", None),
        ({"kv_retention": "low"}, 400, "kv_retention", None),
        ({"prompt": "w1 " * 9000}, 413, "at most 20,000 bytes", None),
    ],
)
def test_errors(client: Any, options: dict[str, Any], status: int, message: str, param: str | None) -> None:
    response = complete(client, **options)
    assert response.status_code == status
    detail = response.json()["error"]
    assert message in detail["message"] and detail["type"] == "invalid_request_error"
    assert param is None or param in detail["param"]


def test_neutral_parameters_are_taken(client: Any) -> None:
    neutral = {"n": 1, "echo": False, "logprobs": None, "presence_penalty": 0.0, "logit_bias": {}, "user": "me"}
    assert complete(client, **neutral).status_code == 200


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"model": "tiny"}', "[" * 10_000, '{"prompt": "\\ud800"}'])
def test_malformed_bodies(client: Any, body: str) -> None:
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_body_of_unknown_size_is_limited(client: Any) -> None:
    headers = {"content-type": "application/json"}
    response = client.post("/v1/completions", content=(b" " * 1000 for _ in range(30)), headers=headers)
    assert response.status_code == 413


def test_unknown_paths_and_hosts(client: Any) -> None:
    assert client.get("/v1/files").json()["error"]["message"] == "Not Found: GET /v1/files"
    response = client.get("/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    # a page elsewhere may call this address by a name of its own
    assert client.get("/v1/models", headers={"host": "example.org"}).status_code == 400


def test_clients_that_leave_free_their_room(client: Any, engine: Engine) -> None:
    before = engine.metrics.value("requests_total", outcome="cancelled")
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 900}
    for _ in range(3):
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=client.base_url, timeout=0.2) as impatient:
        impatient.post("/v1/completions", json=body)
    end = time.monotonic() + 20
    while engine.metrics.value("requests_total", outcome="cancelled") < before + 4 or engine.metrics.value(
        "kv_cache_bytes"
    ):
        assert time.monotonic() < end, "expected the requests to be cancelled, got them running"
        time.sleep(0.01)


def test_models_health_and_metrics(client: Any) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["min_retention"], card["default_retention"], card["chat"]) == ("tiny", 0.25, 0.5, True)
    assert client.get("/health").json() == {"status": "ok"}
    complete(client)
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name in ("kv_cache_bytes", "num_leaders", "requests_waiting", "tokens_per_second"):
        assert f"depthkv_{name}" in values
    assert float(values["depthkv_kv_budget_bytes"]) == 4 * 64 * 4000
    assert float(values["depthkv_time_to_first_token_seconds_count"]) >= 1


def test_the_document_tells_of_streams_and_errors(client: Any) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = paths[path]["post"]["responses"]
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"400", "401", "404", "413", "429", "504"} <= set(responses)


def test_a_failed_engine_is_no_healthy_one(client: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(engine), "is_alive", False)
    assert client.get("/health").status_code == 503


def test_the_page_asks_nobody_else(client: Any) -> None:
    for path in ("/", "/playground.js", "/playground.css"):
        response = client.get(path)
        assert response.status_code == 200
        assert not re.search(r"https?://(?!www\.w3\.org/)", response.text)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", client.get("/").text)


@pytest.mark.parametrize("file", ["/etc/hostname", "../app.py", "playground.js", "/nowhere"])
def test_the_page_is_the_page_whatever_is_asked_for(client: Any, file: str) -> None:
    assert client.get("/", params={"file": file}).content == client.get("/").content


def test_without_max_tokens_an_answer_ends_where_the_context_does(client: Any) -> None:
    long = "w1 " * 995
    for path, prompt in (("", {"prompt": long}), ("chat/", {"messages": [{"role": "user", "content": long}]})):
        answer = client.post(f"/v1/{path}completions", json={"model": "tiny", **prompt}).json()
        assert answer["usage"]["total_tokens"] == 1000
    assert client.post("/v1/completions", json={"model": "tiny", "prompt": "w1 " * 1000}).status_code == 400


def test_other_content_types_are_refused(client: Any) -> None:
    body = json.dumps({"model": "tiny", "prompt": PROMPT}).encode()
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        assert client.post("/v1/completions", content=body, headers=headers).status_code == 415
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert client.post("/v1/completions", content=body, headers={"content-type": kind}).status_code == 200


def test_api_key(engine: Engine) -> None:
    app = create_app(engine, name="tiny", api_key="secret")  # without a server, whose end would stop the engine

    async def ask(path: str, key: str | None) -> int:
        headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            return int((await client.get(path, headers=headers)).status_code)

    def status(path: str, key: str | None = None) -> int:
        return asyncio.run(ask(path, key))

    assert {path: status(path) for path in ("/", "/health")} == {"/": 200, "/health": 200}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/completions"):
        assert [status(path, key) for key in (None, "other", "secré", "secret ")] == [401] * 4
    assert status("/v1/models", "secret") == 200


def test_openai_client(client: Any) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as made:
        options: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}
        whole = made.completions.create(prompt=PROMPT, **options, extra_body={"kv_retention": 0.5})
        assert whole.choices[0].text == complete(client).json()["choices"][0]["text"]
        assert [model.id for model in made.models.list()] == ["tiny"]
        messages = [{"role": "user", "content": "w3"}]
        stream = made.chat.completions.create(messages=messages, stream=True, **options)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == made.chat.completions.create(messages=messages, **options).choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="does not support"):
            made.completions.create(prompt=PROMPT, n=2, **options)
        with pytest.raises(openai.NotFoundError):
            made.completions.create(prompt=PROMPT, model="other")


def test_import_of_the_library_needs_no_server() -> None:
    code = "import depthkv, depthkv.cli, sys; assert not {'fastapi', 'uvicorn'} & set(sys.modules)"
    source = Path(__file__).parent.parent / "src"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(source), "PATH": ""})
