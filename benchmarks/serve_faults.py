"""What breaks servers, done to the embedded one: clients that leave, malformed and oversize requests, SIGTERM under
load, damaged checkpoints.

    python benchmarks/serve_faults.py --out docs/raw/serve.jsonl

Needs `pip install openai schemathesis`. After every fault the server must answer as before, and hold no cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import schemathesis
from schemathesis.checks import (
    FailureGroup,
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.generation import GenerationMode

from depthkv.checkpoint import load, save
from serving import MODEL, NAME, Server, write_line

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
BODY = {"model": NAME, "prompt": "The state is", "max_tokens": 16, "temperature": 0}


def answer(server: Server) -> str:
    """The text that the server must keep giving."""
    response = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=120)
    return str(response.raise_for_status().json()["choices"][0]["text"])


async def disconnects(server: Server, count: int) -> dict[str, Any]:
    """Streams that are left after some events, and requests that are left before any answer, ten at a time."""
    rng = random.Random(0)
    before = server.metrics()

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        body = BODY | {"max_tokens": 400}
        if number % 4 == 3:
            with contextlib.suppress(httpx.TimeoutException):
                await client.post("/v1/completions", json=body, timeout=rng.uniform(0.05, 1.5))
            return
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}, timeout=120) as response:
            read = rng.randrange(1, 8)
            async for _ in response.aiter_lines():
                read -= 1
                if not read:
                    return

    async with httpx.AsyncClient(base_url=server.url) as client:
        for start in range(0, count, 10):
            await asyncio.gather(*(leave(client, number) for number in range(start, min(start + 10, count))))
    await asyncio.to_thread(server.settle)
    after = server.metrics()
    cancelled = 'requests_total{outcome="cancelled"}'
    return {"left": count, "cancelled": after.get(cancelled, 0) - before.get(cancelled, 0)}


def malformed(server: Server, count: int) -> dict[str, Any]:
    """Bodies that are no JSON of the schema: cut, with bytes changed, or of another type."""
    rng = random.Random(1)
    whole = json.dumps(BODY).encode()
    statuses: Counter[int] = Counter()
    for number in range(count):
        body = bytearray(whole)
        if number % 3 == 0:
            body = body[: rng.randrange(len(body))]
        elif number % 3 == 1:
            places = [place for place, byte in enumerate(whole) if byte in b'":,']
            body[rng.choice(places)] = rng.choice(b"\x00\xff{[")
        else:
            body = bytearray(rng.choice([b"[]", b"7", b'"x"', b"{" * 500, b'{"prompt": {"a": [1e999]}}', b"\xff\xfe"]))
        path = rng.choice(["completions", "chat/completions"])
        headers = {"content-type": "application/json"}
        response = httpx.post(f"{server.url}/v1/{path}", content=bytes(body), headers=headers, timeout=120)
        assert response.status_code == 200 or response.json()["error"]["message"], response.text
        statuses[response.status_code] += 1
    return {"sent": count, "statuses": {str(status): number for status, number in sorted(statuses.items())}}


def generated(server: Server, count: int) -> dict[str, Any]:
    """Requests that schemathesis makes of the OpenAPI document, valid ones and invalid ones, `count` for each path."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: Counter[int] = Counter()
    broken: list[str] = []

    def send(case: Any) -> None:
        response = case.call(timeout=120)
        statuses[response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as problem:
            broken.append(f"{case.method} {case.path}: {problem}")

    def send_valid(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body |= {"model": NAME, "max_tokens": 2}  # past the first check, and soon done
        send(case)

    settings = hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    for result in schema.get_all_operations():
        operation = result.ok()
        valid = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        settings(hypothesis.given(case=valid)(send_valid))()
        if operation.method.upper() == "POST":  # nothing about the others can be wrong
            invalid = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
            settings(hypothesis.given(case=invalid)(send))()
    return {
        "sent": sum(statuses.values()),
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "broken": broken[:5],
    }


def oversize(server: Server) -> dict[str, Any]:
    """Too many bytes, too many tokens, and as many as just pass."""
    found: dict[str, int] = {}
    for label, prompt in {
        "2 MiB": "a " * 2**20,
        "100,000 tokens": "a " * 100_000,
        "one token too many": [5] * (2048 - 16 + 1),
        "as many tokens as fit": [5] * (2048 - 16),
    }.items():
        response = httpx.post(f"{server.url}/v1/completions", json=BODY | {"prompt": prompt}, timeout=120)
        found[label] = response.status_code
    return found


async def sigterm(server: Server, count: int) -> dict[str, Any]:
    """SIGTERM while `count` requests run or wait."""

    async def ask(client: httpx.AsyncClient) -> str:
        lines = []
        async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}, timeout=120) as response:
            async for line in response.aiter_lines():
                lines += [line.removeprefix("data: ")] if line else []
        assert lines.pop() == "[DONE]"
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines)

    expected = await asyncio.to_thread(answer, server)
    async with httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=count)) as client:
        asked = [asyncio.create_task(ask(client)) for _ in range(count)]
        while (await asyncio.to_thread(server.metrics))["requests_running"] < 4:
            await asyncio.sleep(0.05)
        code = asyncio.create_task(asyncio.to_thread(server.terminate))
        texts = await asyncio.gather(*asked, return_exceptions=True)
    return {
        "in_flight": count,
        "completed": sum(isinstance(text, str) for text in texts),
        "right": sum(text == expected for text in texts),
        "exit_code": await code,
    }


def damaged(core: int) -> dict[str, Any]:
    """A checkpoint that was cut, one with a broken header, and one whose weights are no numbers."""
    model, tokenizer, plan = load(MODEL, dtype="bfloat16")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        save(whole, model.merge_and_unload(), tokenizer, plan)  # type: ignore[operator]
        file = whole / "model.safetensors"
        weights = file.read_bytes()
        for label, content in {
            "whole": weights,
            "cut": weights[: len(weights) // 2],
            "broken header": b"\xff" * 64 + weights[64:],
            "not a number": weights[:-4096] + b"\xff" * 4096,
        }.items():
            file.write_bytes(content)
            with Server(model=str(whole), core=core) as server:
                code = server.process.poll()
                lines = server.stderr().strip().splitlines()
                found[label] = {
                    "exit_code": code,
                    "served": bool(server.url),
                    "one_line": sum("depthkv:" in line for line in lines) == (code is not None),
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--disconnects", type=int, default=100)
    parser.add_argument("--malformed", type=int, default=50)
    parser.add_argument("--in-flight", type=int, default=24)
    parser.add_argument("--core", type=int, default=0, help="that the server runs on")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    faults: dict[str, Any] = {}
    with Server("--max-sequences", "8", "--max-context", "2048", core=args.core) as server:
        expected = answer(server)
        asyncio.run(disconnects(server, 20))  # what the first requests allocate stays
        start = server.resident_bytes()

        def run(label: str, fault: Callable[[], dict[str, Any]]) -> None:
            begun = time.perf_counter()
            figures = fault()
            server.settle()
            figures["cache_bytes_after"] = server.metrics()["kv_cache_bytes"]
            figures["answers_as_before"] = answer(server) == expected
            figures["resident_growth"] = server.resident_bytes() - start
            figures["seconds"] = round(time.perf_counter() - begun, 1)
            faults[label] = figures
            print(label, figures, flush=True)

        run("disconnects", lambda: asyncio.run(disconnects(server, args.disconnects)))
        run("malformed", lambda: malformed(server, args.malformed))
        run("generated", lambda: generated(server, args.malformed))
        run("oversize", lambda: oversize(server))
        run("disconnects again", lambda: asyncio.run(disconnects(server, args.disconnects)))
        faults["sigterm"] = asyncio.run(sigterm(server, args.in_flight))
        print(faults["sigterm"])
        faults["tracebacks"] = server.stderr().count("Traceback")
    faults["damaged"] = damaged(args.core)
    print(faults["damaged"], faults["tracebacks"])
    write_line(args.out, {"run": "faults", "faults": faults, "model": MODEL})


if __name__ == "__main__":
    main()
