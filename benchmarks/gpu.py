"""Figures of a GPU: plans over contexts and batches, eager and as a CUDA graph, beside the limit of the memory.

The model has the shape of Qwen3-8B and random weights. Every row is written as soon as it is measured.

    python benchmarks/gpu.py probe --out gpu.jsonl --minutes 2.5        # what works here, and how fast
    python benchmarks/gpu.py eager --out gpu.jsonl --minutes 9          # dynamic cache, SDPA
    python benchmarks/gpu.py static --out gpu.jsonl --minutes 9         # static cache, CUDA graph, torch.compile
    python benchmarks/gpu.py static --part batches --out gpu.jsonl --minutes 9
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_eager
import torch
from gpu_compiled import Group, Stack, free, largest_group, measure_group
from gpu_model import PLANS, SHAPES, Output, cap_memory, copy_bandwidth, random_model, seconds_of

from depthkv.machine import environment
from depthkv.roofline import MachineLimits, measure_limits


def probe_operators(device: torch.device, tiny: bool, out: Output, variants: list[str] | None) -> None:
    """Every way to attend, alone: its error against fp32 and the rate at which it reads K and V."""
    heads, kv_heads, dim = (4, 2, 16) if tiny else (32, 8, 128)
    dtype = torch.float32 if tiny else torch.bfloat16
    cells = [(2, 40, 33)] if tiny else [(1, 8256, 8192), (16, 8256, 8192), (1, 131200, 8192), (1, 131200, 131072)]
    for batch, tokens, length in cells:
        one = 2 * batch * tokens * kv_heads * dim * dtype.itemsize
        sets = 2 if tiny else max(2, int(1.5e9 // one))  # more than the processor's cache holds
        for variant, function in gpu_attention.FUNCTIONS.items():
            if variants and variant not in variants:
                continue
            row = {"run": "attention", "attention": variant, "batch_size": batch, "static_tokens": tokens}
            row |= {"context": length}
            try:
                gpu_attention.use(_Anything(), variant)  # type: ignore[arg-type]
                torch._dynamo.reset()
                call = torch.compile(function, dynamic=False) if variant == "flex" and not tiny else function
                shape = (batch, tokens, kv_heads, dim) if variant == "flash" else (batch, kv_heads, tokens, dim)
                pairs = [tuple(torch.randn(shape, dtype=dtype, device=device) for _ in range(2)) for _ in range(sets)]
                if variant == "flash":
                    pairs = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in pairs]
                query = torch.randn(batch, heads, 1, dim, dtype=dtype, device=device)
                position = (length - 1 - 7 * torch.arange(batch, device=device)).clamp(min=0)[:, None]

                def run(call: Any = call, query: Any = query, position: Any = position, pairs: Any = pairs) -> Any:
                    for k, v in pairs:
                        last = call(None, query, k, v, None, scaling=dim**-0.5, position_ids=position)[0]
                    return last

                found = call(None, query, *pairs[0], None, scaling=dim**-0.5, position_ids=position)[0].float()
                expected = gpu_attention.reference(query, *pairs[0], position[:, 0], dim**-0.5)
                row["relative_error"] = float((found - expected).norm() / expected.norm())
                if device.type == "cuda":
                    run = _graph(run)
                seconds = min(seconds_of(run, device) for _ in range(5)) / sets
                row |= {"seconds": seconds, "bytes_per_s": one * length / tokens / seconds}
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            out.write(row)
            pairs = []
            free()


class _Anything:
    """Stands in for a model where only a name is to be registered."""

    class config:
        _attn_implementation = ""


def _graph(run: Any) -> Any:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def probe(args: argparse.Namespace, device: torch.device, limits: MachineLimits, copy: float, out: Output) -> None:
    """What works, shortly: operators alone, then a model of two layers with every stack."""
    probe_operators(device, args.tiny, out, args.variants)
    shape, layers = ("tiny", 2) if args.tiny else ("qwen3-8b-2-layers", None)
    model = random_model(shape, device.type, torch.float32 if args.tiny else torch.bfloat16, layers)
    tokens, contexts = (320, (24,)) if args.tiny else (8256, (8192,))
    group = Group(plan="g=2", batch=1, contexts=contexts, tokens=tokens)
    stacks = [Stack(attention="triton", backend="inductor"), Stack(attention="triton", backend="none")]
    stacks += [Stack(attention=variant, backend="inductor") for variant in ("flash", "flex")]
    stacks += [
        Stack(attention="triton", backend="inductor", matmul="cublas"),
        Stack(attention="sdpa", backend="inductor"),
    ]
    if args.tiny:
        stacks = [Stack(attention="sdpa", backend=backend) for backend in ("aot_eager", "none")]
    for stack in stacks:
        if out.has(15) and stack.attention in (args.variants or gpu_attention.VARIANTS):
            stack = replace(stack, fullgraph=args.fullgraph)
            measure_group(model, group, [stack], limits, copy, 16, out, run="probe")


def static(args: argparse.Namespace, model: Any, limits: MachineLimits, copy: float, limit: int, out: Output) -> None:
    """The grid with a static cache."""
    stacks = [
        Stack(attention=args.attention, backend=backend, matmul=args.matmul, fullgraph=args.fullgraph)
        for backend in args.backends
    ]
    contexts = (16, 24) if args.tiny else (8192, 512, 2048, 32768, 131072)
    together = args.attention == "triton" or args.tiny  # its speed does not depend on what the cache could hold
    groups: list[Group | str] = []

    def add(plan: str, batch: int, chosen: tuple[int, ...]) -> None:
        for part in [chosen] if together else [(context,) for context in chosen]:
            tokens = max(max(part), 256 if args.tiny else 0) + 128
            groups.append(Group(plan=plan, batch=batch, contexts=part, tokens=tokens))

    if args.part == "one":
        for plan in args.plans:
            add(plan, 1, contexts)
        if not together:
            groups.sort(key=lambda group: contexts.index(group.contexts[0]))  # type: ignore[union-attr]
    else:
        for batch, chosen in ((16, (8192, 2048)), (0, ()), (4, (8192, 32768)), (64, (2048, 512)))[
            : 1 if args.tiny else 4
        ]:
            for plan in ("g=4", "g=1"):
                if batch == 0:
                    groups.append(plan)
                elif args.tiny:
                    add(plan, 2, (16,))
                else:
                    add(plan, batch, chosen)
    longest = 0.0 if args.tiny else 45.0
    for group in groups:
        if not out.has(longest):
            print("no time for", group, flush=True)
            continue
        began = out.elapsed()
        if isinstance(group, str):
            if not args.tiny:
                largest_group(model, group, 8192, limit, stacks[::-1], limits, copy, out)
        else:
            measure_group(model, group, stacks, limits, copy, 4 if args.tiny else 32, out)
        longest = max(longest if longest != 45.0 else 0.0, out.elapsed() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("probe", "eager", "static"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-8b")
    parser.add_argument("--tiny", action="store_true", help="a dry run with a tiny shape")
    parser.add_argument("--minutes", type=float, default=9, help="start nothing that would end later")
    parser.add_argument("--limit", type=float, default=80e9, help="bytes of the GPU that may be used")
    parser.add_argument("--out", type=Path, help="add the rows to this file")
    parser.add_argument(
        "--parts", nargs="+", choices=("cells", "largest"), default=["cells", "largest"], help="of eager"
    )
    parser.add_argument("--part", choices=("one", "batches"), default="one", help="of static")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=["g=4", "g=1", *PLANS[2:]], help="of static")
    parser.add_argument("--attention", choices=gpu_attention.VARIANTS, default="triton", help="of static")
    parser.add_argument(
        "--backends", nargs="+", default=["inductor", "none"], help="of static: of torch.compile, or none"
    )
    parser.add_argument("--matmul", choices=("inductor", "cublas"), default="inductor", help="of static, with one row")
    parser.add_argument("--variants", nargs="+", choices=gpu_attention.VARIANTS, help="of probe; all without")
    parser.add_argument("--fullgraph", action=argparse.BooleanOptionalAction, default=True, help="of torch.compile")
    args = parser.parse_args()

    device = torch.device(args.device)
    shape, dtype = ("tiny", torch.float32) if args.tiny else (args.shape, torch.bfloat16)
    out = Output(args.out, args.minutes, {})
    copy = copy_bandwidth(device)
    limits = measure_limits(device, dtype)
    free()
    limit = cap_memory(args.limit) if device.type == "cuda" else int(args.limit)
    out.common = {"device": environment(device)["device"]}
    machine = {"run": "machine", "command": args.command, "shape": shape, "environment": environment(device)}
    machine |= {"copy_bytes_per_s": copy, "machine_limits": asdict(limits), "limit_bytes": limit}
    out.write(machine)
    if args.command == "probe":
        probe(args, device, limits, copy, out)
        return
    model = random_model(shape, device.type, dtype)
    out.write({"run": "model", "shape": shape, "weights_bytes": sum(p.nbytes for p in model.parameters())})
    if args.command == "eager":
        gpu_eager.grid(model, limits, limit, args.tiny, out, args.parts)
    else:
        static(args, model, limits, copy, limit, out)
    print(f"done after {out.elapsed():.0f} s", flush=True)


if __name__ == "__main__":
    main()
