"""Loss and answers against bytes for depth alone, bits alone, tokens alone, every pair, and all three.

For every subset of the axes and every size (so many times smaller than the full cache of one sequence of --context
tokens) the joint planner chooses a recipe by training documents (or, with --validation, half of
the held-out ones); its loss is measured on held-out ones. Recipes of
smaller subsets are known to the larger ones. One JSON line per subset and size is appended to --out; what is there is
not done again, and all losses are kept in --keep, so a run that was stopped goes on.

    python benchmarks/joint.py DIR --label "essay adapter" --plan plan.json \\
        --keep joint-losses.json --out docs/raw/joint.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthkv import load, share
from depthkv.architectures import layer_kinds
from depthkv.cli.joint import halves_of_held_out, read_ladder
from depthkv.cli.plan import text_blocks
from depthkv.compress.figures import plain
from depthkv.compress.losses import RecipeLosses
from depthkv.compress.planner import Chosen, choose_recipe, subsets
from depthkv.compress.recipe import CacheRecipe
from depthkv.compress.space import Space, axes_of
from depthkv.data import resolve_data, split_documents
from depthkv.errors import RecipeError
from depthkv.evaluate.intervals import score
from depthkv.evaluate.qa import answer, answer_scores
from depthkv.evaluate.retrieval import retrieval_items, retrieve
from depthkv.machine import environment
from depthkv.memory import cache_bytes
from depthkv.qa import read_squad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--label", required=True)
    parser.add_argument("--plan", type=Path, nargs="+", required=True, help="of `depthkv plan`, with nested plans")
    parser.add_argument("--data", nargs="+", default=["builtin:anarchism"])
    parser.add_argument("--keep", type=Path, required=True, help="file of losses; the held-out ones lie beside it")
    parser.add_argument("--factors", type=float, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--held-out-blocks", type=int, default=16)
    parser.add_argument(
        "--validation", action="store_true", help="choose on half of the held-out documents, compare on the others"
    )
    parser.add_argument("--prompt-share", type=float, default=0.75)
    parser.add_argument("--evaluations", type=int, default=12, help="of each subset and size")
    parser.add_argument("--alike", action="store_true", help="do not measure how much each leader loses at few bits")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--qa", type=int, default=0, help="questions to answer")
    parser.add_argument("--questions", type=Path, help="in SQuAD's JSON format")
    parser.add_argument("--retrieval", type=int, default=0, help="needles to find; a multiple of 5 is best")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.qa and args.questions is None:
        parser.error("expected --questions with --qa, got none")

    model, tokenizer, _ = load(args.model, dtype=args.dtype, device=args.device)
    model.eval()
    documents = {name: split_documents(resolve_data(name)) for name in args.data}
    if args.validation:  # a model that knows the training text by heart says nothing on it
        documents = {name: halves_of_held_out(name, parts[1]) for name, parts in documents.items()}
    training, _ = text_blocks(documents, 0, tokenizer, args.context, args.blocks)
    held_out, held_names = text_blocks(documents, 1, tokenizer, args.context, args.held_out_blocks)
    prompt = round(args.prompt_share * args.context)
    beside = args.keep.with_name(f"{args.keep.stem}-held-out.json")
    losses = RecipeLosses(model, training, prompt, batch_size=args.batch_size, path=args.keep)
    held_losses = RecipeLosses(model, held_out, prompt, batch_size=args.batch_size, path=beside)
    ladder = read_ladder(args.plan, layer_kinds(model.config))
    space = Space(model.config, model.dtype, context=args.context, plans=ladder)
    full_bytes = cache_bytes(model.config, model.dtype, args.context)
    tasks = Tasks(model, tokenizer, [d for _, held in documents.values() for d in held], args)
    common = {
        "label": args.label,
        "model": args.model,
        "context": args.context,
        "full_bytes": full_bytes,
        "chosen_on": "validation" if args.validation else "training",
        "blocks": [len(training), len(held_out)],
        "dtype": args.dtype,
        "environment": environment(next(model.parameters()).device),
        "command": "python " + " ".join(sys.argv),
    }
    done = done_lines(args)
    full = held_losses(space.recipe())
    if (args.label, "", 1.0) not in done:
        line = {**common, "axes": [], "factor": 1.0, "recipe": plain(space.recipe()), "bytes": full_bytes}
        line |= {"train_loss": statistics.fmean(losses(space.recipe())), "train_excess": 0.0}
        write(args, line | {"loss": score(full, held_names, full).to_dict(), **tasks.scores(space.recipe())})
    # by whether layers are shared, and so whether an adapter is on: nested plans' leaders are measured once
    alike = dict.fromkeys(range(model.config.get_text_config().num_hidden_layers), 1.0)
    sensitivity: dict[bool, dict[int, float]] = {
        is_deep: dict(alike) if args.alike else {} for is_deep in (False, True)
    }
    for factor in args.factors:
        # what plans were searched for is better than its neighbours
        known = [space.recipe(plan) for plan in ladder[: len(args.plan)]]
        for axes in subsets():
            key = (args.label, " ".join(axes), float(factor))
            if key in done:
                if done[key]["recipe"] is not None:
                    known.append(CacheRecipe.from_dict(done[key]["recipe"]))
                    remember(sensitivity["depth" in axes], done[key]["sensitivity"])
                continue
            started = time.perf_counter()
            limit = int(full_bytes / factor)
            own = space.replaced(axes=axes)
            line = {**common, "axes": list(axes), "factor": factor, "recipe": None}
            fewer = [recipe for recipe in known if set(axes_of(recipe)) <= set(axes)]
            try:
                is_deep = "depth" in axes
                chosen = choose_recipe(
                    own,
                    losses,
                    limit,
                    evaluations=args.evaluations,
                    known=fewer,
                    sensitivity=sensitivity[is_deep],
                )
                remember(sensitivity[is_deep], chosen.sensitivity)
            except RecipeError as error:
                print(f"{' '.join(axes):18} {factor:4g}x {error}", flush=True)
                write(args, line)
                continue
            best = chosen.best
            known.append(best.recipe)
            held = held_losses(best.recipe)
            line |= found(chosen) | {"loss": score(held, held_names, full).to_dict(), **tasks.scores(best.recipe)}
            line["seconds"] = round(time.perf_counter() - started, 1)
            write(args, line)
            excess = line["loss"]["difference"]
            print(f"{' '.join(axes):18} {factor:4g}x {excess:+.3f} held out, {best.excess:+.3f} in training, ", end="")
            print(f"{best.recipe.describe()}, {line['seconds']:.0f} s", flush=True)
    if args.out is not None:
        print(table(args))


def remember(kept: dict[int, float], found: Mapping[Any, float]) -> None:
    """Keep what leaders count, of the plan with most of them."""
    if len(found) > len(kept):
        kept.clear()
        kept.update({int(leader): counts for leader, counts in found.items()})


def found(chosen: Chosen) -> dict[str, Any]:
    """What was chosen and how well it was predicted."""
    best, errors = chosen.best, chosen.prediction_errors
    return {
        "recipe": plain(best.recipe),
        "bytes": best.bytes,
        "train_excess": best.excess,
        "train_error": best.error,
        "predicted_excess": best.predicted,
        "settled": chosen.settled,
        "sensitivity": {str(leader): counts for leader, counts in chosen.sensitivity.items()},
        "measured": len(chosen.measured),
        "prediction": {
            "recipes": len(errors),
            "mean_absolute_error": statistics.fmean(map(abs, errors)) if errors else None,
            "mean_excess": statistics.fmean(e.excess for e in chosen.measured if e.predicted is not None)
            if errors
            else None,
        },
    }


class Tasks:
    """Scores of what a recipe lets the model write, per cent."""

    def __init__(self, model: Any, tokenizer: Any, documents: list[Any], args: argparse.Namespace) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.questions = []
        if args.qa:
            questions = read_squad(args.questions)
            self.questions = random.Random(0).sample(questions, min(args.qa, len(questions)))
        self.items = (
            retrieval_items(
                documents, tokenizer, tasks=["needle"], lengths=[args.context], num_items=args.retrieval, seed=0
            )
            if args.retrieval
            else []
        )

    def scores(self, recipe: CacheRecipe) -> dict[str, Any]:
        """F1 of answers and share of needles, where they are asked for."""
        line: dict[str, Any] = {}
        with share(self.model, recipe):
            if self.questions:
                texts = answer(
                    self.model,
                    self.tokenizer,
                    self.questions,
                    batch_size=self.args.batch_size,
                    max_tokens=self.args.context,
                )
                values = answer_scores(texts, self.questions)["f1"]
                line["f1"] = score(values, list(range(len(values)))).to_dict()
            if self.items:
                values = retrieve(self.model, self.tokenizer, self.items, batch_size=self.args.batch_size)
                line["retrieval"] = score(values, [item.document for item in self.items]).to_dict()
        return line


def done_lines(args: argparse.Namespace) -> dict[tuple[str, str, float], dict[str, Any]]:
    """By label, axes and factor."""
    if args.out is None or not args.out.exists():
        return {}
    lines = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    return {(line["label"], " ".join(line["axes"]), float(line["factor"])): line for line in lines}


def write(args: argparse.Namespace, line: dict[str, Any]) -> None:
    """One line more."""
    text = json.dumps(line, allow_nan=True)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(text.replace("NaN", "null") + "\n")


def table(args: argparse.Namespace) -> str:
    """Excess held-out loss by subset and size."""
    lines = done_lines(args)
    rows = [f"{'saved on':20}" + "".join(f"{f'{factor:g}x':>10}" for factor in args.factors)]
    for axes in subsets():
        cells = []
        for factor in args.factors:
            line = lines.get((args.label, " ".join(axes), float(factor)))
            has_recipe = line is not None and line["recipe"] is not None
            cells.append(f"{line['loss']['difference']:+.3f}" if line is not None and has_recipe else "-")
        rows.append(f"{' '.join(axes):20}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(rows)


if __name__ == "__main__":
    main()
