"""What `depthkv plan --axes ... --json` writes: the recipe, everything that was measured, and the comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from depthkv.compress.costs import EFFECTS, PAIRS
from depthkv.compress.planner import Chosen, MeasuredRecipe, front
from depthkv.compress.recipe import CacheRecipe
from depthkv.evaluate.intervals import score
from depthkv.memory import cache_bytes

FORMAT, VERSION = "depthkv-recipe-figures", 1

THIS_RECIPE = "this recipe"


@dataclass(frozen=True, kw_only=True)
class Rival:
    """The best recipe of the same bytes with fewer axes."""

    label: str
    """Such as "bits alone"."""
    chosen: Chosen | None
    """None where nothing fits."""


def recipe_figures(
    chosen: Chosen,
    rivals: Sequence[Rival],
    held_out: Mapping[CacheRecipe, Sequence[float]],
    documents: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """The figures, less what only the command knows (model, data, command, text).

    Args:
        chosen: from `choose_recipe`.
        rivals: to compare with.
        held_out: loss of each held-out block, for the recipe, the rivals' and the full cache.
        documents: of each held-out block.
        seed: of the intervals.
    """
    space, best = chosen.space, chosen.best
    full = space.recipe()
    full_loss = statistics.fmean(chosen.measured[0].losses)
    # what rivals measured is known, too
    measured = {entry.recipe: entry for rival in rivals if rival.chosen for entry in rival.chosen.measured}
    measured |= {entry.recipe: entry for entry in chosen.measured}
    kept = front([entry for entry in measured.values() if entry.reason != "leader"])
    rows = [(THIS_RECIPE, best)]
    rows += [(rival.label, rival.chosen.best) for rival in rivals if rival.chosen is not None]
    single = best_single(rivals)
    baseline = None if single is None else held_out[single.recipe]
    comparison = []
    for label, entry in rows:
        losses = held_out[entry.recipe]
        against = score(losses, documents, baseline, seed=seed) if baseline is not None else None
        comparison.append(
            {
                "label": label,
                "recipe": plain(entry.recipe),
                "bytes": entry.bytes,
                "measured_loss": full_loss + entry.excess,
                "loss_score": score(losses, documents, held_out[full], seed=seed).to_dict(),
                "against_single": None
                if against is None
                else {
                    "difference": against.difference,
                    "low": against.difference_low,
                    "high": against.difference_high,
                },
            }
        )
    errors = chosen.prediction_errors
    costs = chosen.costs
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_layers": len(space.kinds),
        "axes": list(space.axes),
        "recipe": plain(best.recipe),
        "words": best.recipe.describe(),
        "bytes": best.bytes,
        "full_bytes": cache_bytes(space.config, space.dtype, space.context, space.batch),
        "full_loss": full_loss,
        "predicted_loss": None if best.predicted is None else full_loss + best.predicted,
        "measured_loss": full_loss + best.excess,
        "settled": chosen.settled,
        "prediction": {
            "recipes": len(errors),
            "mean_error": statistics.fmean(errors) if errors else None,
            "mean_absolute_error": statistics.fmean(map(abs, errors)) if errors else None,
            "form": costs.form,
            "coefficients": {
                f"{EFFECTS[a]} and {EFFECTS[b]}": float(c) for (a, b), c in zip(PAIRS, costs.coefficients, strict=True)
            },
        },
        "sensitivity": {str(leader): excess for leader, excess in chosen.sensitivity.items()},
        "measured": [_entry(entry, entry in kept) for entry in measured.values()],
        "held_out_full": score(held_out[full], documents, seed=seed).to_dict(),
        "comparison": comparison,
        "no_room": [rival.label for rival in rivals if rival.chosen is None],
    }


def best_single(rivals: Sequence[Rival]) -> MeasuredRecipe | None:
    """The best rival, by its measured loss."""
    found = [rival.chosen.best for rival in rivals if rival.chosen is not None]
    return min(found, key=lambda entry: entry.excess) if found else None


def plain(recipe: CacheRecipe) -> dict[str, Any]:
    """The recipe without its provenance."""
    return {key: value for key, value in recipe.to_dict().items() if key != "provenance"}


def _entry(entry: MeasuredRecipe, on_front: bool) -> dict[str, Any]:
    return {
        "axes": list(entry.axes),
        "leaders": len(entry.recipe.plan.leaders),
        "words": entry.recipe.describe(),
        "bytes": entry.bytes,
        "excess": entry.excess,
        "error": entry.error,
        "predicted_excess": entry.predicted,
        "reason": entry.reason,
        "on_front": on_front,
    }
