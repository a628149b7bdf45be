"""The command router: make what chooses the layers for each prompt, and compare it with one plan for all."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from depthkv.adaptive.files import AnyRouter, save_router
from depthkv.adaptive.learned import train_router
from depthkv.adaptive.measure import continuation_losses, plan_losses, varied_plans
from depthkv.adaptive.portfolio import fit_portfolio, portfolio_features
from depthkv.adaptive.similarity import passes, similarity_router
from depthkv.checkpoint import load
from depthkv.cli import inputs
from depthkv.cli.inputs import count, json_path, keep_inputs, naming, option, require_different
from depthkv.cli.output import bar, command_line, console, show, table, waiting, write_json
from depthkv.cli.plan import text_blocks
from depthkv.errors import DepthKVError
from depthkv.evaluate.intervals import Score, score
from depthkv.machine import environment
from depthkv.plan import SharingPlan

METHODS = ("portfolio", "similarity", "learned")

SIZES = (0.67, 1.0, 1.5)
"""Of the plans of a portfolio, as parts of the retention."""


def method_name(text: str) -> str:
    """One of `METHODS`."""
    if text not in METHODS:
        raise typer.BadParameter(f"expected a method among {', '.join(METHODS)}, got {text!r}")
    return text


def router_command(
    model: inputs.Model,
    data: inputs.Texts,
    out: Annotated[Path, option("--out", json_path, "FILE", "The router, such as router.safetensors.")],
    retention: Annotated[
        float, option("--retention", inputs.retention_value, "R", "Mean share of the layers that keep a cache.")
    ],
    method: Annotated[
        str, option("--method", method_name, "NAME", f"{', '.join(METHODS)}.  See docs/how-to/adaptive.md.")
    ] = METHODS[0],
    plan: Annotated[
        list[Path] | None, option("--plan", Path, "FILE", "A plan for the portfolio. Repeat it for several.")
    ] = None,
    blocks: Annotated[int, option("--blocks", count, "N", "Training blocks to make the router on.")] = 48,
    held_out_blocks: Annotated[int, option("--held-out-blocks", count, "N", "To compare on.")] = 16,
    block_size: inputs.BlockSize = 512,
    prompt_tokens: Annotated[
        int | None, option("--prompt-tokens", count, "N", "Of each block; the rest is scored.  [default: half]")
    ] = None,
    steps: Annotated[int, option("--steps", count, "N", "Of training, with --method learned.")] = 100,
    losses: Annotated[
        Path | None,
        option("--losses", json_path, "FILE", "Keeps the measured losses.  [default: OUT with .losses.json]"),
    ] = None,
    batch_size: inputs.BatchSize = 4,
    seed: inputs.Seed = 0,
    dtype: inputs.Dtype = "auto",
    device: inputs.Device = "auto",
    json_file: inputs.Json = None,
) -> None:
    """Make a router on training documents of DATA: it chooses for each prompt which layers keep their cache.

    It is compared with the best single plan of the same mean size, on held-out documents. `depthkv generate --router`
    uses the file. After Ctrl-C or a kill the same command goes on with the losses that it had measured.
    """
    if out.exists() and not out.is_file():
        raise DepthKVError(f"--out: expected a file, got {out}")
    path = losses or json_path(out.with_name(f"{out.stem}.losses.json"))
    require_different({"--out": out, "--losses": path, "--json": json_file})
    keep_inputs(json_file, model, data, plan)
    prompt = block_size // 2 if prompt_tokens is None else prompt_tokens
    if not 0 < prompt < block_size:
        raise DepthKVError(f"--prompt-tokens: expected 1 to {block_size - 1}, got {prompt}")
    if blocks < 2:
        raise DepthKVError(f"--blocks: expected at least 2, got {blocks}")
    config, kinds = inputs.read_config(model)
    with naming(model):
        inputs.require_all_weights(config)
        inputs.require_positions(config, block_size, "--block-size")
    given = [inputs.read_plan(file, kinds) for file in plan or ()]
    sizes = [min(1.0, max(retention * part, 1e-9)) for part in SIZES]
    plans = list(dict.fromkeys([*given, *(p for size in sizes for p in varied_plans(kinds, size))]))
    if min(entry.retention for entry in plans) > retention + 1e-9:
        least = min(entry.retention for entry in plans)
        raise DepthKVError(f"--retention: expected at least {least:.3g}, what the first layers take, got {retention}")
    texts = inputs.split_texts(data)
    with waiting(f"loading {model}"):
        loaded, tokenizer, _ = load(model, dtype=dtype, device=device, progress=show)
        training, _ = text_blocks(texts, 0, tokenizer, block_size, blocks)
        held_out, documents = text_blocks(texts, 1, tokenizer, block_size, held_out_blocks)
    show(f"losses of plans are kept in {path}")
    with naming(model):
        # of the sizes that are no larger than the mean the best one is what a router has to beat
        needed = plans if method == "portfolio" else [p for p in plans if p.retention <= retention + 1e-9]
        with bar("measuring plans", len(needed)) as advance:
            measured = plan_losses(loaded, needed, training, prompt, batch_size=batch_size, path=path, advance=advance)
        small = [i for i, entry in enumerate(needed) if entry.retention <= retention + 1e-9]
        static = needed[min(small, key=lambda i: float(measured[:, i].mean()))]
        prompts = [block[:prompt] for block in training]
        router: AnyRouter
        if method == "portfolio":
            with bar("reading prompts", len(prompts)) as advance:
                features = portfolio_features(loaded, needed, prompts, advance)
            router = fit_portfolio(needed, measured, features, retention, kinds)
        elif method == "similarity":
            with bar("finding the threshold", passes(len(prompts))) as advance:
                router = similarity_router(loaded, prompts, retention, advance=advance)
        else:
            with bar("training", steps) as advance:
                router = train_router(
                    loaded,
                    training,
                    retention,
                    static,
                    prompt_tokens=prompt,
                    steps=steps,
                    batch_size=batch_size,
                    seed=seed,
                    advance=advance,
                )
        with bar("comparing", 2) as advance:
            one, _ = continuation_losses(loaded, static, held_out, prompt, batch_size)
            advance(1)
            own, maps = continuation_losses(loaded, router, held_out, prompt, batch_size)
            advance(1)
    baseline = score(one, documents, seed=seed)
    found = score(own, documents, one, seed=seed)
    kept = [len(set(sources)) for sources in maps]
    figures: dict[str, Any] = {
        "model": model,
        "data": list(texts),
        "command": command_line(),
        "environment": environment(next(loaded.parameters()).device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "method": method,
        "retention": retention,
        "held_out_retention": statistics.fmean(kept) / len(kinds),
        "prompt_tokens": prompt,
        "blocks": len(training),
        "block_size": block_size,
        "static": {
            "kv_source_layers": list(static.kv_source_layers),
            "retention": static.retention,
            "loss": baseline.to_dict(),
        },
        "loss": found.to_dict(),
        "inputs": [
            {"document": name, "kv_source_layers": list(sources), "loss": loss, "static_loss": other}
            for name, sources, loss, other in zip(documents, maps, own, one, strict=True)
        ],
    }
    save_router(out, router, {key: figures[key] for key in ("model", "data", "command", "retention")})
    write_json(json_file, figures)
    _show(figures, static, baseline, found, kept, out)


def _show(
    figures: dict[str, Any], static: SharingPlan, baseline: Score, found: Score, kept: list[int], out: Path
) -> None:
    printed = console()
    goal = f"{figures['retention']:.0%} of {static.num_layers} layers on average"
    title = f"{figures['model']}: {figures['method']} router for {goal}"
    printed.print(title, style="bold", markup=False, soft_wrap=True)
    rows = [
        ["one plan for all", f"{len(static.leaders)}", f"{baseline.value:.3f}", ""],
        [
            f"{figures['method']} router",
            f"{statistics.fmean(kept):.1f} ({min(kept)} to {max(kept)})",
            f"{found.value:.3f}",
            _difference(found),
        ],
    ]
    names = ["the layers are chosen by", "leaders", "held-out loss", "against one plan [95 %]"]
    printed.print(table(names, rows, "Loss of what follows the prompts, nats per token"))
    used = dict.fromkeys(entry["document"] for entry in figures["inputs"])
    printed.print(
        f"Made on {figures['blocks']} blocks, compared on {len(kept)} of {len(used)} document"
        f"{'s' * (len(used) != 1)}: {', '.join(used)}"
        + ("" if len(used) > 1 else "; from one document no interval can be told"),
        markup=False,
        soft_wrap=True,
    )
    if found.difference is not None and found.difference >= 0:
        printed.print(
            "On these blocks the router is no better than the one plan, which stands in --json", soft_wrap=True
        )
    printed.print(f"{out}: for depthkv generate --router", markup=False, soft_wrap=True)


def _difference(found: Score) -> str:
    low, high = found.difference_low, found.difference_high
    known = low is not None and low == low and high is not None
    return f"{found.difference:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if known else "")
