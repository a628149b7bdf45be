"""What `depthkv plan` prints of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from depthkv.cli.output import console, table
from depthkv.memory import format_bytes
from depthkv.plan import SharingPlan


def show_plan(figures: dict[str, Any], plan: SharingPlan, out: Path) -> None:
    """The plan, the comparison and how sure the choice is."""
    printed = console()
    full, rows = figures["full_loss"], figures["comparison"]
    title = f"{figures['model']}: {len(plan.leaders)} of {plan.num_layers} layers keep a cache"
    printed.print(f"{title}, for a budget of {figures['budget']['words']}", style="bold", markup=False, soft_wrap=True)
    printed.print(
        f"{plan.diagram()} (the first of each group keeps its cache, the others read it)", markup=False, soft_wrap=True
    )
    printed.print(
        f"{format_bytes(figures['kv_bytes_per_token'])} per token instead of "
        f"{format_bytes(figures['full_kv_bytes_per_token'])}\n",
        soft_wrap=True,
    )
    cells = []
    for row in rows:
        held, against = row["loss_score"], row["against_even"]
        interval = (
            ""
            if against["low"] is None or against["low"] != against["low"]
            else (f" [{against['low']:+.3f}, {against['high']:+.3f}]")
        )
        cells.append(
            [
                row["label"],
                str(len(row["leaders"])),
                f"{full + row['sum_of_costs']:.3f}",
                f"{row['predicted_loss']:.3f}",
                f"{row['measured_loss']:.3f}",
                f"{held['value']:.3f}",
                f"{against['difference']:+.3f}{interval}",
            ]
        )
    headings = ["how the layers were chosen", "kept", "sum of costs", "predicted", "measured", "held out"]
    printed.print(table([*headings, "against evenly spaced [95 %]"], cells, "Loss, nats per token"))
    used = figures["calibration"]
    printed.print(
        f"Sum of costs, predicted and measured: {used['cost_tokens']:,} tokens of training text. Held out: documents "
        "that nothing was chosen on.",
        soft_wrap=True,
    )
    served, adapter = figures["held_out_adapter_off"], ""
    if served is not None:
        adapter = (
            f", with the adapter on as under the plans; {served['value']:.3f} held out with it off, as it is served"
        )
    held = figures["held_out_full"]["value"]
    printed.print(f"Full cache: {full:.3f} measured, {held:.3f} held out{adapter}", soft_wrap=True)
    worse = rows[0]["against_even"]
    if worse["low"] is not None and worse["low"] > 0 and "prefill weight" not in figures["budget"]["words"]:
        printed.print(
            f"Held out, evenly spaced layers do better by {worse['difference']:.3f}: more text may help",
            style="yellow",
            soft_wrap=True,
        )
    if (sure := figures["certainty"]) is None:
        printed.print("How sure the choice is cannot be said from one document: raise --cost-blocks", soft_wrap=True)
    else:
        better = sure["better_than_even"]
        words = "" if better is None else f"better than evenly spaced in {better:.0%}, "
        printed.print(f"On documents drawn anew: {words}the same plan in {sure['same_plan']:.0%}", soft_wrap=True)
    given = plan.num_layers - len(plan.leaders)
    order = ", ".join(map(str, figures["order"]))
    printed.print(
        f"{out}: caches are given up in the order {order}; after {given} of them it is this plan", soft_wrap=True
    )
