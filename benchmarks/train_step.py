"""Time and memory of a routed training step, without and with distillation, against an ordinary one in the same run.

All are whole steps (forward, backward, clipping, AdamW) of the same model on the same random tokens.

    python benchmarks/train_step.py --model builtin:smollm2-135m --steps 7
    python benchmarks/train_step.py --shape qwen3-1.7b --device cuda --block-size 2048      # random weights
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from gpu_model import SHAPES, random_model
from torch import nn

from depthkv import RandomCrossLayer, load, route
from depthkv.adapt.config import has_fast_bf16
from depthkv.adapt.cpu_attention import FasterCpuAttention
from depthkv.adapt.loss import LossFunction
from depthkv.adapt.modes import compiled
from depthkv.adapt.objectives import Distillation, LanguageModelLoss, Objective
from depthkv.adapt.teacher import FrozenTeacher
from depthkv.decoder import find_decoder


def reset_peak(device: torch.device) -> None:
    """Start to measure the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Peak since `reset_peak`: allocated GPU memory, or resident memory of the process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def train_step(
    model: nn.Module,
    loss_function: LossFunction,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    bf16: bool,
) -> float:
    """Seconds of one step."""
    device = tokens.device
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = loss_function({"input_ids": tokens})
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of that shape instead of a model")
    parser.add_argument("--layers", type=int, help="fewer or more layers than the shape has")
    parser.add_argument("--out", type=Path, help="add the figures to this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each kind")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--cross-layer-prob", type=float, default=0.6)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--compile", action="store_true", help="also routed with compiled norms and MLPs")
    args = parser.parse_args()

    if args.shape:
        model = random_model(args.shape, args.device, torch.float32, args.layers)
    else:
        model, _, _ = load(args.model, dtype="float32", device=args.device)
    model.train()
    device = next(model.parameters()).device
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_fast_bf16(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    sampler = RandomCrossLayer(cross_layer_prob=args.cross_layer_prob)
    generator = torch.Generator().manual_seed(0)
    distillation = Distillation(teacher=FrozenTeacher(model), weight=0.5)
    arms: dict[str, Objective] = {
        "ordinary": LanguageModelLoss(),
        "routed": LanguageModelLoss(),
        "distilled": distillation,  # routed, too
    }
    if args.compile:
        arms["compiled"] = LanguageModelLoss()  # routed, too
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    peaks: dict[str, list[int]] = {arm: [] for arm in arms}
    names = list(arms)
    with FasterCpuAttention():
        for step in range(args.steps + 1):
            shape = (args.batch_size, args.block_size)
            tokens = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
            # whichever comes first could be at an advantage, so they take turns
            for arm in names[step % len(names) :] + names[: step % len(names)]:
                reset_peak(device)
                with (
                    arms[arm].bound(model, torch.bfloat16 if bf16 else torch.float32) as loss_function,
                    nullcontext() if arm == "ordinary" else route(model, sampler, step=step),
                    compiled(find_decoder(model), arm == "compiled"),
                ):
                    elapsed = train_step(model, loss_function, optimizer, tokens, bf16)
                if step > 0:  # the first round warms up
                    seconds[arm].append(elapsed)
                    peaks[arm].append(peak_bytes(device) or 0)

    tokens_per_step = args.batch_size * args.block_size
    result: dict[str, object] = {
        "run": "train",
        "model": f"random weights, {args.shape}" if args.shape else args.model,
        "layers": model.config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": "bf16" if bf16 else "fp32",
        "batch_size": args.batch_size,
        "block_size": args.block_size,
        "steps": args.steps,
    }
    print(f"{'step':10} {'median s':>9} {'min s':>8} {'max s':>8} {'tok/s':>8} {'peak GiB':>9}")
    for arm, values in seconds.items():
        median, peak = statistics.median(values), statistics.median(peaks[arm])
        result[arm] = {"median_s": median, "min_s": min(values), "max_s": max(values), "peak_bytes": peak}
        speed = tokens_per_step / median
        print(f"{arm:10} {median:9.3f} {min(values):8.3f} {max(values):8.3f} {speed:8.0f} {peak / 2**30:9.3f}")
    # steps of a round ran side by side, so the median of their ratios suffers less from a busy machine
    for arm in names[1:]:
        for what, values in (("time", seconds), ("memory", peaks)):
            ratios = [ours / max(1e-9, plain) for ours, plain in zip(values[arm], values["ordinary"], strict=True)]
            result[f"{arm}_{what}_ratio"] = statistics.median(ratios)
        shown = ", ".join(f"{what} {result[f'{arm}_{what}_ratio']:.3f}x" for what in ("time", "memory"))
        print(f"{arm} / ordinary: {shown}")
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
