"""Export: a checkpoint folder for one plan, which serving engines load, without the K and V weights of followers.

The folder has a model type and architecture of its own (`depthkv_llama`, `DepthKVLlamaForCausalLM`), and its weights a
name that transformers finds only when told: what does not know the plan fails, instead of running the followers with K
and V made up. `depthkv.load` and the vLLM plugin (`depthkv.vllm_plugin`) know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from depthkv.architectures import FAMILIES, text_config
from depthkv.decoder import Decoder, find_decoder
from depthkv.errors import CheckpointError, PlanError, UnsupportedModelError
from depthkv.folders import require_replaceable, written_folder
from depthkv.plan import SharingPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["export"]

EXPORT_KEY = "depthkv"
"""In config.json: an object with the original `model_type` and `architecture`, `follower_kv` (whether followers have K
and V weights) and `version` (of depthkv)."""
VARIANT = "depthkv"
"""transformers' name for other weights in the same folder: `model.depthkv.safetensors`."""

TYPE_PREFIX = "depthkv_"
ARCHITECTURE_PREFIX = "DepthKV"


class AbsentKV(nn.Module):
    """Stands where a follower's K or V projection, or its norm on keys, was removed; cannot be computed."""

    def __init__(self, layer: int, name: str) -> None:
        super().__init__()
        self.layer = layer
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise PlanError(
            f"expected layer {self.layer} to read another layer's keys and values, got a forward that computes its "
            f"own, but {self.name} was removed in the export; run the model under share(model, plan) with its plan"
        )


def export(
    directory: str | os.PathLike[str],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plan: SharingPlan,
    *,
    keep_kv: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder for `plan` alone, which `depthkv.load` and vLLM with depthkv's plugin read.

    An adapter is merged into the weights: `model` itself, where it is a PEFT model, is used up by that. Everything is
    written into a folder beside `directory` and renamed at the end.

    Args:
        directory: where to; a folder that exists must be empty or hold an earlier export, which is replaced.
        model: weights as they are now; neither shared nor routed.
        tokenizer: saved beside it, with its chat template.
        plan: goes into config.json as `kv_source_layers` and into plan.json.
        keep_kv: keep the K and V weights of followers, so that the folder can be run under other plans, too.
        provenance: added to the plan's own provenance in plan.json.

    Raises:
        CheckpointError: `directory` holds something else, the disk is full.
        PlanError: the plan does not fit the model.
        UnsupportedModelError: K and V have no weights of their own that could be removed.
    """
    from depthkv import __version__, checkpoint
    from depthkv.patches import ACTIVE
    from depthkv.sharing import check_plan

    require_new_or_export(Path(directory))
    decoder = find_decoder(model)
    check_plan(plan, decoder.kinds)
    require_kv(decoder, range(decoder.num_layers))
    if not keep_kv:
        check_removable(decoder.config)
    if hasattr(decoder.module, ACTIVE):
        raise PlanError("expected a model that is neither shared nor routed to export, got one that is; remove() first")
    merge: Any = getattr(model, "merge_and_unload", None)
    if merge is not None:
        model = merge()
        decoder = find_decoder(model)
    removed = () if keep_kv else tuple(f"{name}." for name in _kv_modules(decoder, plan.followers).values())
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(removed)}
    with written_folder(directory) as work:
        model.save_pretrained(work, state_dict=weights, variant=VARIANT)  # type: ignore[operator]
        tokenizer.save_pretrained(work)
        path = work / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = type(model).__name__
        config[EXPORT_KEY] = {
            "model_type": config["model_type"],
            "architecture": architecture,
            "follower_kv": keep_kv,
            "version": __version__,
        }
        config["model_type"] = TYPE_PREFIX + config["model_type"]
        config["architectures"] = [ARCHITECTURE_PREFIX + architecture]
        path.write_text(json.dumps(config), encoding="utf-8")
        checkpoint.write_plan(work, model.config, plan, provenance)


def require_new_or_export(target: Path) -> None:
    """Refuse folders that hold anything but an earlier export: a checkpoint with all its weights is not replaced.

    Raises:
        CheckpointError: names what is there.
    """
    require_replaceable(target)
    if target.is_dir() and any(target.iterdir()):
        path = target / "config.json"
        try:
            is_one = is_exported(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, RecursionError):
            is_one = False
        if not is_one:
            raise CheckpointError(f"expected a new or empty folder or an earlier export, got {target}, a checkpoint")


def check_removable(config: PreTrainedConfig) -> None:
    """Refuse models whose followers have no K and V weights that could be left out.

    Raises:
        UnsupportedModelError: one projection for Q, K and V, or a family that depthkv has no facts about.
    """
    name = text_config(config).model_type
    family = FAMILIES.get(name)
    if family is None or family.fused is not None:
        got = "which depthkv has no facts about" if family is None else f"with one projection {family.fused}"
        raise UnsupportedModelError(
            f"expected a family with K and V projections of their own to remove, got {name}, {got}; keep them (keep_kv)"
        )


# Reading


def is_exported(values: Mapping[str, Any]) -> bool:
    """Whether these are the values of an export's config.json."""
    return str(values.get("model_type")).startswith(TYPE_PREFIX)


def exported_config(values: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The config of the original model, with `kv_source_layers`, from an export's config.json; None from another's.

    Raises:
        CheckpointError: values that `export` does not write.
    """
    if not is_exported(values):
        return None
    facts = values.get(EXPORT_KEY)
    if not isinstance(facts, dict) or not all(isinstance(facts.get(k), str) for k in ("model_type", "architecture")):
        raise CheckpointError(f'expected "{EXPORT_KEY}" in config.json to say what was exported, got {facts!r}')
    if values["model_type"] != TYPE_PREFIX + facts["model_type"]:
        raise CheckpointError(f"expected the model type {TYPE_PREFIX}{facts['model_type']}, got {values['model_type']}")
    if "kv_source_layers" not in values:
        raise CheckpointError("expected kv_source_layers in the config.json of an export, got none")
    rest = {key: value for key, value in values.items() if key != "model_type"}
    return transformers.AutoConfig.for_model(facts["model_type"], **rest | {"architectures": [facts["architecture"]]})


def is_export(config: PreTrainedConfig) -> bool:
    """Whether `config` is that of an exported checkpoint."""
    return isinstance(getattr(config, EXPORT_KEY, None), dict)


def lacks_follower_kv(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint can be run under its own plan only, or one with fewer leaders."""
    return is_export(config) and not getattr(config, EXPORT_KEY).get("follower_kv", False)


def remove_follower_kv(model: PreTrainedModel, plan: SharingPlan) -> set[str]:
    """Put `AbsentKV` in the place of the followers' K and V modules; returns the names of their parameters."""
    names = set()
    for (layer, part), name in _kv_modules(find_decoder(model), plan.followers).items():
        names |= {f"{name}.{parameter}" for parameter, _ in model.get_submodule(name).named_parameters()}
        model.set_submodule(name, AbsentKV(layer, part))
    return names


def has_kv(decoder: Decoder, layer: int) -> bool:
    """Whether the layer has weights for keys and values; an export leaves out those of followers."""
    return not any(isinstance(module, AbsentKV) for module in decoder.attention(layer).children())


def require_kv(decoder: Decoder, layers: Iterable[int]) -> None:
    """Refuse to have these layers compute keys and values if an export left their weights out.

    Raises:
        PlanError: names the first such layer.
    """
    for layer in layers:
        if not has_kv(decoder, layer):
            raise PlanError(
                f"expected layer {layer} to read another layer's keys and values, got one that computes its own, but "
                "its K and V weights were removed in the export (export with keep_kv to keep them)"
            )


def _kv_modules(decoder: Decoder, layers: Iterable[int]) -> dict[tuple[int, str], str]:
    """By layer and own name: the full names of the modules that a follower does not need."""
    family, names = decoder.family, {id(module): name for name, module in decoder.model.named_modules()}
    found = {}
    for layer in layers:
        attention = decoder.attention(layer)
        for part in (family.k_proj, family.v_proj, family.k_norm):
            module = getattr(attention, part, None) if part else None
            if part and isinstance(module, nn.Module):
                found[layer, part] = f"{names[id(attention)]}.{part}"
    return found
