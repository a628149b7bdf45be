"""Decoding with a static cache: one step as a CUDA graph, of transformers' code as it is or of what torch.compile made.

The token that a step chose and the next position are written in place within the graph, so that replaying it decodes.
The cache is not filled by a prompt: its values are random and its length is set, which the speed does not depend on.
What is computed is checked against eager decoding after a real prompt.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import gpu_attention
import torch
from gpu_model import Output, make_plan, seconds_of
from transformers import DynamicCache, StaticCache

from depthkv import SharingPlan, share
from depthkv.decoder import find_decoder
from depthkv.memory import cache_bytes, device_room, kv_bytes_per_token, measured_cache_bytes
from depthkv.roofline import MachineLimits, forward_work, roofline

CHECK_TOKENS = 200
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cells that share one compilation: the same plan and batch, and a static cache for the longest context."""

    plan: str
    batch: int
    contexts: tuple[int, ...]
    tokens: int
    """Of the static cache."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """How a step is run."""

    attention: str
    """One of `gpu_attention.VARIANTS`."""
    backend: str
    """Of torch.compile; "none" leaves the code as it is."""
    matmul: str = "inductor"
    """`inductor` lets it write products with one row itself (coordinate descent tuning), `cublas` does not."""
    fullgraph: bool = True
    """Of torch.compile: what it cannot trace is an error."""

    @property
    def name(self) -> str:
        """Short."""
        return "CUDA graph" if self.backend == "none" else f"CUDA graph, {self.backend}"


def sharing(model: Any, plan: SharingPlan) -> AbstractContextManager[Any]:
    """`share`, or the model as it is."""
    return nullcontext() if plan.is_full else share(model, plan)


class Decoding:
    """A static cache and a step over it, for one group. Use it within `sharing` and `torch.no_grad()`."""

    def __init__(self, model: Any, plan: SharingPlan, batch: int, tokens: int, attention: str) -> None:
        self.model, self.plan, self.batch, self.tokens = model, plan, batch, tokens
        device = model.device
        self.device = device
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.cache = StaticCache(config=model.config, max_cache_len=tokens)
        if not plan.is_full:
            from depthkv.cache import fit_cache

            fit_cache(self.cache, plan)
        gpu_attention.lay_out(self.cache, model, batch, by_token=attention == "flash")

    def start(self, tokens: int) -> None:
        """The next step writes position `tokens`."""
        self.position.fill_(tokens)
        gpu_attention.set_length(self.cache, tokens)

    def step(self) -> torch.Tensor:
        """Decode one token of each sequence; its logits."""
        logits = self.model(
            input_ids=self.token,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)
        result: torch.Tensor = logits
        return result

    def compiled(self, stack: Stack) -> Step:
        """The step by torch.compile."""
        if stack.backend == "none":
            return self.step
        step: Step = torch.compile(self.step, fullgraph=stack.fullgraph, dynamic=False, backend=stack.backend)
        return step

    def captured(self, step: Step) -> Step:
        """A CUDA graph of the step; on a CPU the step itself."""
        self.start(1)
        if self.device.type != "cuda":
            step()
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay

    def error(self, step: Step) -> dict[str, float]:
        """Of one step's logits after a real prompt, against eager decoding with a dynamic cache.

        `relative_error` is the norm of the difference over the norm; `same_token` the share of equal choices.
        """
        model, batch = self.model, self.batch
        saved = model.config._attn_implementation
        generator = torch.Generator().manual_seed(1)
        shape = (1, CHECK_TOKENS)
        prompt = torch.randint(model.config.vocab_size, shape, generator=generator).to(self.device)
        token = torch.full((1, 1), 7, device=self.device)
        try:
            gpu_attention.use(model, "sdpa")
            past = DynamicCache(config=model.config)
            model(input_ids=prompt, past_key_values=past, use_cache=True, logits_to_keep=1)
            kept = {leader: (past.layers[leader].keys, past.layers[leader].values) for leader in self.plan.leaders}
            expected = model(input_ids=token, past_key_values=past, use_cache=True, logits_to_keep=1).logits.float()
        finally:
            model.config._attn_implementation = saved
        for leader, (keys, values) in kept.items():
            layer = self.cache.layers[leader]
            layer.keys[:, :, :CHECK_TOKENS].copy_(keys.expand(batch, -1, -1, -1))
            layer.values[:, :, :CHECK_TOKENS].copy_(values.expand(batch, -1, -1, -1))
        self.start(CHECK_TOKENS)
        self.token.copy_(token.expand(batch, 1))
        found = step().float()
        difference = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        same = found.argmax(-1) == expected.argmax(-1)
        return {"relative_error": float(difference.max()), "same_token": float(same.float().mean())}

    def seconds(self, step: Step, context: int, steps: int, repeats: int) -> list[float]:
        """Of one step from `context` tokens on, the mean over `steps`, several times."""
        values = []
        for _ in range(repeats + 1):
            self.start(context)

            def run() -> None:
                for _ in range(steps):
                    step()

            values.append(seconds_of(run, self.device) / steps)
        return values[1:]


def configure(stack: Stack) -> None:
    """Settings of the compiler."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    inductor.coordinate_descent_tuning = stack.matmul == "inductor"


def free() -> None:
    """Give memory back, so that the next group finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_group(
    model: Any,
    group: Group,
    stacks: Sequence[Stack],
    limits: MachineLimits,
    copy: float,
    steps: int,
    out: Output,
    run: str = "static",
) -> bool:
    """Every context of the group with every stack; a stack that fails leaves a row that says why.

    Returns whether none failed.
    """
    done = True
    plan = make_plan(group.plan, model.config.num_hidden_layers)
    for stack in stacks:
        row: dict[str, Any] = {"run": run, "stack": stack.name, "attention": stack.attention, "plan": group.plan}
        row |= {"leaders": list(plan.leaders), "batch_size": group.batch, "static_tokens": group.tokens}
        row |= {"matmul": stack.matmul if stack.backend == "inductor" and group.batch == 1 else "cublas"}
        try:
            _measure(model, group, stack, plan, limits, copy, steps, out, row)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            message = re.sub(r"(/[\w.-]+){2,}", "...", text[0])[:300]  # no paths of the machine
            out.write({**row, "failed": f"{type(error).__name__}: {message}"})
            done = False
        free()
    return done


def _measure(
    model: Any,
    group: Group,
    stack: Stack,
    plan: SharingPlan,
    limits: MachineLimits,
    copy: float,
    steps: int,
    out: Output,
    row: dict[str, Any],
) -> None:
    configure(stack)
    gpu_attention.use(model, stack.attention)
    with sharing(model, plan), torch.no_grad():
        decoding = Decoding(model, plan, group.batch, group.tokens, stack.attention)
        began = time.monotonic()
        step = decoding.captured(decoding.compiled(stack))
        row["preparation_s"] = round(time.monotonic() - began, 1)
        row |= decoding.error(step)
        decoder = find_decoder(model)
        for context in group.contexts:
            values = decoding.seconds(step, context, steps, repeats=3)
            seconds = statistics.median(values)
            work = forward_work(
                decoder, plan, batch_size=group.batch, new_tokens=1, past_tokens=context + (steps - 1) // 2
            )
            figures = roofline({"decode": work}, limits, {"decode": seconds})
            cells: dict[str, Any] = {
                "context": context,
                "seconds": seconds,
                "seconds_range": [min(values), max(values)],
            }
            cells |= {"tokens_per_s": group.batch / seconds, "decode_share": figures["decode_share"]}
            cells |= {"limit_s": figures["decode_limit_s"], "copy_share": work.num_bytes / copy / seconds}
            cells |= {"read_bytes": work.num_bytes, "weight_bytes": work.weight_bytes}
            cells |= {
                "cache_bytes": cache_bytes(model.config, model.dtype, context + steps, group.batch, plan),
                "static_bytes": measured_cache_bytes(decoding.cache),
            }
            if decoding.device.type == "cuda":
                cells["peak_bytes"] = torch.cuda.max_memory_allocated()
            out.write({**row, **cells})
        del decoding, step


def largest_group(
    model: Any,
    name: str,
    context: int,
    limit: int,
    stacks: Sequence[Stack],
    limits: MachineLimits,
    copy: float,
    out: Output,
) -> None:
    """As many sequences as fit into `limit` bytes beside the weights and what reading one prompt needs, by formula;
    fewer where that is too many."""
    steps = 16
    plan = make_plan(name, model.config.num_hidden_layers)
    tokens = context + 64
    room = device_room(model.config, model.dtype, limit, context, 1, plan) - limit // 100
    batch = room // (kv_bytes_per_token(model.config, model.dtype, plan) * tokens)
    for _ in range(4):
        group = Group(plan=name, batch=batch, contexts=(context,), tokens=tokens)
        if measure_group(model, group, stacks, limits, copy, steps, out, run="largest") or not out.has(30):
            return
        batch = int(batch * 0.97)
