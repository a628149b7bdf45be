"""Exported checkpoints in vLLM: the same tokens as depthkv's, KV blocks, and throughput where memory is the limit.

    make vllm-env && .venv-vllm/bin/python benchmarks/vllm_blocks.py --threads 2 --out docs/raw/vllm.jsonl

Every engine runs in a process of its own, the arms of the throughput in turns, forwards and then backwards. In the
blocks and the throughput, every plan has the same bytes for its cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from depthkv import SharingPlan, load, share
from depthkv.checkpoint import load_tokenizer
from depthkv.data import resolve_data, split_documents, token_blocks
from depthkv.export import export
from depthkv.machine import environment

MODEL, TEXT = "builtin:smollm2-135m-depthkv", "builtin:anarchism"
LAYERS = 30
PLANS = {
    "full cache": SharingPlan.full(LAYERS),
    "every 2nd layer": SharingPlan.every(2, LAYERS),
    "every 4th layer": SharingPlan.every(4, LAYERS),
    "7 layers": SharingPlan.from_leaders([0, 5, 9, 13, 18, 22, 26], LAYERS),
}
"""A quarter of 30 layers are 7.5: every 4th is 8 of them."""
PARTS = ("blocks", "tokens", "throughput")
DTYPES = {"bfloat16": 1e-2, "float32": 1e-4}
"""The gap between two logits below which either may win."""


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a new process, whose memory is gone afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # may start processes, unlike a Pool's
        return pool.submit(work, *arguments).result()


def export_plan(folder: str, dtype: str, plan: SharingPlan) -> None:
    """The adapter is merged in fp32 and the sum rounded once, as `depthkv export` does."""
    model, tokenizer, _ = load(MODEL, dtype="float32", progress=print)
    merged = model.merge_and_unload().to(getattr(torch, dtype))  # type: ignore[operator]
    export(folder, merged, tokenizer, plan)


def prompts_of(folder: str, number: int, tokens: int) -> list[list[int]]:
    """Token ids of held-out text."""
    tokenizer = load_tokenizer(folder)
    held_out = split_documents(resolve_data(TEXT, progress=print))[1]
    blocks = token_blocks(held_out, tokenizer, tokens)
    assert len(blocks) >= number, f"expected {number} blocks of {tokens} tokens, got {len(blocks)}"
    found: list[list[int]] = blocks[:: len(blocks) // number][:number].tolist()
    return found


@contextmanager
def engine(folder: str, dtype: str, kv_bytes: int, **options: Any) -> Iterator[Any]:
    from vllm import LLM

    llm = LLM(folder, dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=kv_bytes, **options)
    try:
        yield llm
    finally:  # else the processes of the engine outlive it, and this one waits for them
        llm.llm_engine.engine_core.shutdown()


def num_blocks(llm: Any) -> tuple[int, int]:
    """KV blocks, and tokens of each."""
    config = llm.llm_engine.vllm_config.cache_config
    return config.num_gpu_blocks, config.block_size


def write(llm: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> Any:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], greedy, use_tqdm=False)


def vllm_blocks(folder: str, dtype: str, kv_bytes: int) -> tuple[int, int]:
    with engine(folder, dtype, kv_bytes, max_model_len=1024) as llm:
        return num_blocks(llm)


def vllm_tokens(
    folder: str, dtype: str, kv_bytes: int, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[list[int]]:
    """What vLLM writes."""
    with engine(folder, dtype, kv_bytes, max_model_len=1024) as llm:
        return [list(output.outputs[0].token_ids) for output in write(llm, prompts, new_tokens)]


@torch.no_grad()
def own_tokens(folder: str, prompts: Sequence[Sequence[int]], new_tokens: int, batch: int = 64) -> list[list[int]]:
    """What depthkv writes, by argmax and a cache."""
    from transformers import DynamicCache

    model, _, plan = load(folder)
    assert plan is not None
    written: list[list[int]] = []
    with share(model, plan):
        for start in range(0, len(prompts), batch):
            given = torch.tensor(prompts[start : start + batch])
            cache, rows = DynamicCache(config=model.config), []
            for _ in range(new_tokens):
                output = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                given = output.logits[:, -1:].argmax(-1)
                rows.append(given)
            written += torch.cat(rows, dim=1).tolist()
    return written


@torch.no_grad()
def gaps(
    folder: str, prompts: Sequence[Sequence[int]], own: Sequence[Sequence[int]], other: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Where two texts part first: how far the two tokens' logits are apart, from the same weights in fp32."""
    model, _, plan = load(folder, dtype="float32")
    assert plan is not None
    found = []
    with share(model, plan):
        for i, (mine, theirs) in enumerate(zip(own, other, strict=True)):
            at = next((at for at, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
            if at is not None:
                read = torch.tensor([[*prompts[i], *mine[:at]]])
                logits = model(input_ids=read, logits_to_keep=1).logits[0, -1]
                gap = abs(float(logits[mine[at]] - logits[theirs[at]]))
                found.append({"prompt": i, "at": at, "gap": gap})
    return found


def throughput(folder: str, dtype: str, kv_bytes: int, prompts: Sequence[Sequence[int]], new_tokens: int) -> Any:
    """Seconds and most sequences at once, with all requests waiting from the start."""
    context = len(prompts[0]) + new_tokens
    options = {"enable_prefix_caching": False, "max_num_seqs": len(prompts), "disable_log_stats": False}
    with engine(folder, dtype, kv_bytes, max_model_len=context, max_num_batched_tokens=2048, **options) as llm:
        write(llm, prompts[:2], 2)  # warms up
        began = time.perf_counter()
        outputs = write(llm, prompts, new_tokens)
        seconds = time.perf_counter() - began
        blocks, _ = num_blocks(llm)
    spans = [(output.metrics.scheduled_ts, output.metrics.last_token_ts) for output in outputs]
    at_once = max(sum(begin <= start < end for begin, end in spans) for start, _ in spans)
    return {"blocks": blocks, "seconds": seconds, "sequences_at_once": at_once}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--kv-bytes", type=int, default=2**30, help="of the cache, for blocks and tokens")
    parser.add_argument("--requests", type=int, default=32, help="for the throughput")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each of them, read and written")
    parser.add_argument("--written", type=int, default=128, help="of them written")
    parser.add_argument("--limit-bytes", type=int, default=96 * 2**20, help="of the cache, for the throughput")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS), help="of blocks and tokens")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="of the part tokens")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    torch.set_num_threads(arguments.threads)
    import vllm

    about = {"environment": {**environment(torch.device("cpu")), "vllm": vllm.__version__}, "model": MODEL}
    about["date"] = time.strftime("%Y-%m-%d")
    lines: list[dict[str, Any]] = []

    def report(line: dict[str, Any]) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    with tempfile.TemporaryDirectory() as work:
        if "blocks" in arguments.parts:
            for name in arguments.plans:
                folder = f"{work}/blocks-{len(PLANS[name].leaders)}"
                apart(export_plan, folder, "bfloat16", PLANS[name])
                blocks, size = apart(vllm_blocks, folder, "bfloat16", arguments.kv_bytes)
                report(
                    {
                        "part": "blocks",
                        "plan": name,
                        "leaders": len(PLANS[name].leaders),
                        "num_layers": LAYERS,
                        "dtype": "bfloat16",
                        "kv_bytes": arguments.kv_bytes,
                        "blocks": blocks,
                        "block_size": size,
                        **about,
                    }
                )
        if "tokens" in arguments.parts:
            for dtype in arguments.dtypes:
                for name in arguments.plans:
                    plan = PLANS[name]
                    folder = f"{work}/{dtype}-{len(plan.leaders)}"
                    apart(export_plan, folder, dtype, plan)
                    prompts = prompts_of(folder, arguments.prompts, arguments.prompt_tokens)
                    given = (prompts, arguments.new_tokens)
                    theirs = apart(vllm_tokens, folder, dtype, arguments.kv_bytes, *given)
                    mine = apart(own_tokens, folder, *given)
                    parted = apart(gaps, folder, prompts, mine, theirs)
                    report(
                        {
                            "part": "tokens",
                            "plan": name,
                            "leaders": len(plan.leaders),
                            "num_layers": LAYERS,
                            "dtype": dtype,
                            "prompts": len(prompts),
                            "prompt_tokens": arguments.prompt_tokens,
                            "new_tokens": arguments.new_tokens,
                            "tolerance": DTYPES[dtype],
                            "parted": parted,
                            **about,
                        }
                    )
        if "throughput" in arguments.parts:
            names = [name for name in PLANS if name != "7 layers"]
            folders = {name: f"{work}/limit-{i}" for i, name in enumerate(names)}
            for name, folder in folders.items():
                apart(export_plan, folder, "bfloat16", PLANS[name])
            read = arguments.context - arguments.written
            prompts = prompts_of(folders[names[0]], arguments.requests, read)
            runs: dict[str, list[Any]] = {name: [] for name in names}
            for turn in range(arguments.rounds):
                for name in names if turn % 2 == 0 else reversed(names):
                    given = (arguments.limit_bytes, prompts, arguments.written)
                    runs[name].append(apart(throughput, folders[name], "bfloat16", *given))
                    print(name, runs[name][-1], flush=True)
            for name in names:
                seconds = [run["seconds"] for run in runs[name]]
                report(
                    {
                        "part": "throughput",
                        "plan": name,
                        "leaders": len(PLANS[name].leaders),
                        "num_layers": LAYERS,
                        "dtype": "bfloat16",
                        "requests": arguments.requests,
                        "prompt_tokens": read,
                        "new_tokens": arguments.written,
                        "kv_bytes": arguments.limit_bytes,
                        "blocks": runs[name][0]["blocks"],
                        "sequences_at_once": max(run["sequences_at_once"] for run in runs[name]),
                        "seconds": seconds,
                        "tokens_per_s": arguments.requests * arguments.written / statistics.median(seconds),
                        **about,
                    }
                )


if __name__ == "__main__":
    main()
