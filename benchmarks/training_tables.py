"""Tables of docs/results.md about training: methods, recipes, models from scratch, questions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Read = Callable[[str], list[dict[str, Any]]]
"""From the name of a file in docs/raw to its rows."""
Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""

PLANS = {"every 1": "full", "every 2": "every 2nd", "every 3": "every 3rd", "every 4": "every 4th"}
PLANS["front half"] = "front half"
"""Columns of losses."""

SHORT, LONGER = 307_200, (2_400_256, 4_005_888)
"""Training tokens of the two tables of benchmarks/methods.py."""

METHODS = {
    "untrained": "untrained model",
    "base": "base: ordinary fine-tuning",
    "cla@2": "CLA@2",
    "rd-cla@2": "RD-CLA@2",
    "r-cla, plain recipe": "R-CLA, plain recipe (a first trial: 3e-4, 4 x 512, all weights, probability 0.6)",
    "r-cla": "R-CLA",
    "r-cla, rising prob": "R-CLA, probability rising from 0.3 to 0.6",
    "r-cla, per sequence": "R-CLA, a map for each sequence (2 x 512, 1e-3)",
    "leader-subset": "leader subsets",
    "even leader-subset": "leader subsets, half of them evenly spaced (`--trainable layers`)",
    "r-cla + leader-subset": "R-CLA and leader subsets in turns",
    "r-cla, query and output": "R-CLA, query and output projections only (1.5e-3)",
    "r-cla + distillation .5": "R-CLA + distillation, weight 0.5",
    "r-cla + distillation .9": "R-CLA + distillation, weight 0.9",
    "leader-subset + distillation .5": "leader subsets + distillation 0.5",
    "lora": "LoRA, rank 16 (3e-3), R-CLA",
    "lora, rank 64": "LoRA, rank 64 (2e-3), R-CLA",
    "dora": "DoRA, rank 16, R-CLA",
    "lora + distillation .5": "LoRA + distillation 0.5, R-CLA",
    "local stage + r-cla": "local stage (a fifth of the tokens) + R-CLA",
    "base .3, then lora": "base for 30 % of the tokens, then LoRA",
    "base .5, then lora": "base for 50 %, then LoRA",
    "base .5, then lora + distillation .5": "base for 50 %, then LoRA + distillation 0.5",
    "base .7, then lora": "**base for 70 %, then LoRA (default)**",
}
"""Methods at the smaller budget, in the order of the table."""
MORE = {
    "base": "base",
    "cla@2": "CLA@2",
    "r-cla + leader-subset": "R-CLA and leader subsets in turns",
    "served plans": "served plans (every k-th, random k)",
    "served plans + leader-subset": "served plans and leader subsets in turns",
    "served plans + distillation .5": "served plans + distillation 0.5",
    "lora, served plans": "LoRA, served plans",
    "lora, r-cla + leader-subset": "LoRA, R-CLA and leader subsets in turns",
    "even leader-subset": "leader subsets, half of them evenly spaced",
    "lora, even leader-subset": "LoRA, the same",
    "base .3, then lora": "base for 30 %, then LoRA",
}
"""Methods at the larger budgets."""


def runs_of(read: Read, method: str, tokens: int) -> list[dict[str, Any]]:
    """One row for each seed; of several the last."""
    rows = (row for row in read("methods.jsonl") if row["method"] == method and row["tokens"] == tokens)
    return list({row.get("seed"): row for row in rows}.values())


def mean_losses(runs: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{statistics.fmean(run['test'][plan] for run in runs):.3f}" for plan in PLANS]


def methods(read: Read) -> Table:
    """Every method at the smaller budget, the mean over the seeds."""
    rows = []
    for name, words in METHODS.items():
        runs = runs_of(read, name, 0 if name == "untrained" else SHORT)
        rows.append([words, "-" if name == "untrained" else str(len(runs)), *mean_losses(runs)])
    return ["method", "seeds", *PLANS.values()], rows


def methods_more(read: Read) -> Table:
    """The longer runs."""
    rows = []
    for tokens in LONGER:
        for name, words in MORE.items():
            runs = runs_of(read, name, tokens)
            if runs:
                rows.append([words, f"{tokens / 1e6:.1f}M", *mean_losses(runs)])
    return ["method", "tokens", *PLANS.values()], rows


def recipes(read: Read, number: int) -> Table:
    """One round of the search over recipes."""
    rows = []
    for row in (row for row in read("recipes.jsonl") if row["round"] == number):
        rows.append([row["change"], *(f"{row['loss'][plan]:.3f}" if plan in row["loss"] else "" for plan in PLANS)])
    return ["change", *PLANS.values()], rows


def scratch(read: Read) -> Table:
    """Deep and shared or shallow, the mean over the seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in read("scratch.jsonl"):
        groups.setdefault((row["run"], row["size"], row["arm"]), []).append(row)
    sizes = ("1", "1/2", "1/4")
    rows = []
    for (run, size, arm), members in sorted(groups.items()):
        cells = [run, size, arm, str(members[0]["layers"]), str(len(members))]
        for cache in sizes:
            losses = [row["test"][cache] for row in members if cache in row["test"]]
            cells.append(f"{statistics.fmean(losses):.3f}" if losses else "")
        rows.append(cells)
    return ["run", "size", "arm", "layers", "seeds", *(f"cache {cache}" for cache in sizes)], rows


def qa(read: Read) -> Table:
    """Questions answered after fine-tuning by each method."""
    runs = {run["method"]: run for run in read("qa.jsonl")}
    rows = []
    for name in ("r-cla", "cla@2", "cla@4", "rd-cla@2", "rd-cla@4", "leader-subset", "base"):
        run = runs[name]
        cells = [f"{s['f1']:.1f} / {s['exact_match']:.1f} / {s['rouge_l']:.1f}" for s in run["scores"]]
        rows.append([name, *cells, f"{run['train_loss']:.2f}"])
    return ["fine-tuned by", "100 %", "50 %", "25 % (8 of 30)", "training loss"], rows


def paper(read: Read) -> Table:
    """The same in the paper, copied from it."""
    rows = [[row["method"], *(f"{value:.1f}" for value in row["f1"])] for row in read("paper.jsonl")]
    return ["", "100 %", "50 %", "25 %"], rows


def noise(read: Read) -> Table:
    """Adapters trained with and without the noise of a recipe's bits."""
    rows = []
    for row in read("noise.jsonl"):
        plan, recipe = row["plan_loss"], row["recipe_loss"]
        rows.append([row["trained"], f"{plan:.3f}", f"{recipe:.3f}", f"{recipe - plan:+.3f}"])
    size = f"{read('noise.jsonl')[0]['recipe_fraction']:.3f}x"
    return ["trained", "the plan in fp32", f"the recipe, 2 bits ({size} of the full cache)", "difference"], rows


TABLES: dict[str, Callable[[Read], Table]] = {
    "methods": methods,
    "methods-more": methods_more,
    "recipes-first": lambda read: recipes(read, 1),
    "recipes-second": lambda read: recipes(read, 2),
    "scratch": scratch,
    "qa": qa,
    "qa-paper": paper,
    "noise": noise,
}
