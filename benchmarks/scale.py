"""Adaptation at scale: every method for the same, large number of tokens, all at once on the GPUs that there are.

`prepare` turns texts into one file of tokens. `run` starts a process for each arm, lets all of them train together for
a while to see how fast they are, gives each as many tokens as all can take in the time left, and waits. Each arm
measures its model on held-out documents and appends a line to DIR/scale.jsonl; models stay in DIR.

    python benchmarks/scale.py prepare --data builtin:anarchism linux-doc --unseen builtin:brown --out text.safetensors
    python benchmarks/scale.py run --text text.safetensors --tokens 50331648 --seconds 1140 --out DIR
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from methods import METHODS, Method, measured_plans, save_method, train_loss, train_method
from safetensors import safe_open
from safetensors.torch import save_file

from depthkv import SharingPlan, load
from depthkv.adapt import AdaptConfig, adapt
from depthkv.adapt.adapters import LoraSettings, add_adapter
from depthkv.architectures import layer_kinds
from depthkv.checkpoint import load_tokenizer
from depthkv.data import resolve_data, split_documents, token_blocks
from depthkv.evaluate import retention_curve, spread_blocks
from depthkv.files import write_text
from depthkv.machine import environment

ARMS: dict[str, Method] = {
    **{name: METHODS[name] for name in ("base", "cla@2", "cla@4", "rd-cla@2", "rd-cla@4", "even leader-subset")},
    "default recipe": METHODS["base .7, then lora"],
    # as large as 12 MB allow; a learning rate of 1e-3 was worse on validation
    "lora, even leader-subset": replace(METHODS["lora, even leader-subset"], lora=LoraSettings(rank=19, alpha=38)),
}
FULL_RATE, SHARED_RATE = 7e-4, 1e-3
"""Peak learning rates of all weights: with the full cache, and of what has to change more."""


def prepare(args: argparse.Namespace) -> None:
    """Tokens as int16 (ids less 2^15), which safetensors of every age know."""
    tokenizer = load_tokenizer(args.model)
    tensors, train, counts = {}, [], {}
    for name in args.data + args.unseen:
        label = name.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
        documents = resolve_data(name)
        if name in args.unseen:
            held_out = documents
        else:
            documents, held_out = split_documents(documents)
            train.append(token_blocks(documents, tokenizer, args.block_size))
            counts[label] = train[-1].numel()
        for part, some in zip(("validation", "test"), split_documents(held_out, 0.5, seed=1), strict=True):
            blocks = token_blocks(some, tokenizer, args.block_size)
            tensors[f"{part}/{label}"] = _packed(spread_blocks(blocks, args.blocks))
    tensors["train"] = _packed(torch.cat(train))
    save_file(tensors, args.out, metadata={"train_tokens": json.dumps(counts), "unseen": json.dumps(args.unseen)})
    print(json.dumps({"train_tokens": sum(counts.values()), **counts}))


def _packed(blocks: torch.Tensor) -> torch.Tensor:
    return (blocks - 2**15).to(torch.int16)


def read_blocks(path: Path) -> tuple[torch.Tensor, dict[str, dict[str, torch.Tensor]]]:
    """Training blocks, and held-out ones by part ("validation", "test") and text."""
    held: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(path, "pt") as file:
        train = file.get_tensor("train").long() + 2**15
        for name in sorted(set(file.keys()) - {"train"}):
            part, _, text = name.partition("/")
            held.setdefault(part, {})[text] = file.get_tensor(name).long() + 2**15
    return train, held


def arm(args: argparse.Namespace) -> None:
    """One process: wait to be told how many tokens, train, measure, save."""
    device, method, out = torch.device(args.device), ARMS[args.name], args.out
    slug = args.name.replace(" ", "-").replace(",", "")
    train, held = read_blocks(args.text)
    model, tokenizer, _ = load(args.model, dtype="float32", device=args.device)
    settings: dict[str, Any] = {
        "learning_rate": FULL_RATE if args.name == "base" else SHARED_RATE,
        "batch_size": args.batch_size,
        "block_size": train.shape[1],
        "compile": args.compile,
        "seed": args.seed,
        **method.recipe,
    }
    if args.learning_rate is not None:
        settings["learning_rate"] = args.learning_rate
    if args.together:
        if args.together < time.time():
            sys.exit("expected a longer --warm-up: the models have only been loaded")
        speed = _speed(copy.deepcopy(model), train, method, settings, args)
        write_text(out / f"{slug}.speed.json", json.dumps({"tokens_per_second": speed}), "the speed")
    go = out / "go.json"
    while not go.exists():
        time.sleep(0.2)
    settings["max_tokens"] = json.loads(go.read_text(encoding="utf-8"))["tokens"]
    started = time.perf_counter()
    torch.manual_seed(args.seed)

    def tell(info: Any) -> None:
        if info.step % 200 == 0:
            print(f"{args.name}: {info.tokens:,} tokens, {info.seconds:.0f} s, loss {info.loss:.3f}", flush=True)

    model, result, config, spent = train_method(
        model, train, method, settings, base_learning_rate=FULL_RATE, on_step=tell
    )
    row: dict[str, Any] = {
        "run": "scale",
        "method": args.name,
        "tokens": result.tokens + spent,
        "train_tokens": train.numel(),
        "seconds": round(time.perf_counter() - started, 1),
        "num_trained": result.num_trained,
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "block_size": config.block_size,
        "seed": args.seed,
        "train_loss": train_loss(result),
        "environment": environment(device),
    }
    plans = measured_plans(layer_kinds(model.config))
    row["rank"] = method.lora.rank if method.lora is not None else None
    with torch.autocast(device.type, torch.bfloat16) if config.uses_bf16(device) else nullcontext():
        for part, texts in held.items():
            row[part] = {text: _losses(model, blocks, plans) for text, blocks in texts.items()}
    with (out / "scale.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{args.name}: measured", flush=True)
    save_method(out / slug, model, tokenizer, plans["every 2"], args.model, method)
    print(f"{args.name}: saved", flush=True)


def _losses(model: Any, blocks: torch.Tensor, plans: dict[str, SharingPlan]) -> dict[str, float]:
    rows = retention_curve(model, blocks, list(plans.values()), batch_size=8)
    return {name: round(row.loss, 4) for name, row in zip(plans, rows, strict=True)}


def _speed(
    model: Any, train: torch.Tensor, method: Method, settings: dict[str, Any], args: argparse.Namespace
) -> float:
    """Training tokens per second in the last third of the time until `args.together`, beside all other arms.

    Of an arm with an ordinary stage and an adapter, this is the adapter, which is slower.
    """
    seconds = args.together - time.time()
    seen: list[tuple[float, int]] = []

    def tell(info: Any) -> None:
        seen.append((time.time(), info.tokens))

    config = AdaptConfig(**{**settings, "max_minutes": seconds / 60, "learning_rate": 1e-6})
    if method.lora is not None:
        model = add_adapter(model, method.lora)
    adapt(model, train, config, sampler=method.sampler(0, method.prob), on_step=tell, progress=False)
    late = [(at, tokens) for at, tokens in seen if at > args.together - seconds / 3]
    return (late[-1][1] - late[0][1]) / (late[-1][0] - late[0][0])


def run(args: argparse.Namespace) -> None:
    """Start an arm's process for each method, decide on the number of tokens, wait."""
    args.out.mkdir(parents=True, exist_ok=True)
    gpus = max(1, torch.cuda.device_count())
    for old in (args.out / "go.json", *args.out.glob("*.speed.json")):
        old.unlink(missing_ok=True)
    started = time.time()
    processes = []
    for index, name in enumerate(args.arms):
        command = [sys.executable, __file__, "arm", name, "--device", "cuda" if torch.cuda.is_available() else "cpu"]
        command += [
            "--together",
            str(started + args.warm_up if args.warm_up else 0),
            "--text",
            str(args.text),
            "--out",
            str(args.out),
        ]
        command += ["--model", args.model, "--batch-size", str(args.batch_size), "--seed", str(args.seed)]
        command += ["--compile"] if args.compile else []
        command += ["--learning-rate", str(args.learning_rate)] if args.learning_rate is not None else []
        # the Trainer takes the first GPU that it sees
        processes.append(subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": str(index % gpus)}))
    tokens = args.tokens
    if args.warm_up:
        while len(speeds := sorted(args.out.glob("*.speed.json"))) < len(processes):
            if any(process.poll() for process in processes):
                sys.exit("an arm failed")
            time.sleep(0.2)
        rates = {path.stem: json.loads(path.read_text(encoding="utf-8"))["tokens_per_second"] for path in speeds}
        left = args.seconds - (time.time() - started)
        tokens = min(tokens, int(args.margin * min(rates.values()) * left))
        print(json.dumps({"rates": {name: round(rate) for name, rate in rates.items()}, "left": left}), flush=True)
    step = args.batch_size * read_blocks(args.text)[0].shape[1]
    tokens = tokens // step * step
    print(f"{tokens:,} tokens each", flush=True)
    write_text(args.out / "go.json", json.dumps({"tokens": tokens}), "the number of tokens")
    sys.exit(max(process.wait() for process in processes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("prepare")
    first.add_argument("--data", nargs="+", required=True, help="texts to train on; a tenth of each is held out")
    first.add_argument("--unseen", nargs="*", default=[], help="texts to measure on alone")
    first.add_argument("--block-size", type=int, default=1024)
    first.add_argument("--blocks", type=int, default=32, help="of validation and of test, of each text")
    first.set_defaults(run=prepare)
    one, all_ = commands.add_parser("arm"), commands.add_parser("run")
    one.add_argument("name", choices=list(ARMS))
    one.add_argument("--device", required=True)
    one.add_argument("--together", type=float, required=True, help="until when to measure the speed, Unix time; 0: not")
    one.set_defaults(run=arm)
    all_.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    all_.add_argument("--tokens", type=int, required=True, help="at most, of each arm")
    all_.add_argument("--seconds", type=float, required=True, help="for everything but the measurements at the end")
    all_.add_argument("--warm-up", type=float, default=90, help="seconds until the speed is known; 0: --tokens it is")
    all_.add_argument("--margin", type=float, default=1.0, help="of the slowest speed; > 1 if others end first")
    all_.set_defaults(run=run)
    for command in (first, one, all_):
        command.add_argument("--model", default="builtin:smollm2-135m")
        command.add_argument("--out", type=Path, required=True)
    for command in (one, all_):
        command.add_argument("--text", type=Path, required=True)
        command.add_argument("--batch-size", type=int, default=8)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--compile", action="store_true")
        command.add_argument("--learning-rate", type=float, help="instead of each arm's own")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
