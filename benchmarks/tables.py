"""Tables and figures of README.md and docs, made from the raw figures in docs/raw.

    python benchmarks/tables.py                      # rewrites what lies between the marks of all pages
    python benchmarks/tables.py docs/results.md      # of one

A mark is `<!-- table:NAME -->`, the end `<!-- /table -->`, and NAME a function of `TABLES` below. Within a sentence
`<!-- figure:NAME -->`, the end `<!-- /figure -->`, and NAME one of benchmarks/inline.py.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import compare_tables
import cpu_tables
import gpu_tables
import inline
import joint_tables
import planner_tables
import product_tables
import reliability_tables
import scale_tables
import serve_tables
import training_tables
import vllm_tables

ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "docs" / "raw"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
"""Where marks may stand."""


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RAW / name).read_text(encoding="utf-8").splitlines()]


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    "product.jsonl": product_tables,
    "scale.jsonl": scale_tables,
    "serve.jsonl": serve_tables,
    "vllm.jsonl": vllm_tables,
}.items():
    TABLES |= {table_name: functools.partial(of_lines, name, made) for table_name, made in module.TABLES.items()}


def of_files(made: Callable[[Callable[[str], list[dict[str, Any]]]], tuple[list[str], list[list[str]]]]) -> str:
    """A table that reads the files that it wants."""
    return table(*made(read))


for module in (compare_tables, cpu_tables, planner_tables, training_tables):
    TABLES |= {table_name: functools.partial(of_files, made) for table_name, made in module.TABLES.items()}

if (RAW / "heads.jsonl").exists():
    runs = {run["run"] for run in read("heads.jsonl")}
    TABLES |= {name: made for name, kind, made in HEADS if kind in runs}


def fill(document: str) -> str:
    """The document with every marked table and figure made anew."""

    def tabulated(match: re.Match[str]) -> str:
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- /table -->"

    def stated(match: re.Match[str]) -> str:
        return f"<!-- figure:{match[1]} -->{inline.FIGURES[match[1]](read)}<!-- /figure -->"

    document = re.sub(r"<!-- table:([\w-]+) -->\n.*?<!-- /table -->", tabulated, document, flags=re.DOTALL)
    return re.sub(r"<!-- figure:([\w-]+) -->.*?<!-- /figure -->", stated, document, flags=re.DOTALL)


def main(names: Sequence[str]) -> None:
    for path in [Path(name) for name in names] or PAGES:
        text = path.read_text(encoding="utf-8")
        made = fill(text)
        if made != text:
            path.write_text(made, encoding="utf-8")
            print(f"{path.name}: made anew")


if __name__ == "__main__":
    main(sys.argv[1:])
