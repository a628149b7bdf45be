"""What `depthkv plan --json` writes: the plan, why it was chosen, and everything that the report draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from depthkv.calibrate import Calibrator
from depthkv.errors import PlanError
from depthkv.evaluate.intervals import score
from depthkv.evaluate.perplexity import spread
from depthkv.memory import kv_bytes_per_token
from depthkv.plan import SharingPlan
from depthkv.planner.explain import Planned, compare_held_out
from depthkv.planner.model import CostModel
from depthkv.planner.swaps import cheapest_plan

FORMAT, VERSION = "depthkv-plan-figures", 1

MEASURED_SIZES = 12
"""Nested plans whose loss is measured, evenly over all sizes, beside the chosen one."""


def sizes_to_measure(planned: Planned) -> list[SharingPlan]:
    """Nested plans whose loss is worth measuring."""
    smaller = planned.nested[1:]
    chosen = [smaller[i] for i in spread(len(smaller), MEASURED_SIZES)] if smaller else []
    return list(dict.fromkeys([*chosen, *smaller[-1:]]))


def plan_figures(
    planned: Planned,
    calibrator: Calibrator,
    config: Any,
    held_out: Mapping[SharingPlan, Sequence[float]],
    held_out_documents: Sequence[str],
    seed: int = 0,
    served: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The figures, less what only the command knows (model, data, command).

    Args:
        planned: from `make_plan`.
        calibrator: that it was made with.
        config: of the model.
        held_out: loss of each held-out block, for the plan, its rivals and the full cache.
        held_out_documents: of each block.
        seed: of the intervals.
        served: held-out losses of the full cache with the adapter off, where the model has one.
    """
    plan, calibration = planned.plan, calibrator.calibration
    full_loss = calibration.full_loss
    dtype: torch.dtype = next(calibrator.model.parameters()).dtype

    def per_token(of: SharingPlan) -> int:
        return kv_bytes_per_token(config, dtype, of)

    full = SharingPlan.full(plan.num_layers)
    rows = []
    for label, rival, against_full, against_even in compare_held_out(planned, held_out, held_out_documents, seed):
        rows.append(
            {
                "label": label,
                "leaders": list(rival.leaders),
                "kv_source_layers": list(rival.kv_source_layers),
                "kv_bytes_per_token": per_token(rival),
                "predicted_loss": full_loss + predicted_unseen(planned, rival),
                "sum_of_costs": planned.problem.predicted(rival, planned.cost),
                "measured_loss": calibrator.plan_loss(rival),
                "loss_score": against_full.to_dict(),
                "against_even": {
                    "difference": against_even.difference,
                    "low": against_even.difference_low,
                    "high": against_even.difference_high,
                },
            }
        )
    seconds = calibration.seconds
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_layers": plan.num_layers,
        "kv_source_layers": list(plan.kv_source_layers),
        "leaders": list(plan.leaders),
        "retention": plan.retention,
        "kv_bytes_per_token": per_token(plan),
        "full_kv_bytes_per_token": per_token(full),
        "predicted_loss": rows[0]["predicted_loss"],
        "measured_loss": rows[0]["measured_loss"],
        "calibration": {
            "tokens": calibrator.blocks.numel(),
            "cost_tokens": calibrator.cost_blocks.numel(),
            "documents": len(set(calibration.block_documents)),
            "block_size": calibration.block_size,
            "similarity_seconds": seconds.get("similarity", 0.0) + seconds.get("outputs", 0.0),
            "cost_seconds": seconds.get("costs", 0.0),
            "search_evaluations": len(planned.found.measured),
            "search_seconds": round(seconds.get("plans", 0.0), 1),
        },
        "full_loss": full_loss,
        "held_out_full": score(held_out[full], held_out_documents, seed=seed).to_dict(),
        "held_out_adapter_off": None if served is None else score(served, held_out_documents, seed=seed).to_dict(),
        "similarity": calibration.similarity,
        "cost": [[value if math.isfinite(value) else None for value in row] for row in planned.cost.tolist()],
        "order": planned.order,
        "nested": [_nested(planned, calibrator, entry, per_token(entry)) for entry in planned.nested],
        "comparison": rows,
        "certainty": planned.certainty,
    }


def predicted_unseen(planned: Planned, plan: SharingPlan) -> float:
    """The loss increase that the model predicts for a plan from all others that were measured."""
    others = [entry for entry in planned.found.model.measured if entry.plan != plan]
    if not others:
        return planned.problem.predicted(plan, planned.cost)
    return CostModel(planned.cost, others, planned.found.model.scales).predicted(plan)


def _nested(planned: Planned, calibrator: Calibrator, plan: SharingPlan, bytes_per_token: int) -> dict[str, Any]:
    problem, full_loss = planned.problem, calibrator.calibration.full_loss
    model = planned.found.model
    free = plan
    if not plan.is_full:
        budget = replace(problem.budget, max_bytes=problem.bytes(plan.leaders), max_leaders=())
        try:
            free = cheapest_plan(replace(problem, budget=budget), model.cost())
        except PlanError:
            free = plan
    predicted = {p: 0.0 if p.is_full else model.predicted(p) for p in (plan, free)}
    return {
        "leaders": list(plan.leaders),
        "kv_source_layers": list(plan.kv_source_layers),
        "kv_bytes_per_token": bytes_per_token,
        "predicted_loss": full_loss + predicted[plan],
        "measured_loss": calibrator.calibration.plan_loss(plan),
        "free_predicted_loss": full_loss + min(predicted.values()),
        "chosen": plan == planned.plan,
    }
