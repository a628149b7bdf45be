"""Tables of docs/results.md, made from the raw figures in docs/raw.

    python benchmarks/tables.py docs/results.md      # rewrites what lies between its `table:` markers
    python benchmarks/tables.py README.md

A marker is `<!-- table:NAME -->`, the end `<!-- /table -->`, and NAME a function of `TABLES` below.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_tables
import joint_tables
import reliability_tables
import scale_tables
import serve_tables
import vllm_tables

RAW = Path(__file__).resolve().parent.parent / "docs" / "raw"
GROUPS = {
    "untrained": "untrained, ",
    "peers": "",
    "default": "default recipe, ",
    "adapter": "shipped adapter, ",
}
"""Files of benchmarks/compare.py, in the order of the table, and what their labels begin with."""


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RAW / name).read_text(encoding="utf-8").splitlines()]


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(score: dict[str, Any] | None, digits: int = 1) -> str:
    if score is None:
        return ""
    shown = f"{score['value']:.{digits}f}"
    if score.get("low") is not None and score["low"] != score["high"]:
        shown += f" ({score['low']:.{digits}f} to {score['high']:.{digits}f})"
    return shown


def arms() -> list[tuple[str, dict[str, Any]]]:
    """Label and row of every arm of the comparison, the common full cache once."""
    found, full_seen = [], False
    order = list(GROUPS)
    for figures in sorted(read("compare.jsonl"), key=lambda f: (order.index(f["group"]), f["command"])):
        for row in figures["rows"]:
            is_full, group = row["label"] == "full cache", figures["group"]
            if is_full and group != "default":  # the same model, or one whose adapter is off
                if not full_seen:
                    found.append(("full cache", row))
                full_seen = True
                continue
            found.append((GROUPS[group] + row["label"], row))
    return found


def comparison() -> str:
    rows = []
    for label, row in arms():
        cells = [label, f"{row['cache_fraction']:.3f}", interval(row["loss_score"], 2)]
        cells += [interval(row["agreement"]["top1"]), interval(row["qa"]["f1"]), interval(row["retrieval"]["score"])]
        rows.append(cells)
    return table(["cache", "bytes", "loss", "top-1, %", "F1, %", "retrieval, %"], rows)


def comparison_texts() -> str:
    names = [text["data"] for text in arms()[0][1]["texts"]]
    documents = [str(text["documents"]) for text in arms()[0][1]["texts"]]
    headings = [f"{name.removeprefix('builtin:')} ({count})" for name, count in zip(names, documents, strict=True)]
    rows = [[label, *(interval(text["loss"], 2) for text in row["texts"])] for label, row in arms()]
    return table(["cache", *headings], rows)


def positions() -> str:
    """How much more than the full cache each arm loses, by position, over the kinds of text."""
    wanted = ("default recipe", "shipped adapter", "StreamingLLM", "quantised")
    rows, headings = [], []
    for label, row in arms():
        if not label.startswith(wanted) or label.endswith("full cache"):
            continue
        for text in row["texts"]:
            if not label.startswith("shipped adapter") or text["data"] == "builtin:anarchism":
                headings = [f"{p['first']}-{p['last']}" for p in text["positions"]]
                cells = [f"{p['loss']['difference']:+.2f}" for p in text["positions"]]
                rows.append([label, text["data"].removeprefix("builtin:"), *cells])
    return table(["cache", "text", *(f"tokens {heading}" for heading in headings)], rows)


def qa() -> str:
    runs = {run["method"]: run for run in read("qa.jsonl")}
    order = ["r-cla", "cla@2", "cla@4", "rd-cla@2", "rd-cla@4", "leader-subset", "base"]
    rows = []
    for name in order:
        run = runs[name]
        cells = [f"{s['f1']:.1f} / {s['exact_match']:.1f} / {s['rouge_l']:.1f}" for s in run["scores"]]
        rows.append([name, *cells, f"{run['train_loss']:.2f}"])
    return table(["fine-tuned by", "100 %", "50 %", "25 % (8 of 30)", "training loss"], rows)


def bench() -> str:
    """Every cell of the grid."""
    (run,) = (run for run in read("bench.jsonl") if run["run"] == "grid")
    rows = []
    for cell in run["cells"]:
        full, limit = cell["arms"]["full"], cell["roofline"]
        cells = [f"{len(cell['leaders'])} of 30", f"{cell['prompt_tokens']:,} x {cell['batch_size']}"]
        cells += [f"{full['ttft_s']:.2f} s", f"{cell['ratios']['ttft_s']:.3f}x"]
        cells += [f"{full['itl_s'] * 1000:.0f} ms", f"{cell['ratios']['itl_s']:.3f}x"]
        cells += [f"{full['cache_bytes'] / 2**20:.1f} MiB", f"{cell['ratios']['cache_bytes']:.3f}x"]
        cells += [f"{cell['ratios']['peak_above_start_bytes']:.2f}x"]
        for phase in ("prefill", "decode"):
            cells.append(f"{limit['full'][f'{phase}_share']:.0%} / {limit['shared'][f'{phase}_share']:.0%}")
        rows.append(cells)
    headings = ["layers kept", "prompt x batch", "TTFT, full", "shared", "between tokens, full", "shared"]
    headings += ["cache, full", "shared", "memory of the run", "prompt, of the limit", "decoding, of the limit"]
    return table(headings, rows)


PLANNER = {
    "untrained": "untrained",
    "leader subsets, all layers": "leader subsets, all layers",
    "leader subsets, adapter": "leader subsets, adapter",
    "R-CLA, adapter": "R-CLA, adapter",
    "shipped adapter": "shipped adapter",
    "from scratch, leader subsets": "from scratch, 12 layers",
    "from scratch, leader subsets, validation": "the same, calibrated on held-out text",
}
"""Models of benchmarks/planner.py, in the order of the table."""


def planner_runs() -> dict[tuple[str, float, bool], dict[str, Any]]:
    """By model, retention and whether any source was allowed; of several runs the last."""
    runs = {}
    for run in read("planner.jsonl"):
        label = run["label"] + (", validation" if run.get("calibrated_on") == "validation" else "")
        runs[label, run["retention"], run["any_source"]] = run
    order = list(PLANNER)
    return {key: runs[key] for key in sorted(runs, key=lambda key: (order.index(key[0]), -key[1], key[2]))}


def excess(run: dict[str, Any], rule: str) -> float:
    """Held-out loss over the full cache's."""
    value: float = run["rules"][rule]["held_out"]["value"] - run["full_held_out"]["value"]
    return value


def best_even(run: dict[str, Any]) -> str:
    """The evenly spaced plan, of all shifts, that is best on the held-out text: the planner does not see that."""
    return min((rule for rule in run["rules"] if rule.startswith("evenly spaced,")), key=lambda rule: excess(run, rule))


def planner() -> str:
    """Excess loss of evenly spaced plans and of the planner's."""
    runs = planner_runs()
    rows = []
    for label, retention in dict.fromkeys(key[:2] for key in runs):
        found = {name: runs.get((label, retention, name == "any")) for name in ("nearest", "any")}
        run = found["any"] or found["nearest"]
        assert run is not None
        even, best = excess(run, "evenly spaced, 0"), excess(run, best_even(run))
        cells = [PLANNER[label], f"{run['rules']['planner']['leaders']}", f"{run['full_held_out']['value']:.2f}"]
        cells += [f"{even:+.3f}", f"{best:+.3f}"]
        for name in ("nearest", "any"):
            cells.append(f"{excess(found[name], 'planner'):+.3f}" if found[name] else "")
        against = run["rules"]["planner"]["against_even"]
        cells.append(
            f"{against['difference']:+.3f} ({against['difference_low']:+.3f} to {against['difference_high']:+.3f})"
        )
        own = excess(run, "planner")
        cells += [f"{1 - own / other:.0%}" if other > 0.001 and own > 0 else "-" for other in (even, best)]
        rows.append(cells)
    headings = ["model", "layers kept", "full cache", "evenly spaced", "best shift of these", "planner, nearest source"]
    headings += ["planner, any source", "less evenly spaced", "less excess", "less than the best shift"]
    return table(headings, rows)


def planner_rules() -> str:
    """Excess loss of every rule at half of the layers."""
    runs = planner_runs()
    names = ["planner", "evenly spaced", "sum of costs, not searched", "random leaders", "K/V similarity only"]
    names += ["KVSharer: most unlike first", "its reverse: most alike first", "attention outputs only"]
    labels = [label for label in PLANNER if (label, 0.5, True) in runs]
    rows = []
    for name in names:
        rows.append([name, *(f"{excess(runs[label, 0.5, True], name):+.3f}" for label in labels)])
    return table(["rule", *(PLANNER[label] for label in labels)], rows)


def memory() -> str:
    """Byte formulas beside what was allocated."""
    rows = []
    for run in read("memory.jsonl"):
        for cell in run["rows"]:
            cells = [cell["family"], f"{cell['retention']:.2f}"]
            for part in ("weights", "cache", "activations"):
                formula, measured = cell[part]["formula"], cell[part]["measured"]
                cells += [f"{measured / 2**20:.2f} MiB", f"{formula / measured - 1:+.2%}"]
            rows.append(cells)
    headings = ["family", "kept", "weights", "formula", "cache", "formula", "prefill", "formula"]
    return table(headings, rows)


ADAPTIVE = {
    "prose plan": "one plan, found on prose",
    "static": "one plan, best of 16 on the calibration inputs",
    "oracle": "oracle: the best of the 16 for each input",
    "portfolio": "portfolio of these 16",
    "portfolio, any size": "portfolio, and smaller and larger plans",
    "similarity, plain": "similarity",
    "similarity": "similarity, weighed by measured losses",
    "learned": "learned heads",
}
"""Rows of benchmarks/adaptive.py, in the order of the table."""


def adaptive() -> str:
    """Loss of each way to choose, and how much of the way from the static plan to the oracle it goes."""
    rows = []
    for run in read("adaptive.jsonl"):
        found = run["rows"]
        static, oracle = (found[name]["loss"]["value"] for name in ("static", "oracle"))
        for name, words in ADAPTIVE.items():
            if name not in found:
                continue
            loss = found[name]["loss"]["value"]
            cells = [f"{run['label']}, {run['leaders']} of {run['num_layers']}", words]
            cells += [f"{found[name]['mean_leaders']:.1f}", f"{loss:.3f}"]
            cells.append("" if name == "static" else f"{(static - loss) / (static - oracle):.0%}")
            cells.append(f"{found[name]['seconds_to_make']:.0f} s" if "seconds_to_make" in found[name] else "")
            rows.append(cells)
    headings = [
        "model",
        "the layers are chosen by",
        "layers kept",
        "loss",
        "of the gap to the oracle",
        "making it took",
    ]
    return table(headings, rows)


def adaptive_sorts() -> str:
    """The same by sort of input: loss, digits and layers kept."""
    rows = []
    for run in read("adaptive.jsonl"):
        for name, words in ADAPTIVE.items():
            if name not in run["rows"]:
                continue
            cells = [f"{run['label']}, {run['leaders']} of {run['num_layers']}", words]
            for sort in run["rows"][name]["by_sort"].values():
                digits = "" if sort["digits"] is None else f", {sort['digits']:.0%}"
                cells.append(f"{sort['loss']:.2f}{digits} ({sort['mean_leaders']:.0f})")
            rows.append(cells)
    sorts = list(dict.fromkeys(read("adaptive.jsonl")[0]["sorts"]))
    return table(["model", "the layers are chosen by", *sorts], rows)


def elastic() -> str:
    """Ways to stay within the bytes of a short full cache while the text grows."""
    rows = []
    for run in read("elastic.jsonl"):
        for name, found in run["rows"].items():
            cells = [f"{run['label']}, {run['start']} to {run['tokens']:,} tokens", name]
            cells += [f"{found['loss']['value']:.3f}", f"{found['largest_bytes'] / run['budget']:.3f}"]
            for sort in ("prose", "code", "tables", "repetition", "recall"):
                part = found["by_sort"].get(sort)
                if part is None:
                    cells.append("")
                    continue
                digits = f", {part['digits']:.0%}" if sort == "recall" else ""
                cells.append(f"{part['loss']:.2f}{digits}")
            rows.append(cells)
    headings = ["model", "cache", "loss", "most bytes, of the budget", "prose", "code", "tables", "repetition"]
    return table([*headings, "recall, digits found"], rows)


def router_cost() -> str:
    """A router against the plan that it chose."""
    rows = []
    for run in read("router_cost.jsonl"):
        for name, found in run["pairs"].items():
            cells = [name]
            for part in ("ttft", "token"):
                low, high = found[f"{part}_ratio_range"]
                cells.append(f"{found[f'{part}_ratio']:.3f}x ({low:.2f} to {high:.2f})")
            rows.append(cells)
    return table(["router", "time to first token", "time per further token"], rows)


def recipes_speed() -> str:
    """Decoding under recipes beside the full cache and the shared one, in turns in one run."""
    rows = []
    for run in read("recipes_speed.jsonl"):
        for name, arm in run["arms"].items():
            ratio = arm.get("decode_tokens_per_s_by_shared", 1.0)
            rows.append([name, f"{1000 * arm['itl_s']:.1f} ms", f"{arm['decode_tokens_per_s']:.1f}", f"{ratio:.2f}x"])
            rows[-1] += [
                f"{arm[name] / 2**20:.2f} MiB"
                for name in ("cache_bytes", "step_reads_packed_bytes", "step_moves_unpacked_bytes")
            ]
    headings = ["cache", "between tokens", "tokens/s", "of the shared one", "held"]
    return table([*headings, "read by a kernel that unpacks itself", "moved as it is now"], rows)


HEADS_RECIPES = {"layers": "all layers' weights", "adapter": "fine-tuned, then an adapter"}
"""Recipes of benchmarks/heads.py."""


def heads() -> str:
    """Depth against heads in a model that was merged and adapted: the largest cache first."""
    rows = []
    for run in (run for run in read("heads.jsonl") if run["run"] == "adapt"):
        cells = [(found, arm) for arm in run["arms"] for found in arm["rows"]]
        cells.sort(key=lambda cell: (-cell[0]["kv_bytes_per_token"], cell[1]["kv_heads"]))
        full = cells[0][0]["kv_bytes_per_token"]
        for found, arm in cells:
            line = [HEADS_RECIPES[run["recipe"]], arm["arm"], f"{found['leaders']} of {arm['num_layers']}"]
            line += [f"{found['kv_bytes_per_token']:,}", f"{found['kv_bytes_per_token'] / full:.3f}"]
            rows.append([*line, f"{found['start']:.2f}", f"{found['loss']:.3f}", f"{arm['tokens'] / 1000:,.0f}k"])
    headings = ["trained", "model", "layers kept", "bytes per token", "of the full cache", "loss before"]
    return table([*headings, "loss after", "training tokens"], rows)


def heads_scratch() -> str:
    """Multi-head, grouped-query and multi-query models from scratch, and the first with its heads merged."""
    rows, headings = [], []
    for run in (run for run in read("heads.jsonl") if run["run"] == "scratch"):
        for arm in run["arms"]:
            headings = [f"{found['leaders']} of {arm['num_layers']} layers" for found in arm["rows"]]
            line = [arm["arm"], f"{arm['parameters'] / 1e6:.2f}M", f"{arm['tokens'] / 1e6:.1f}M"]
            for found in arm["rows"]:
                start = "" if arm["merged_from"] is None else f"{found['start']:.3f}, then "
                line.append(f"{start}{found['loss']:.3f} ({found['kv_bytes_per_token']:,} B)")
            rows.append(line)
    return table(["model", "parameters", "training tokens", *headings], rows)


HEADS = (("heads", "adapt", heads), ("heads-scratch", "scratch", heads_scratch))
"""Name, kind of run in heads.jsonl, and table."""


TABLES: dict[str, Callable[[], str]] = {
    "comparison": comparison,
    "comparison-texts": comparison_texts,
    "positions": positions,
    "qa": qa,
    "bench": bench,
    "planner": planner,
    "planner-rules": planner_rules,
    "memory": memory,
    "adaptive": adaptive,
    "adaptive-sorts": adaptive_sorts,
    "elastic": elastic,
    "router-cost": router_cost,
    "recipes-speed": recipes_speed,
}


def of_lines(name: str, made: Callable[[list[dict[str, Any]]], tuple[list[str], list[list[str]]]]) -> str:
    """A table of one of the modules beside this one, from a file of raw lines."""
    return table(*made(read(name)))


for name, module in {
    "gpu.jsonl": gpu_tables,
    "joint.jsonl": joint_tables,
    "reliability.jsonl": reliability_tables,
    "scale.jsonl": scale_tables,
    "serve.jsonl": serve_tables,
    "vllm.jsonl": vllm_tables,
}.items():
    TABLES |= {table_name: functools.partial(of_lines, name, made) for table_name, made in module.TABLES.items()}
README_TABLES = {n: functools.partial(of_lines, "gpu.jsonl", made) for n, made in gpu_tables.README_TABLES.items()}

if (RAW / "heads.jsonl").exists():
    runs = {run["run"] for run in read("heads.jsonl")}
    TABLES |= {name: made for name, kind, made in HEADS if kind in runs}


def fill(document: str) -> str:
    """The document with every marked table made anew."""

    def made(match: re.Match[str]) -> str:
        return f"<!-- table:{match[1]} -->\n{(TABLES | README_TABLES)[match[1]]()}\n<!-- /table -->"

    return re.sub(r"<!-- table:([\w-]+) -->\n.*?<!-- /table -->", made, document, flags=re.DOTALL)


def main() -> None:
    path = Path(sys.argv[1])
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
