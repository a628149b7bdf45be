"""The command generate: text, and the cache that it took, under a plan, a recipe, a router and a budget."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from depthkv.adaptive import AdaptiveModel, Router, StepReport
from depthkv.adaptive.files import load_router
from depthkv.adaptive.similarity import passes, similarity_router
from depthkv.architectures import max_positions
from depthkv.checkpoint import load
from depthkv.cli import inputs
from depthkv.cli.inputs import count, naming, option
from depthkv.cli.output import command_line, console, progress_bar, show, waiting, write_json
from depthkv.compress.recipe import CacheRecipe
from depthkv.data import resolve_data, token_blocks
from depthkv.errors import DepthKVError
from depthkv.evaluate.perplexity import spread
from depthkv.machine import environment
from depthkv.memory import cache_bytes, format_bytes, measured_cache_bytes, parse_bytes
from depthkv.plan import SharingPlan
from depthkv.sharing import share

FORMAT, VERSION = "depthkv-generation", 1

_CALIBRATION = (12, 128)
"""Prompts, and tokens of each at most, that the threshold of --adaptive is found on: seconds on a CPU."""


def generate_command(
    model: inputs.Model,
    prompt: Annotated[
        list[str],
        typer.Option("--prompt", metavar="TEXT", help="What the text goes on from. Repeat it for several at once."),
    ],
    plan: inputs.PlanFile = None,
    recipe: inputs.RecipeFile = None,
    retention: inputs.Retention = None,
    adaptive: Annotated[
        bool,
        typer.Option(
            "--adaptive", help="Choose the layers for each prompt by similarity, for a mean of about --retention."
        ),
    ] = False,
    router: Annotated[
        Path | None, typer.Option("--router", metavar="FILE", help="Choose the layers for each prompt by this router.")
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            "--kv-budget", metavar="SIZE", help="Most bytes of the cache, such as 64MiB: layers are given up for it."
        ),
    ] = None,
    max_new_tokens: Annotated[int, option("--max-new-tokens", count, "N", "Most tokens to write.")] = 64,
    temperature: Annotated[
        float, option("--temperature", inputs.not_negative, "T", "0 takes the likeliest token.")
    ] = 0.0,
    seed: inputs.Seed = 0,
    dtype: inputs.Dtype = "auto",
    device: inputs.Device = "auto",
    json_file: inputs.Json = None,
) -> None:
    """Text, and the size of the cache that it took.

    Without --plan, --recipe, --retention, --adaptive or --router, the checkpoint's own plan holds, if it has one.
    """
    inputs.refuse_beside_recipe(
        recipe, plan=plan, retention=retention, router=router, adaptive=adaptive, kv_budget=kv_budget
    )
    _refuse_several(plan, retention, adaptive, router)
    inputs.keep_inputs(json_file, model, plan, recipe, router)
    for text in prompt:
        if not text.strip():
            raise DepthKVError(f"--prompt: expected text, got {text!r}")
    with naming("--kv-budget"):
        budget = None if kv_budget is None else parse_bytes(kv_budget)
    config, kinds = inputs.read_config(model)
    with naming(model):
        how: SharingPlan | CacheRecipe | Router = inputs.choose_plan(
            plan, None if adaptive or router else retention, config, kinds, default=1.0
        )
        if recipe is not None:
            how = inputs.read_recipe(recipe, kinds)
    if router is not None:
        how = load_router(router, kinds)
    with waiting(f"loading {model}"):
        loaded, tokenizer, _ = load(model, dtype=dtype, device=device, progress=show)
    encoded = _encode(tokenizer, prompt).to(loaded.device)
    prompt_tokens = encoded["attention_mask"].sum(dim=1).tolist()
    if min(prompt_tokens) == 0:
        empty = prompt[prompt_tokens.index(0)]
        raise DepthKVError(f"--prompt: expected text that the tokenizer knows, got {empty!r}")
    longest = max(prompt_tokens)
    inputs.require_positions(config, longest + max_new_tokens, "--prompt and --max-new-tokens together")
    if adaptive:
        assert retention is not None
        with naming(model):
            how = _similarity(loaded, tokenizer, config, retention, round(sum(prompt_tokens) / len(prompt_tokens)))
    torch.manual_seed(seed)
    settings = _generation_settings(loaded, tokenizer, temperature, max_new_tokens)
    steps: list[StepReport] = []
    with ExitStack() as stack:
        stack.enter_context(naming(model))
        handle = stack.enter_context(share(loaded, how, kv_budget=budget))
        if isinstance(handle, AdaptiveModel):
            handle.on_step = steps.append
        if isinstance(how, CacheRecipe):
            stack.callback(_watch(loaded, how, steps).remove)
        stack.enter_context(waiting("writing"))
        result: Any = loaded.generate(**encoded, generation_config=settings)
    written = [_written(row[longest:].tolist(), tokenizer, settings) for row in result.sequences]
    plan_used = how.plan if isinstance(how, CacheRecipe) else how
    maps = steps[0].maps if steps else [plan_used.kv_source_layers] * len(prompt)  # type: ignore[union-attr]
    sequences = [
        {
            "prompt": text,
            "text": tokenizer.decode(tokens, skip_special_tokens=True),
            "prompt_tokens": number,
            "new_tokens": len(tokens),
            "kv_source_layers": list(sources),
            "leaders": sorted(set(sources)),
        }
        for text, tokens, number, sources in zip(prompt, written, prompt_tokens, maps, strict=True)
    ]
    held = max([measured_cache_bytes(result.past_key_values), *(step.cache_bytes for step in steps)])
    figures = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "command": command_line(),
        "environment": environment(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "num_layers": len(kinds),
        "router": None if isinstance(how, (SharingPlan, CacheRecipe)) else type(how).__name__,
        "cache_recipe": how.figures() if isinstance(how, CacheRecipe) else None,
        "kv_budget": budget,
        "ended_by_budget": isinstance(handle, AdaptiveModel) and handle.ended_for_room,
        "retention": sum(len(entry["leaders"]) for entry in sequences) / len(sequences) / len(kinds),
        "peak_cache_bytes": held,
        "cache_bytes": measured_cache_bytes(result.past_key_values),
        # the last token was chosen and never read, so it is in no cache
        "full_cache_bytes": cache_bytes(config, loaded.dtype, result.sequences.shape[1] - 1, len(prompt)),
        **{key: sequences[0][key] for key in ("prompt", "text", "leaders", "prompt_tokens", "new_tokens")},
        "sequences": sequences,
        "steps": [
            {
                "num_tokens": step.num_tokens,
                "cache_bytes": step.cache_bytes,
                "leaders": [len(set(sources)) for sources in step.maps],
                "given_up": [list(entry) for entry in step.given_up],
            }
            for step in steps
        ],
    }
    write_json(json_file, figures)
    _show(figures, retention if adaptive else None)


def _refuse_several(plan: Path | None, retention: float | None, adaptive: bool, router: Path | None) -> None:
    if router is not None and (plan or adaptive or retention is not None):
        other = "--plan" if plan else "--adaptive" if adaptive else "--retention"
        raise DepthKVError(f"expected --router or {other}, got both")
    inputs.refuse_both(plan, retention)
    if adaptive and retention is None:
        raise DepthKVError("expected --retention with --adaptive, got none")


def _watch(model: Any, recipe: CacheRecipe, steps: list[StepReport]) -> Any:
    """Report what the cache holds after each forward; returns a handle whose `remove` ends it."""

    def watch(module: Any, given: Any, output: Any) -> None:
        cache = output.past_key_values
        maps = (recipe.plan.kv_source_layers,) * len(output.logits)
        steps.append(
            StepReport(
                num_tokens=int(cache.get_seq_length()), cache_bytes=measured_cache_bytes(cache), maps=maps, given_up=()
            )
        )

    # PEFT's generate() calls the model inside it
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.register_forward_hook(watch)


def _encode(tokenizer: Any, prompts: list[str]) -> Any:
    """Tokens of all prompts, padded on the left."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    tokenizer.padding_side = "left"
    return tokenizer(prompts, return_tensors="pt", return_token_type_ids=False, padding=True)


def _similarity(model: Any, tokenizer: Any, config: Any, retention: float, prompt_tokens: int) -> Router:
    """A router for the mean retention on text of the package's own, in prompts about as long as the given ones."""
    number, most = _CALIBRATION
    # layers of a short prompt are farther apart than those of a long one
    tokens = max(2, min(most, max_positions(config) or most, prompt_tokens))
    blocks = token_blocks(resolve_data("builtin:fallback"), tokenizer, tokens)
    chosen = list(blocks[spread(len(blocks), min(number, len(blocks)))])
    with progress_bar("finding the threshold", passes(len(chosen))) as advance:
        return similarity_router(model, chosen, retention, advance=advance)


def _written(tokens: list[int], tokenizer: Any, settings: Any) -> list[int]:
    """Without the padding of a sequence that ended before others; its end-of-text token counts."""
    ends = settings.eos_token_id if settings.eos_token_id is not None else tokenizer.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]


def _show(figures: dict[str, Any], asked: float | None) -> None:
    out = console()
    # soft_wrap: text is for reading or for a pipe, its lines are its own
    for entry in figures["sequences"]:
        out.print(f"{entry['prompt']}{entry['text']}\n", markup=False, soft_wrap=True)
    held, full, layers = figures["peak_cache_bytes"], figures["full_cache_bytes"], figures["num_layers"]
    saved = "" if held == full else f", {full / held:.2f} times smaller than {format_bytes(full)} with every layer's"
    kept = _listed([len(entry["leaders"]) for entry in figures["sequences"]])
    words = f"{kept} of {layers} layers keep one"
    if figures["cache_recipe"] is not None:
        words = figures["cache_recipe"]["words"]
    tokens = " and ".join(f"{entry['prompt_tokens']} + {entry['new_tokens']}" for entry in figures["sequences"])
    out.print(f"{tokens} tokens; largest cache {format_bytes(held)}{saved}; {words}", style="dim", soft_wrap=True)
    if asked is not None and abs(figures["retention"] - asked) > 0.05:
        got = f"{figures['retention']:.0%} of the layers, {asked:.0%} was asked for"
        out.print(f"{got}: the threshold was found on other text; make a router on your own (depthkv router)")
    if (steps := figures["steps"]) and steps[0]["leaders"] != steps[-1]["leaders"]:
        in_the_end, budget = _listed(steps[-1]["leaders"]), format_bytes(figures["kv_budget"] or 0)
        out.print(f"{in_the_end} in the end, to stay within {budget}", style="dim")
    if figures["ended_by_budget"]:
        out.print("ended early: the budget has no room for another token", style="dim")


def _listed(counts: list[int]) -> str:
    return " and ".join(map(str, counts)) if len(set(counts)) > 1 else str(counts[0])


def _generation_settings(model: Any, tokenizer: Any, temperature: float, max_new_tokens: int) -> Any:
    """The checkpoint's own settings, made greedy or set to the temperature: one text for each prompt."""
    settings = copy.deepcopy(model.generation_config)
    settings.max_new_tokens, settings.max_length = max_new_tokens, None
    settings.return_dict_in_generate = settings.use_cache = True
    settings.num_beams = settings.num_return_sequences = 1
    settings.cache_implementation = settings.prefill_chunk_size = settings.prompt_lookup_num_tokens = None
    settings.do_sample = temperature > 0
    settings.temperature = temperature if temperature > 0 else None
    if not settings.do_sample:
        settings.top_p = settings.top_k = None  # they only mean something in sampling, and transformers warns of them
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return settings
