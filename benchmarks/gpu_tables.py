"""Tables of docs/results.md from docs/raw/gpu.jsonl, which benchmarks/gpu.py and train_step.py write."""

from __future__ import annotations

from typing import Any

ORDER = ("g=1", "g=2", "g=4", "g=8", "front half", "front quarter")
Rows = list[dict[str, Any]]


def last(rows: Rows, run: str, *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of one sort by the values of `keys`; of several with the same values the last that did not fail."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["run"] == run:
            key = tuple(row.get(name) for name in keys)
            if "failed" not in row or key not in found:
                found[key] = row
    return found


def gib(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def rate(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def spread(row: dict[str, Any], field: str) -> str:
    """The median and, of several rounds, the least and the most."""
    low, high = row[f"{field}_range"]
    return rate(row[field]) + (f" ({rate(low)} to {rate(high)})" if row["repeats"] > 1 else "")


def eager(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Every cell of the eager grid."""
    cells = last(rows, "eager", "context", "batch_size", "plan")
    lines = []
    for context, batch in sorted({key[:2] for key in cells}):
        for plan in ORDER:
            row = cells.get((context, batch, plan))
            if row is None:
                continue
            line = [f"{context:,} x {batch}", plan]
            if row.get("out_of_memory"):
                lines.append([*line, "", "out of memory", *[""] * 7])
                continue
            ratios = [f"{row[name]:.3f}x" if name in row else "" for name in ("ttft_ratio", "decode_ratio")]
            line += [gib(row["cache_bytes"]), gib(row.get("peak_bytes"))]
            line += [f"{row['ttft_s'] * 1000:,.0f} ms", ratios[0], spread(row, "decode_tokens_per_s"), ratios[1]]
            full = cells.get((context, batch, "g=1"), {})
            line.append(f"{row['itl_s'] * 1000:.1f} ms")
            line.append(f"{full['itl_s'] / row['itl_s']:.2f}x" if "itl_s" in full and plan != "g=1" else "")
            line.append(f"{row['prefill_share']:.0%} / {row['decode_share']:.0%}")
            lines.append(line)
    headings = ["prompt x batch", "plan", "cache", "peak memory", "TTFT", "to g=1", "decoded tok/s", "to g=1"]
    return [*headings, "median step", "speed to g=1", "of the limit, prompt / decoding"], lines


STACKS = ("CUDA graph, inductor", "CUDA graph")
"""Compiled, and the code as it is."""


def static(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Every cell with a static cache: compiled, and as a graph of the code as it is."""
    cells = last(rows, "static", "context", "batch_size", "plan", "stack")
    cells = {key: row for key, row in cells.items() if "failed" not in row}
    lines = []
    for context, batch in sorted({key[:2] for key in cells}):
        for plan in ORDER:
            found = [cells.get((context, batch, plan, stack)) for stack in STACKS]
            first = found[0] or found[1]
            if first is None:
                continue
            line = [f"{context:,} x {batch}", plan, gib(first["cache_bytes"]), rate(batch / first["limit_s"])]
            for stack, row in zip(STACKS, found, strict=True):
                full = cells.get((context, batch, "g=1", stack))
                line.append("" if row is None else rate(row["tokens_per_s"]))
                known = row is not None and full is not None and plan != "g=1"
                line.append(f"{row['tokens_per_s'] / full['tokens_per_s']:.3f}x" if known else "")  # type: ignore[index]
                line.append("" if row is None else f"{row['decode_share']:.0%}")
            line.append(" / ".join(f"{row['relative_error']:.1%}" for row in found if row is not None))
            lines.append(line)
    headings = ["context x batch", "plan", "cache", "limit, tok/s", "tok/s, compiled", "to g=1", "of the limit"]
    return [*headings, "tok/s, not compiled", "to g=1", "of the limit", "logits to eager ones"], lines


def largest(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The largest batch within the memory limit and what it decodes."""
    cells = last(rows, "largest", "context", "plan", "stack")
    lines = []
    for context in sorted({key[0] for key in cells if key[0] is not None}):
        for plan in ORDER:
            for stack in ("eager", "CUDA graph", "CUDA graph, inductor"):
                row = cells.get((context, plan, stack))
                if row is None or "failed" in row or "tokens_per_s" not in row:
                    continue
                full = cells.get((context, "g=1", stack), {})
                line = [f"{context:,}", plan, stack, str(row["batch_size"]), gib(row.get("peak_bytes"))]
                line.append(rate(row["tokens_per_s"]))
                known = "tokens_per_s" in full and plan != "g=1"
                line.append(f"{row['tokens_per_s'] / full['tokens_per_s']:.2f}x" if known else "")
                line.append(f"{row['decode_share']:.0%}" if "decode_share" in row else "")
                lines.append(line)
    headings = ["context", "plan", "stack", "largest batch", "peak memory", "decoded tok/s", "to g=1", "of the limit"]
    return headings, lines


def train(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """A routed training step against an ordinary one."""
    lines = []
    for row in last(rows, "train", "model", "device", "batch_size", "block_size").values():
        for arm in (arm for arm in ("ordinary", "routed", "distilled", "compiled") if arm in row):
            line = [row["model"], f"{row['batch_size']} x {row['block_size']:,}", arm]
            line += [f"{row[arm]['median_s'] * 1000:.0f} ms", gib(row[arm]["peak_bytes"])]
            for what in ("time", "memory"):
                line.append(f"{row[f'{arm}_{what}_ratio']:.3f}x" if arm != "ordinary" else "")
            lines.append(line)
    return ["model", "batch x tokens", "step", "median", "peak memory", "time", "memory"], lines


def summary(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The few figures of the README: 8K, one sequence, and the largest batch."""
    eager_cells = last(rows, "eager", "context", "batch_size", "plan")
    static_cells = last(rows, "static", "context", "batch_size", "plan", "stack")
    largest_cells = last(rows, "largest", "context", "plan", "stack")
    lines = []
    for plan in ORDER:
        row = eager_cells.get((8192, 1, plan))
        if row is None or row.get("out_of_memory"):
            continue
        line = [plan, f"{row['cache_bytes'] / 2**20:,.0f} MiB", f"{row['ttft_s'] * 1000:,.0f} ms"]
        line.append(rate(row["decode_tokens_per_s"]))
        fast = static_cells.get((8192, 1, plan, "CUDA graph, inductor"))
        known = fast is not None and "failed" not in fast
        line.append(f"{rate(fast['tokens_per_s'])} ({fast['decode_share']:.0%})" if fast is not None and known else "")
        most = largest_cells.get((8192, plan, "eager"))
        line += [str(most["batch_size"]), rate(most["tokens_per_s"])] if most else ["", ""]
        lines.append(line)
    headings = ["plan", "cache", "TTFT", "tok/s, eager", "tok/s, compiled (of the limit)", "largest batch in 80 GB"]
    return [*headings, "its tok/s, eager"], lines


def targets(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """What was asked for, and what was found, at 8K."""
    eager_cells = last(rows, "eager", "context", "batch_size", "plan")
    static_cells = last(rows, "static", "context", "batch_size", "plan", "stack")
    largest_cells = last(rows, "largest", "context", "plan", "stack")
    (step,) = last(rows, "train", "model", "device", "batch_size", "block_size").values()

    one = {plan: eager_cells[8192, 1, plan] for plan in ("g=1", "g=4", "front half")}
    fast = {plan: static_cells[8192, 1, plan, "CUDA graph, inductor"] for plan in ("g=1", "g=2", "g=4", "front half")}
    long = [static_cells[131072, 1, plan, "CUDA graph, inductor"] for plan in fast]
    graph, plain = (
        largest_cells[8192, "g=4", stack]["tokens_per_s"] / largest_cells[8192, "g=1", stack]["tokens_per_s"]
        for stack in ("CUDA graph", "eager")
    )
    shares = [
        f"{min(row['decode_share'] for row in group):.0%} to {max(row['decode_share'] for row in group):.0%}"
        for group in (fast.values(), long)
    ]
    decode, first = one["g=4"]["decode_ratio"], one["front half"]["ttft_ratio"]
    speed, share = fast["g=4"]["tokens_per_s"], min(row["decode_share"] for row in [*fast.values(), *long])
    time, memory = step["routed_time_ratio"], step["routed_memory_ratio"]
    rates = [rate(one[plan]["decode_tokens_per_s"]) for plan in ("g=1", "g=4")]
    lines = [
        (
            "eager decoding of one sequence with g = 4: at least 1.22x",
            f"{decode:.2f}x ({' and '.join(rates)} tok/s)",
            decode >= 1.22,
        ),
        (
            "compiled decoding of one sequence: at least 208 tok/s, five times the paper's 41.6",
            f"{rate(speed)} with g = 4; {rate(fast['g=1']['tokens_per_s'])} with the full cache",
            speed >= 208,
        ),
        ("the same: at least 70 % of the limit", f"{shares[0]} at 8K, {shares[1]} at 128K", share >= 0.7),
        ("time to first token of the front half: at most 0.58x", f"{first:.3f}x", first <= 0.58),
        (
            "total throughput within 80 GB with g = 4: at least 3x",
            f"eager {plain:.2f}x, as a CUDA graph {graph:.2f}x",
            min(graph, plain) >= 3,
        ),
        (
            "a routed training step: at most 1.03x of time and memory",
            f"{time:.3f}x and {memory:.3f}x",
            max(time, memory) <= 1.03,
        ),
    ]
    words = {True: "reached", False: "missed"}
    return ["target, at 8K", "found", ""], [[target, found, words[met]] for target, found, met in lines]


TABLES = {
    "gpu-eager": eager,
    "gpu-static": static,
    "gpu-largest": largest,
    "gpu-train": train,
    "gpu-summary": summary,
    "gpu-targets": targets,
}
