"""LoRA and DoRA through PEFT, in force only while layers share: the full-cache model stays the base, bit for bit.

arXiv:2604.22782 trains all weights and leaves adapters open. With an adapter of a few megabytes one checkpoint serves
both: with every layer's own cache it is what it was, and under a plan the adapter is switched on.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from depthkv.decoder import Decoder, find_decoder
from depthkv.errors import CheckpointError, DepthKVError
from depthkv.patches import ADAPTER_SWITCH

if TYPE_CHECKING:
    from depthkv.plan import SharingPlan

__all__ = ["LoraSettings", "add_adapter", "load_adapter", "save_adapter"]

_TARGETS = ("all-linear", "attention", "query-output")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What `add_adapter` adds.

    Raises:
        DepthKVError: a value outside its range; the error names it.
    """

    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by `alpha / rank`."""
    dropout: float = 0.0
    targets: str = "all-linear"
    """Which linear layers of the decoder's layers: all, those of attention, or attention's without K and V."""
    use_dora: bool = False
    """Split each weight into size and direction (arXiv:2402.09353); slower."""

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise DepthKVError(f"expected a rank of at least 1, got {self.rank!r}")
        if not self.alpha > 0:
            raise DepthKVError(f"expected alpha above 0, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise DepthKVError(f"expected dropout from 0 to below 1, got {self.dropout!r}")
        if self.targets not in _TARGETS:
            raise DepthKVError(f"expected targets among {', '.join(_TARGETS)}, got {self.targets!r}")


def add_adapter(model: nn.Module, settings: LoraSettings) -> Any:
    """Wrap `model` in a PEFT model whose adapter is on only under `share` with followers and under `route`.

    The base's weights are frozen and shared with `model`; the adapter starts as the identity.

    Raises:
        UnsupportedModelError: a model whose layers cannot share.
        DepthKVError: "query-output" on a family with one projection for Q, K and V.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    decoder = find_decoder(model)
    names = target_modules(decoder, settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        use_dora=settings.use_dora,
        target_modules=names,
        fan_in_fan_out=isinstance(decoder.model.get_submodule(names[0]), Conv1D),  # GPT-2 stores weights transposed
        task_type="CAUSAL_LM",
    )
    with _without_renamed():
        return gate(get_peft_model(model, config))


@contextmanager
def _without_renamed() -> Iterator[None]:
    """PEFT reads a property that transformers 5.23 has given another name: nothing that a user could change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def target_modules(decoder: Decoder, targets: str) -> list[str]:
    """Names of the linear modules that `LoraSettings.targets` means, as the whole model names them."""
    from transformers.pytorch_utils import Conv1D

    family = decoder.family
    if targets == "query-output" and family.fused is not None:
        raise DepthKVError(
            f'expected a model with its own query projection for targets "query-output", got {family.fused}'
        )
    wanted = {}
    for layer in range(decoder.num_layers):
        root = decoder.layers[layer] if targets == "all-linear" else decoder.attention(layer)
        wanted.update({id(module): module for module in root.modules() if isinstance(module, (nn.Linear, Conv1D))})
        if targets == "query-output":
            for name in (family.k_proj, family.v_proj):
                wanted.pop(id(getattr(decoder.attention(layer), name)), None)
    names = [name for name, module in decoder.model.named_modules() if id(module) in wanted]
    if not names:
        raise DepthKVError("expected linear layers to adapt, got none in the decoder's layers")
    return names


def gate(peft_model: Any) -> Any:
    """Switch the adapter off, and let `share` and `route` switch it on; returns the same model."""

    def switch(on: bool) -> None:
        tuner = peft_model.base_model
        tuner.enable_adapter_layers() if on else tuner.disable_adapter_layers()

    setattr(peft_model, ADAPTER_SWITCH, switch)
    switch(False)
    return peft_model


def save_adapter(
    directory: str | os.PathLike[str],
    peft_model: Any,
    *,
    base: str,
    tokenizer: Any = None,
    plan: SharingPlan | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and `plan.json` into a new or empty folder.

    Args:
        directory: where to.
        peft_model: from `add_adapter`.
        base: the name by which `depthkv.load` finds the base model; "base" writes it into the folder `base` beside
            the adapter, for a base whose own weights were trained.
        tokenizer: saved with such a base.
        plan: what the adapter is meant for.
        provenance: how it was made.

    Raises:
        CheckpointError: the folder holds something else or cannot be written.
    """
    from depthkv.folders import written_folder
    from depthkv.plan import SharingPlan

    for config in peft_model.peft_config.values():
        config.base_model_name_or_path = base
    with written_folder(directory) as work:
        if base == "base":
            inner = peft_model.get_base_model()
            # PEFT has put its layers between: without them these are the base's own names
            weights = {n.replace(".base_layer", ""): w for n, w in inner.state_dict().items() if "lora_" not in n}
            inner.save_pretrained(work / "base", state_dict=weights)
            tokenizer.save_pretrained(work / "base")
        peft_model.save_pretrained(work, safe_serialization=True, save_embedding_layers=False)
        (work / "README.md").unlink(missing_ok=True)  # PEFT's empty template
        if plan is not None:
            merged = {**plan.provenance, **(provenance or {})}
            SharingPlan(plan.kv_source_layers, provenance=merged).save(work / "plan.json")


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], *, is_trainable: bool = False) -> Any:
    """`model` wrapped with the adapter in `directory`, switched off until layers share.

    Raises:
        CheckpointError: no adapter there, a damaged one, or one for another model.
    """
    from peft import PeftModel

    folder = Path(directory)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"expected {name} in {folder}, got none")
    try:
        with _without_renamed():
            return gate(PeftModel.from_pretrained(model, folder, is_trainable=is_trainable))
    except Exception as error:  # PEFT lets through whatever json, safetensors and torch raise
        raise CheckpointError(f"expected an adapter for this model in {folder}, got: {error}") from error
