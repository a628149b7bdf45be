"""Figures within the sentences of README.md and docs: `FIGURES`, by the name in their mark."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import scale_tables
from compare_tables import arms
from cpu_tables import origin, run_of
from planner_tables import excess, planner_runs
from training_tables import Read, runs_of

Figure = Callable[[Read], str]

ADAPTED = ("leader subsets, all layers", "leader subsets, adapter", "R-CLA, adapter")
"""Models of the planner's table that were adapted with random maps."""
ESSAY = "essay adapter"


def percent(shares: list[float]) -> str:
    """The least and the most."""
    ends = [f"{100 * share:.0f}" for share in (min(shares), max(shares))]
    return " to ".join(dict.fromkeys(ends)) + " %"


def method(name: str, tokens: int, plan: str = "every 1") -> Figure:
    """Held-out loss of a method of benchmarks/methods.py."""
    return lambda read: f"{statistics.fmean(run['test'][plan] for run in runs_of(read, name, tokens)):.2f}"


def ratio(run: str, field: str, digits: int = 2) -> Figure:
    """Of `depthkv bench`, to the full cache."""
    return lambda read: f"{run_of(read, 'bench.jsonl', run)['cells'][0]['ratios'][field]:.{digits}f}x"


def demo(run: str, when: str, kept: int) -> Figure:
    """Loss in the demo, with so many layers."""

    def made(read: Read) -> str:
        (row,) = (row for row in run_of(read, "demo.jsonl", run)[when] if len(row["leaders"]) == kept)
        return f"{row['loss']:.2f}"

    return made


def demo_minutes(run: str) -> Figure:
    return lambda read: f"{run_of(read, 'demo.jsonl', run)['seconds']['total'] / 60:.1f}"


def demo_tokens(run: str) -> Figure:
    return lambda read: f"{run_of(read, 'demo.jsonl', run)['training']['tokens']:,}"


def cache_mib(run: str, arm: str) -> Figure:
    return lambda read: f"{run_of(read, 'bench.jsonl', run)['cells'][0]['arms'][arm]['cache_bytes'] / 2**20:.2f} MiB"


def less_excess(read: Read) -> Iterator[float]:
    """By how much less the planner's plans exceed the full cache than evenly spaced ones, on adapted models."""
    for (label, _, any_source), run in planner_runs(read).items():
        if label in ADAPTED and any_source:
            yield 1 - excess(run, "planner") / excess(run, "evenly spaced, 0")


def planned(label: str, retention: float, rule: str, digits: int = 1) -> Figure:
    """Excess loss of a rule on a model."""
    return lambda read: f"{excess(planner_runs(read)[label, retention, True], rule):.{digits}f}"


def essay_less(retention: float) -> Figure:
    def made(read: Read) -> str:
        run = planner_runs(read)[ESSAY, retention, True]
        return f"{1 - excess(run, 'planner') / excess(run, 'evenly spaced, 0'):.0%}".replace("%", " %")

    return made


def suite(label: str, what: str) -> Figure:
    """Of the comparison with the peers."""

    def made(read: Read) -> str:
        row: dict[str, Any] = dict(arms(read))[label]
        values = {"loss": row["loss_score"], "f1": row["qa"]["f1"], "retrieval": row["retrieval"]["score"]}
        value = row["cache_fraction"] if what == "bytes" else values[what]["value"]
        return f"{value:.2f}x" if what == "bytes" else f"{value:.{2 if what == 'loss' else 1}f}"

    return made


def default_cost(read: Read) -> str:
    """What sharing costs the model of the default recipe with half of its layers."""
    found = dict(arms(read))
    values = [found[f"default recipe, {name}"]["loss_score"]["value"] for name in ("50% of layers", "full cache")]
    return f"{values[0] - values[1]:.2f}"


def scaled(method: str, plan: str, over: str = "base") -> Figure:
    """By how much an arm of benchmarks/scale.py is above the full cache of another, after `scale_tokens`."""

    def made(read: Read) -> str:
        rows = scale_tables.longest(read("scale.jsonl"))
        loss, best = scale_tables.seen(rows[method], plan), scale_tables.seen(rows[over], "every 1")
        return f"{loss / best - 1:.0%}".replace("%", " %")

    return made


def scale_tokens(read: Read) -> str:
    return f"{scale_tables.tokens(scale_tables.longest(read('scale.jsonl'))['base']) / 1e6:.1f}M"


def routed(name: str) -> Figure:
    """Loss of a way to choose the layers, adapted SmolLM2-135M."""
    return lambda read: f"{read('adaptive.jsonl')[0]['rows'][name]['loss']['value']:.2f}"


def vllm(part: str, plan: str, field: str, digits: int) -> Figure:
    """To the full cache's."""

    def made(read: Read) -> str:
        runs = {run["plan"]: run[field] for run in read("vllm.jsonl") if run["part"] == part}
        return f"{runs[plan] / runs['full cache']:.{digits}f}x"

    return made


FULL, LOWERED = "full cache only", "from the full cache down to a quarter"


def load(field: str, label: str = LOWERED, digits: int = 2) -> Figure:
    """Of the embedded server: to the full cache's."""

    def made(read: Read) -> str:
        rows = run_of(read, "serve.jsonl", "load")["rows"]
        return f"{rows[label][field] / rows[FULL][field]:.{digits}f}x"

    return made


def largest(read: Read) -> str:
    """Throughput of a full memory, as a CUDA graph, with every fourth layer."""
    rows = [row for row in read("gpu.jsonl") if row["run"] == "largest" and row.get("stack") == "CUDA graph"]
    rates = {row["plan"]: row["tokens_per_s"] for row in rows if row.get("context") == 8192 and "tokens_per_s" in row}
    return f"{rates['g=4'] / rates['g=1']:.2f}x"


def memory_error(read: Read) -> str:
    rows = read("memory.jsonl")[-1]["rows"]
    return f"{100 * max(abs(row['weights_and_cache_error']) for row in rows):.3f} %"


def plan_loss(label: str) -> Figure:
    """Held-out loss in the run of `depthkv plan` that was timed."""

    def made(read: Read) -> str:
        row = read("plan_time.jsonl")[-1]
        losses = {found["label"]: found["loss_score"]["value"] for found in row["comparison"]}
        return f"{(losses | {'full cache': row['held_out_full']['value']})[label]:.2f}"

    return made


def plan_predicted(read: Read) -> str:
    return f"{read('plan_time.jsonl')[-1]['predicted_loss']:.2f}"


def router(pair: str, field: str = "ttft_ratio", digits: int = 3) -> Figure:
    """Of a router, to the plan that it chose."""
    return lambda read: f"{read('router_cost.jsonl')[-1]['pairs'][pair][field]:.{digits}f}x"


def early_stop(read: Read) -> str:
    """The least and the most that the lost early stop of a prefill costs."""
    pairs = read("router_cost.jsonl")[-1]["pairs"]
    ratios = [found["ttft_ratio"] for name, found in pairs.items() if name.endswith("early stop")]
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x"


def machine_limit(field: str, unit: float, digits: int) -> Figure:
    """That the process of the grid measured."""
    return lambda read: f"{run_of(read, 'bench.jsonl', 'grid')['machine_limits'][field] / unit:.{digits}f}"


def share_of_limit(phase: str) -> Figure:
    """Over the cells of the grid and both caches."""

    def made(read: Read) -> str:
        limits = [cell["roofline"] for cell in run_of(read, "bench.jsonl", "grid")["cells"]]
        return percent([limit[arm][f"{phase}_share"] for limit in limits for arm in ("full", "shared")])

    return made


def most_at_once(label: str) -> Figure:
    return lambda read: f"{run_of(read, 'serve.jsonl', 'load')['rows'][label]['most_at_once']:.0f}"


def measured_on(file: str, run: str | None = None) -> Figure:
    """Hardware, versions and date of the last row of a file, or of one of its runs."""
    return lambda read: origin(read(file)[-1] if run is None else run_of(read, file, run))


def command(file: str) -> Figure:
    """With its backticks: marks within them would be shown."""
    return lambda read: f"`{str(read(file)[-1]['command']).partition(' --out ')[0]}`"


FIGURES: dict[str, Figure] = {
    "router-portfolio": router("portfolio"),
    "router-learned": router("learned"),
    "router-similarity": router("similarity"),
    "router-early-stop": early_stop,
    "router-unlike": router("batch, the plan against unlike maps", "token_ratio", 2),
    "machine-gb": machine_limit("bandwidth_bytes_per_s", 1e9, 0),
    "machine-tflop": machine_limit("matmul_flops_per_s", 1e12, 2),
    "prompt-share": share_of_limit("prefill"),
    "decode-share": share_of_limit("decode"),
    "load-at-once": most_at_once(LOWERED),
    "load-at-once-full": most_at_once(FULL),
    "origin-demo": measured_on("demo.jsonl", "adapter"),
    "origin-demo-train": measured_on("demo.jsonl", "train"),
    "origin-plan-time": measured_on("plan_time.jsonl"),
    "origin-routers": measured_on("router_cost.jsonl"),
    "command-routers": command("router_cost.jsonl"),
    "origin-recipes-speed": measured_on("recipes_speed.jsonl"),
    "origin-memory": measured_on("memory.jsonl"),
    "origin-evaluation": measured_on("evaluate.jsonl", "first"),
    "origin-bench": measured_on("bench.jsonl", "every 2nd"),
    "origin-unmerged": measured_on("bench.jsonl", "unmerged adapter"),
    "origin-grid": measured_on("bench.jsonl", "grid"),
    "origin-load": measured_on("serve.jsonl", "load"),
    "origin-training": measured_on("train_step.jsonl"),
    "origin-switching": measured_on("switching.jsonl"),
    "base-4m": method("base", 4_005_888),
    "unmerged-ttft": ratio("unmerged adapter", "ttft_s"),
    "unmerged-decode": ratio("unmerged adapter", "decode_tokens_per_s"),
    "front-ttft": ratio("front half", "ttft_s"),
    "cache-full": cache_mib("every 2nd", "full"),
    "cache-half": cache_mib("every 2nd", "shared"),
    "cache-quarter": cache_mib("every 4th", "shared"),
    "demo-minutes": demo_minutes("adapter"),
    "demo-train-minutes": demo_minutes("train"),
    "demo-train-tokens": demo_tokens("train"),
    "untrained-full": demo("adapter", "before", 30),
    "untrained-half": demo("adapter", "before", 15),
    "planner-less": lambda read: percent(list(less_excess(read))),
    "planner-untrained": planned("untrained", 0.5, "planner"),
    "planner-untrained-even": planned("untrained", 0.5, "evenly spaced, 0"),
    "planner-essay-third": essay_less(0.33),
    "planner-essay-quarter": essay_less(0.25),
    "default-cost": default_cost,
    "default-f1": suite("default recipe, 50% of layers", "f1"),
    "default-retrieval": suite("default recipe, 50% of layers", "retrieval"),
    "eight-texts-f1": suite("adapter of eight texts, 50% of layers", "f1"),
    "eight-texts-retrieval": suite("adapter of eight texts, 50% of layers", "retrieval"),
    "scale-tokens": scale_tokens,
    "scale-cla-2": scaled("cla@2", "every 2"),
    "scale-cla-4": scaled("cla@4", "every 4"),
    "scale-rd-2": scaled("rd-cla@2", "every 2"),
    "scale-rd-2-full": scaled("rd-cla@2", "every 1"),
    "scale-subset-half": scaled("even leader-subset", "every 2"),
    "scale-subset-quarter": scaled("even leader-subset", "every 4"),
    "scale-subset-half-own": scaled("even leader-subset", "every 2", "even leader-subset"),
    "scale-subset-quarter-own": scaled("even leader-subset", "every 4", "even leader-subset"),
    "scale-default-half": scaled("default recipe", "every 2"),
    "scale-default-quarter": scaled("default recipe", "every 4"),
    "adapter-f1": suite("essay adapter, 50% of layers", "f1"),
    "adapter-retrieval": suite("essay adapter, 50% of layers", "retrieval"),
    "full-f1": suite("full cache", "f1"),
    "full-retrieval": suite("full cache", "retrieval"),
    "4-bits-f1": suite("quantised to 4 bits, 25%", "f1"),
    "4-bits-retrieval": suite("quantised to 4 bits, 25%", "retrieval"),
    "4-bits-bytes": suite("quantised to 4 bits, 25%", "bytes"),
    "static-loss": routed("static"),
    "portfolio-loss": routed("portfolio"),
    "portfolio-sizes-loss": routed("portfolio, any size"),
    "vllm-blocks": vllm("blocks", "every 2nd layer", "blocks", 1),
    "vllm-throughput": vllm("throughput", "every 2nd layer", "tokens_per_s", 2),
    "load-throughput": load("tokens_per_s"),
    "load-throughput-half": load("tokens_per_s", "from half of the layers down to a quarter"),
    "load-ttft": load("ttft_p50"),
    "load-ttft-p99": load("ttft_p99"),
    "largest-graph": largest,
    "memory-error": memory_error,
    "plan-loss": plan_loss("this plan"),
    "plan-loss-even": plan_loss("evenly spaced"),
    "plan-loss-full": plan_loss("full cache"),
    "plan-predicted": plan_predicted,
}
