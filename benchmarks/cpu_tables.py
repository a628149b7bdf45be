"""Tables of what benchmarks/all.py measures on a CPU, for docs/results.md and README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_tables import train
from training_tables import Read, Table, runs_of

Row = dict[str, Any]

BENCH = {"every 2nd": "every 2nd", "front half": "front half", "every 4th": "every 4th (8 of 30)"}
"""Runs of `depthkv bench` with a prompt of 1,024 tokens, and how the table calls them."""


def run_of(read: Read, file: str, name: str) -> Row:
    """The last row of a run."""
    return [row for row in read(file) if row["run"] == name][-1]


def origin(row: Row) -> str:
    """Hardware, versions and date of a row."""
    found = row["environment"]
    words = [f"{found['threads']} threads of an {found['device']}"] if "threads" in found else [found["device"]]
    words += [f"{name} {found[name]}" for name in ("torch", "transformers") if name in found]
    return ", ".join([*words, row["date"]] if "date" in row else words)


def kib(num_bytes: float) -> str:
    return f"{num_bytes / 1024:g} KiB"


def demo_rows(read: Read, *names: str) -> list[list[str]]:
    """Sizes of the cache, loss before, and loss and perplexity after, of each run."""
    runs = [run_of(read, "demo.jsonl", name) for name in names]
    rows = []
    for place, before in enumerate(runs[0]["before"]):
        kept = f"{len(before['leaders'])} of {len(runs[0]['before'][0]['leaders'])} ({before['retention']:.0%})"
        cells = [kept, kib(before["kv_bytes_per_token"]), f"{before['loss']:.2f}"]
        after = [run["after"][place] for run in runs]
        cells += [f"**{after[0]['loss']:.2f}**", f"{after[0]['perplexity']:.1f}"]
        rows.append([*cells, *(f"{row['loss']:.2f}" for row in after[1:])])
    return rows


def demo(read: Read) -> Table:
    """`make demo`, and what it trains itself."""
    headings = ["layers that keep a cache", "cache per token (fp32)", "loss untrained", "loss with the adapter"]
    return [*headings, "perplexity with it", "loss trained on the spot"], demo_rows(read, "adapter", "train")


def demo_r_cla(read: Read) -> Table:
    """What `make demo` was at first."""
    headings = ["layers that keep a cache", "cache per token (fp32)", "loss untrained", "loss adapted"]
    return [*headings, "perplexity adapted", "adapted on the GPU"], demo_rows(read, "r-cla", "r-cla, GPU")


def bench_plans(read: Read) -> Table:
    """Speed and bytes of three plans with a prompt of 1,024 tokens."""
    rows = []
    for name, words in BENCH.items():
        cell = run_of(read, "bench.jsonl", name)["cells"][0]
        full, shared, ratios = cell["arms"]["full"], cell["arms"]["shared"], cell["ratios"]
        cells = [words, f"{full['ttft_s']:.3f} s", f"{shared['ttft_s']:.3f} s", f"**{ratios['ttft_s']:.3f}x**"]
        cells += [f"{arm['decode_tokens_per_s']:.2f}" for arm in (full, shared)]
        cells += [f"**{ratios['decode_tokens_per_s']:.3f}x**", f"{ratios['cache_bytes']:.3f}x"]
        rows.append([*cells, f"{ratios['peak_above_start_bytes']:.2f}x"])
    headings = ["plan", "TTFT full", "TTFT shared", "ratio", "tok/s full", "tok/s shared", "ratio", "cache"]
    return [*headings, "memory of the run"], rows


def bench(read: Read) -> Table:
    """Every cell of the grid."""
    rows = []
    for cell in run_of(read, "bench.jsonl", "grid")["cells"]:
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
    return headings, rows


def training_step(read: Read) -> Table:
    """Whole training steps on the CPU."""
    return train(read("train_step.jsonl"))


def plan_time(read: Read) -> Table:
    """Where the time of `depthkv plan` goes."""
    run = read("plan_time.jsonl")[-1]
    found = run["calibration"]
    words = "keys, values and attention outputs of all pairs"
    rows = [[words, f"{found['tokens']:,} tokens", minutes(found["similarity_seconds"])]]
    rows.append(["loss of all 435 pairs", f"{found['cost_tokens']:,} tokens", minutes(found["cost_seconds"])])
    words = f"plans: {found['search_evaluations']} of the search, and rivals that it may not choose"
    rows.append([words, f"{found['cost_tokens']:,} tokens", minutes(found["search_seconds"])])
    rows.append(["all, loading and comparing on held-out text too", "", minutes(run["wall_s"])])
    rows.append(["most memory in use", "", f"{run['max_rss_bytes'] / 2**30:.2f} GiB"])
    return ["step", "text", "found"], rows


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def switching(read: Read) -> Table:
    """`share()` and `remove()`."""
    run = read("switching.jsonl")[-1]
    return ["", "best of 20"], [[f"`{n}()`", f"{run[f'{n}_s'] * 1000:.2f} ms"] for n in ("share", "remove")]


def evaluation(read: Read) -> Table:
    """Two runs of one evaluation: the time, and the losses, which must be the same."""
    rows = []
    for name in ("first", "second"):
        run = run_of(read, "evaluate.jsonl", name)
        found = run["rows"] or []
        losses = " / ".join(f"{row['loss']:.4f}" for row in found) or "not kept"
        rows.append([name, f"{run['wall_s']:.0f} s", losses])
    return ["run", "all of it took", "loss at 100 / 50 / 33 / 25 %"], rows


def measured(read: Read) -> Table:
    """README: what a smaller cache costs and buys."""
    demo_run, front = run_of(read, "demo.jsonl", "adapter"), run_of(read, "evaluate.jsonl", "front half")
    (untrained,) = runs_of(read, "untrained", 0)
    before = {len(row["leaders"]): row for row in demo_run["before"]}
    after = {len(row["leaders"]): row for row in demo_run["after"]}
    rows = [["all 30", "1.00x", f"{before[30]['loss']:.2f}", f"{after[30]['loss']:.2f} (off)", "1x", "1x"]]
    for name, words in {"every 2nd": "every 2nd", "every 4th": "every 4th", "front half": "the front half"}.items():
        cell = run_of(read, "bench.jsonl", name)["cells"][0]
        kept, ratios = len(cell["leaders"]), cell["ratios"]
        losses = [before[kept]["loss"], after[kept]["loss"]]
        if name == "front half":
            losses = [untrained["test"]["front half"], front["rows"][0]["loss"]]
        cells = [words, f"{ratios['cache_bytes']:.2f}x", *(f"{loss:.2f}" for loss in losses)]
        rows.append([*cells, f"{ratios['ttft_s']:.2f}x", f"{ratios['decode_tokens_per_s']:.2f}x"])
    headings = ["layers that keep a cache", "cache", "loss untrained", "loss with the adapter"]
    return [*headings, "time to first token", "decoding"], rows


def lm_eval(read: Read) -> Table:
    """Three small tasks in lm-evaluation-harness."""
    rows = []
    for row in read("lm_eval.jsonl"):
        right = [f"{number} of {count}" for number, count in (row["colours"], row["counting"])]
        rows.append([row["model"], f"{row['leaders']} of 30", *right, f"{row['bits_per_byte']:.2f}"])
    return ["", "layers kept", "multiple choice, right", "written answers, right", "bits per byte"], rows


SHOWN_MOVES = 3
"""Of the rows in which a column moved for one reason."""


def moved(read: Read) -> Table:
    """What benchmarks/all.py found to be another than before, and why: a line for a column of a table and a reason."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in read("moved.jsonl"):
        groups.setdefault((row["table"], row["figure"], row["why"]), []).append(row)
    rows = []
    for (name, figure, why), found in groups.items():
        place = figure or found[0]["row"]
        place = f"{found[0]['row']}: {figure}" if len(found) == 1 and figure and found[0]["row"] else place
        more = f" and {len(found) - SHOWN_MOVES} more" if len(found) > SHOWN_MOVES else ""
        ends = ("; ".join(row[end] for row in found[:SHOWN_MOVES]) + more for end in ("before", "after"))
        rows.append([name, place, *ends, why])
    return ["table", "figure", "before", "after", "why"], rows or [["none", "", "", "", ""]]


TABLES: dict[str, Callable[[Read], Table]] = {
    "demo": demo,
    "demo-r-cla": demo_r_cla,
    "bench-plans": bench_plans,
    "bench": bench,
    "train-step": training_step,
    "plan-time": plan_time,
    "switching": switching,
    "evaluation": evaluation,
    "measured": measured,
    "lm-eval": lm_eval,
    "moved": moved,
}
