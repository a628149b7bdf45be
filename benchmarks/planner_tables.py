"""Tables of docs/results.md from docs/raw/planner.jsonl: the planner beside other rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training_tables import Read, Table

PLANNER = {
    "untrained": "untrained",
    "leader subsets, all layers": "leader subsets, all layers",
    "leader subsets, adapter": "leader subsets, adapter",
    "R-CLA, adapter": "R-CLA, adapter",
    "essay adapter": "essay adapter",
    "from scratch, leader subsets": "from scratch, 12 layers",
    "from scratch, leader subsets, validation": "the same, calibrated on held-out text",
}
"""Models of benchmarks/planner.py, in the order of the table."""


def planner_runs(read: Read) -> dict[tuple[str, float, bool], dict[str, Any]]:
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


def planner(read: Read) -> Table:
    """Excess loss of evenly spaced plans and of the planner's."""
    runs = planner_runs(read)
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
    return headings, rows


def planner_rules(read: Read) -> Table:
    """Excess loss of every rule at half of the layers."""
    runs = planner_runs(read)
    names = ["planner", "evenly spaced", "sum of costs, not searched", "random leaders", "K/V similarity only"]
    names += ["KVSharer: most unlike first", "its reverse: most alike first", "attention outputs only"]
    labels = [label for label in PLANNER if (label, 0.5, True) in runs]
    rows = []
    for name in names:
        rows.append([name, *(f"{excess(runs[label, 0.5, True], name):+.3f}" for label in labels)])
    return ["rule", *(PLANNER[label] for label in labels)], rows


TABLES: dict[str, Callable[[Read], Table]] = {"planner": planner, "planner-rules": planner_rules}
