"""What can be said about a plan and a vLLM configuration before a model is built. Imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from depthkv.architectures import layer_kinds
from depthkv.errors import PlanError, UnsupportedModelError
from depthkv.plan import SharingPlan
from depthkv.sharing import check_plan


def plan_of(config: Any) -> SharingPlan:
    """The plan in the config of an exported checkpoint.

    Raises:
        PlanError: there is none, or it does not fit the layers.
        UnsupportedModelError: layers that cannot share, such as those of latent attention (MLA).
    """
    sources = getattr(config, "kv_source_layers", None)
    if sources is None:
        raise PlanError("expected kv_source_layers in the config.json of an export, got none")
    plan = SharingPlan(sources)
    check_plan(plan, layer_kinds(config))
    return plan


def check_stages(plan: SharingPlan, stages: Sequence[tuple[int, int]]) -> None:
    """Refuse a plan in which a layer reads one of another pipeline stage: no cache is sent between stages.

    Args:
        plan: of the whole model.
        stages: first layer of each stage, and the one after its last.

    Raises:
        PlanError: names the layer and the stages' boundaries.
    """
    for first, end in stages:
        for layer in range(first, end):
            source = plan.kv_source_layers[layer]
            if source < first:
                bounds = ", ".join(f"{a} to {b - 1}" for a, b in stages)
                raise PlanError(
                    f"expected layer {layer} to read a layer of its own pipeline stage ({first} to {end - 1}), got "
                    f"layer {source}; the stages are the layers {bounds} (VLLM_PP_LAYER_PARTITION moves them)"
                )


def num_trailing_followers(plan: SharingPlan) -> int:
    """Layers after the last leader."""
    return plan.num_layers - 1 - plan.leaders[-1]


def check_fast_prefill(*, eager: bool, stages: int) -> None:
    """Refuse `--kv-sharing-fast-prefill` where the last layers could not leave positions out.

    Raises:
        UnsupportedModelError: a compiled model, or several pipeline stages.
    """
    if not eager or stages > 1:
        got = "a compiled model" if not eager else f"{stages} pipeline stages"
        raise UnsupportedModelError(
            f"expected --enforce-eager and one pipeline stage with --kv-sharing-fast-prefill, got {got}"
        )


def refuse_backend(name: str, layer: int) -> UnsupportedModelError:
    """For an attention backend of vLLM that cannot read another layer's cache."""
    return UnsupportedModelError(
        f"expected an attention backend in which layer {layer} can read another layer's cache, got {name}; choose "
        "another with --attention-backend"
    )
