"""The embedded server under load, and the `openai` client against it.

    python benchmarks/serve.py client --out docs/raw/serve.jsonl
    python benchmarks/serve.py load --out docs/raw/serve.jsonl

Needs `pip install openai`. The server runs on core 0 alone, the clients on the others. `load`: a closed loop of
clients, each request with its own prompt; time to first token begins when the client sends, so that waiting counts.
The arms differ in the bounds of retention only, and have one budget.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

import openai

from depthkv.checkpoint import load_tokenizer
from serving import FULL_BYTES, MODEL, NAME, NUM_LAYERS, Server, percentile, token_prompts, write_line

ARMS = {
    "full cache only": (["--min-retention", "1"], 1.0),
    "from the full cache down to a quarter": (["--min-retention", "0.25"], 1.0),
    "from half of the layers down to a quarter": (["--min-retention", "0.25"], 0.5),
}
"""Options of the server, and what requests ask for."""


async def one(client: Any, prompt: list[int], retention: float, max_tokens: int) -> dict[str, Any]:
    """One streamed request."""
    started = time.perf_counter()
    stream = await client.completions.create(
        model=NAME,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"kv_retention": retention},
    )
    found: dict[str, Any] = {"ttft": None, "text": "", "tokens": 0, "reason": None, "layers": []}
    async for chunk in stream:
        if found["ttft"] is None:
            found["ttft"] = time.perf_counter() - started
        (choice,) = chunk.choices
        found["text"] += choice.text
        found["tokens"] += 1
        found["reason"] = choice.finish_reason or found["reason"]
        found["layers"].append(chunk.depthkv["num_leaders"])
    return found


async def closed_loop(url: str, prompts: list[list[int]], retention: float, args: argparse.Namespace) -> list[Any]:
    """All prompts, so many at once; what a request raised stands in its place."""
    waiting = list(enumerate(prompts))[::-1]
    found: list[Any] = [None] * len(prompts)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=1200) as client:

        async def work() -> None:
            while waiting:
                place, prompt = waiting.pop()
                try:
                    found[place] = await one(client, prompt, retention, args.max_tokens)
                except openai.OpenAIError as problem:
                    found[place] = problem
                if place % 20 == 0:
                    print(f"  {len(prompts) - len(waiting)} of {len(prompts)} begun", flush=True)

        await asyncio.gather(*(work() for _ in range(args.concurrent)))
    return found


def load_arm(label: str, prompts: list[list[int]], budget: int, args: argparse.Namespace) -> dict[str, Any]:
    """One server, all requests."""
    options, retention = ARMS[label]
    common = ["--kv-budget", str(budget), "--max-sequences", str(args.max_sequences), "--timeout", "1200"]
    with Server(*options, *common, core=args.core) as server:
        asyncio.run(closed_loop(server.url, prompts[:2], retention, args))  # the first steps are slower
        before, cpu = server.metrics(), server.cpu_seconds()
        started = time.perf_counter()
        found = asyncio.run(closed_loop(server.url, prompts, retention, args))
        seconds, cpu = time.perf_counter() - started, server.cpu_seconds() - cpu
        metrics = server.metrics()
        done = [answer for answer in found if isinstance(answer, dict) and answer["reason"] in ("length", "stop")]
        # alone, nobody has to give up layers, and the batch is one sequence
        alone = asyncio.run(alone_again(server.url, prompts[: args.alone], retention, args))
        same = [
            a["text"] == b["text"] for a, b in zip(found, alone, strict=False) if set(a["layers"]) == set(b["layers"])
        ]
        code = server.terminate()
    ttft = [answer["ttft"] for answer in done]
    layers = [count for answer in done for count in answer["layers"]]
    return {
        "requests": len(prompts),
        "completed": len(done),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": sum(answer["tokens"] for answer in done),
        "tokens_per_s": sum(answer["tokens"] for answer in done) / seconds,
        "ttft_p50": percentile(ttft, 0.5),
        "ttft_p99": percentile(ttft, 0.99),
        "most_at_once": metrics["requests_running_peak"],
        "peak_bytes": metrics["kv_cache_peak_bytes"],
        "mean_layers": sum(layers) / len(layers),
        "fewest_layers": min(layers),
        "given_up": metrics["layers_given_up_total"] - before["layers_given_up_total"],
        "same_depth_as_alone": len(same),
        "same_text_as_alone": sum(same),
        "load_average": os.getloadavg()[1],  # of the machine in the last 5 minutes: others may use it, too
        "exit_code": code,
    }


async def alone_again(url: str, prompts: list[list[int]], retention: float, args: argparse.Namespace) -> list[Any]:
    """One after the other."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=1200) as client:
        return [await one(client, prompt, retention, args.max_tokens) for prompt in prompts]


def run_load(args: argparse.Namespace) -> dict[str, Any]:
    """Every arm in turn."""
    tokenizer = load_tokenizer(MODEL)
    longest = args.prompt_tokens
    lengths = [longest // 2 + (37 * i) % (longest // 2 + 1) for i in range(args.requests)]
    prompts = token_prompts(tokenizer, lengths)
    assert [len(prompt) for prompt in prompts] == lengths
    budget = args.sequences * FULL_BYTES * (longest + args.max_tokens - 1)
    rows = {}
    for label in args.arms:
        rows[label] = load_arm(label, prompts, budget, args)
        print(label, rows[label], flush=True)
    return {
        "run": "load",
        "requests": args.requests,
        "concurrent": args.concurrent,
        "prompt_tokens": [min(lengths), max(lengths)],
        "max_tokens": args.max_tokens,
        "max_sequences": args.max_sequences,
        "budget": budget,
        "budget_sequences": args.sequences,
        "num_layers": NUM_LAYERS,
        "rows": rows,
    }


def run_client(args: argparse.Namespace) -> dict[str, Any]:
    """What the synchronous client gets, compared with what it should."""
    checks: dict[str, bool] = {}
    with (
        Server(core=args.core) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        common: dict[str, Any] = {"model": NAME, "max_tokens": 24, "temperature": 0}
        prompt = "The state is"
        whole = client.completions.create(prompt=prompt, **common)
        text = whole.choices[0].text
        checks["completion"] = whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"
        pieces = list(client.completions.create(prompt=prompt, stream=True, **common))
        checks["streamed completion"] = "".join(p.choices[0].text for p in pieces) == text and len(pieces) == 24
        messages: Any = [{"role": "user", "content": "What is a city?"}]
        chat = client.chat.completions.create(messages=messages, **common)
        answer = chat.choices[0].message.content
        checks["chat"] = bool(answer)
        stream = client.chat.completions.create(messages=messages, stream=True, **common)
        checks["streamed chat"] = "".join(c.choices[0].delta.content or "" for c in stream) == answer
        word = text.split()[6]
        stopped = client.completions.create(prompt=prompt, stop=[word], **common).choices[0]
        checks["stop"] = stopped.finish_reason == "stop" and stopped.text == text[: text.index(word)]
        seeds = [client.completions.create(prompt=prompt, **common | {"temperature": 1, "seed": 3}) for _ in range(2)]
        checks["seed"] = seeds[0].choices[0].text == seeds[1].choices[0].text
        deep, shallow = (
            client.completions.create(prompt=prompt, **common, extra_body={"kv_retention": share}) for share in (1, 0.5)
        )
        checks["kv_retention"] = deep.depthkv["cache_bytes"] == 2 * shallow.depthkv["cache_bytes"]
        checks["models"] = [model.id for model in client.models.list()] == [NAME]
        refused: dict[str, tuple[type[Exception], dict[str, Any]]] = {
            "error: another model": (openai.NotFoundError, {"model": "other"}),
            "error: n": (openai.BadRequestError, {"n": 2}),
            "error: too many tokens": (openai.BadRequestError, {"max_tokens": 100_000}),
            "error: kv_retention": (openai.BadRequestError, {"extra_body": {"kv_retention": 0.01}}),
        }
        for label, (kind, wrong) in refused.items():
            try:
                client.completions.create(prompt=prompt, **common | wrong)
                checks[label] = False
            except kind as problem:
                checks[label] = "expected" in str(problem)
        checks["SIGTERM, exit code 0"] = server.terminate() == 0
    print(checks)
    return {"run": "client", "openai": openai.__version__, "checks": checks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["client", "load"])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=192, help="of the longest; the shortest has half of them")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=4, help="full caches that the budget holds")
    parser.add_argument("--max-sequences", type=int, default=32)
    parser.add_argument("--alone", type=int, default=12, help="requests that are compared with what they get alone")
    parser.add_argument("--core", type=int, default=0, help="that the server runs on")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = run_client(args) if args.what == "client" else run_load(args)
    write_line(args.out, figures | {"model": MODEL, "dtype": "float32"})


if __name__ == "__main__":
    main()
