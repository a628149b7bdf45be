"""What a sharing plan is: for every layer, the layer whose keys and values it reads.

A plan is data, decided once; at run time a layer receives one integer. Layers are counted from 0. *Leaders* keep a KV
cache, *followers* read their leader's and store nothing (arXiv:2604.22782, section 3: mu(l) is the nearest preceding
member of the kept set S). Plans in which a follower reads any other earlier leader are valid, too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from depthkv.errors import PlanError
from depthkv.files import checked_header, read_json, write_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

FORMAT = "depthkv-plan"
VERSION = 1


@dataclass(frozen=True, init=False, repr=False)
class SharingPlan:
    """An immutable map from layers to the layers whose keys and values they read.

    Args:
        kv_source_layers: entry `i` is the layer whose KV layer `i` reads; `kv_source_layers[i] == i` makes it a leader.
        provenance: anything JSON can hold about where the plan came from; ignored when plans are compared.

    Raises:
        PlanError: a source later than its reader, a source that is not itself a leader, layer 0 not a leader.
    """

    kv_source_layers: tuple[int, ...]
    """One source per layer."""
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Free-form JSON object."""

    def __init__(self, kv_source_layers: Sequence[int], provenance: Mapping[str, Any] | None = None) -> None:
        sources = _validated(kv_source_layers)
        object.__setattr__(self, "kv_source_layers", sources)
        object.__setattr__(self, "provenance", _json_object(provenance or {}))

    # Ways to make one

    @classmethod
    def full(cls, num_layers: int) -> SharingPlan:
        """Every layer keeps its own cache: the unchanged model."""
        return cls(range(_positive(num_layers, "num_layers")))

    @classmethod
    def from_leaders(
        cls, leaders: Iterable[int], num_layers: int, kinds: Sequence[Hashable] | None = None
    ) -> SharingPlan:
        """Followers read the nearest preceding leader (of their own kind, where `kinds` gives one per layer).

        `kinds` is `depthkv.architectures.layer_kinds(config)`; the first layer of each kind has to be a leader.
        """
        num_layers = _positive(num_layers, "num_layers")
        if isinstance(leaders, (str, bytes)) or not isinstance(leaders, Iterable):
            raise PlanError(f"expected leaders as a list of layer numbers, got {leaders!r}")
        kept = {_layer_number(leader, f"leaders[{i}]") for i, leader in enumerate(leaders)}
        if outside := sorted(layer for layer in kept if not 0 <= layer < num_layers):
            raise PlanError(f"expected leaders between 0 and {num_layers - 1}, got layer {outside[0]}")
        if 0 not in kept:
            raise PlanError(f"expected layer 0 among the leaders, got {sorted(kept)}")
        kinds = _kinds(kinds, num_layers)
        nearest: dict[Hashable, int] = {}
        sources = []
        for layer in range(num_layers):
            if layer in kept:
                nearest[kinds[layer]] = layer
            if kinds[layer] not in nearest:
                raise PlanError(f"expected layer {layer}, the first of its kind ({kinds[layer]}), to be a leader")
            sources.append(nearest[kinds[layer]])
        return cls(sources)

    @classmethod
    def every(cls, k: int, num_layers: int, kinds: Sequence[Hashable] | None = None) -> SharingPlan:
        """Keep every k-th layer, starting with the first (of each kind, where `kinds` gives one per layer)."""
        k = _positive(k, "k")
        kinds = _kinds(kinds, _positive(num_layers, "num_layers"))
        seen: dict[Hashable, int] = {}
        leaders = []
        for layer in range(num_layers):
            if seen.setdefault(kinds[layer], 0) % k == 0:
                leaders.append(layer)
            seen[kinds[layer]] += 1
        return cls.from_leaders(leaders, num_layers, kinds)

    @classmethod
    def for_retention(cls, retention: float, kinds: Sequence[Hashable]) -> SharingPlan:
        """Keep about `retention` of the layers, evenly spaced within each kind (every k-th where 1/retention = k)."""
        if not isinstance(retention, (int, float)) or not math.isfinite(retention) or not 0 < retention <= 1:
            raise PlanError(f"expected a retention above 0 and at most 1, got {retention!r}")
        members: dict[Hashable, list[int]] = {}
        for layer, kind in enumerate(kinds):
            members.setdefault(kind, []).append(layer)
        leaders: list[int] = []
        # 1/3 written as .33 should mean every third layer
        stride = round(1 / retention) if abs(1 / retention - round(1 / retention)) < 0.05 else 0
        for layers in members.values():
            if stride:
                leaders += layers[::stride]
            else:
                count = max(1, round(retention * len(layers)))
                leaders += [layers[i * len(layers) // count] for i in range(count)]
        return cls.from_leaders(leaders, len(kinds), kinds)

    # What it says

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.kv_source_layers)

    @property
    def leaders(self) -> tuple[int, ...]:
        """Layers that keep a cache, ascending."""
        return tuple(i for i, source in enumerate(self.kv_source_layers) if source == i)

    @property
    def followers(self) -> tuple[int, ...]:
        """Layers that read another layer's cache, ascending."""
        return tuple(i for i, source in enumerate(self.kv_source_layers) if source != i)

    @property
    def retention(self) -> float:
        """Share of the layers that keep a cache, `len(leaders) / num_layers`."""
        return len(self.leaders) / self.num_layers

    @property
    def is_full(self) -> bool:
        """Whether every layer keeps its own cache."""
        return not self.followers

    def readers(self, leader: int) -> tuple[int, ...]:
        """Layers that read `leader`'s cache, itself included."""
        return tuple(i for i, source in enumerate(self.kv_source_layers) if source == leader)

    def kv_bytes_per_token(self, config: PreTrainedConfig, dtype: torch.dtype) -> int:
        """Bytes that one token adds to the cache under this plan, see `depthkv.memory.kv_bytes_per_token`."""
        from depthkv.memory import kv_bytes_per_token

        return kv_bytes_per_token(config, dtype, self)

    def diagram(self) -> str:
        """One line: a bracket per group, the leader first, runs of layers shortened: `[0-3] [4-7]`."""
        return " ".join(f"[{_shown(self.readers(leader))}]" for leader in self.leaders)

    def __repr__(self) -> str:
        return f"SharingPlan({len(self.leaders)}/{self.num_layers} layers keep a cache: {self.diagram()})"

    def __hash__(self) -> int:
        return hash(self.kv_source_layers)

    # Files

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `save` writes."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kv_source_layers": list(self.kv_source_layers),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: object) -> SharingPlan:
        """The inverse of `to_dict`; unknown keys, another format or version and wrong types are errors."""
        known = {"format", "version", "kv_source_layers", "provenance"}
        data = checked_header(data, FORMAT, VERSION, known, PlanError)
        if "kv_source_layers" not in data:
            raise PlanError('expected the key "kv_source_layers", got none')
        return cls(data["kv_source_layers"], data.get("provenance", {}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `plan.json`: first beside the target, then renamed, so that no half-written plan can be seen."""
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", "the plan", PlanError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SharingPlan:
        """Read a `plan.json`; the error names the file."""
        data = read_json(path, "plan", PlanError)
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None


def _validated(kv_source_layers: Sequence[int]) -> tuple[int, ...]:
    if isinstance(kv_source_layers, (str, bytes)) or not isinstance(kv_source_layers, Sequence):
        raise PlanError(f"expected kv_source_layers as a list of layer numbers, got {kv_source_layers!r}")
    sources = tuple(_layer_number(source, f"kv_source_layers[{i}]") for i, source in enumerate(kv_source_layers))
    if not sources:
        raise PlanError("expected at least one layer, got an empty kv_source_layers")
    for layer, source in enumerate(sources):
        if source < 0:
            raise PlanError(f"expected layer {layer} to read a layer from 0 on, got {source}")
        if source > layer:
            raise PlanError(f"expected layer {layer} to read itself or an earlier layer, got layer {source}")
        if sources[source] != source:
            raise PlanError(
                f"expected layer {layer} to read a leader, got layer {source}, "
                f"which itself reads layer {sources[source]}"
            )
    return sources


def _layer_number(value: object, name: str) -> int:
    # numpy's integers pass, booleans and floats do not
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise PlanError(f"expected {name} to be a layer number, got {value!r}")
    return int(value.__index__())


def _positive(value: int, name: str) -> int:
    number = _layer_number(value, name)
    if number < 1:
        raise PlanError(f"expected {name} of at least 1, got {number}")
    return number


def _kinds(kinds: Sequence[Hashable] | None, num_layers: int) -> Sequence[Hashable]:
    if kinds is None:
        return [None] * num_layers
    if len(kinds) != num_layers:
        raise PlanError(f"expected one kind for each of the {num_layers} layers, got {len(kinds)}")
    return kinds


def _json_object(provenance: object) -> dict[str, Any]:
    if not isinstance(provenance, Mapping):
        raise PlanError(f"expected provenance as a JSON object, got {type(provenance).__name__}")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"expected provenance that JSON can hold, got {error}") from error
    return copied


def runs_of(layers: Sequence[int]) -> list[list[int]]:
    """First and last of each run of ascending layers that follow one another."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return runs


def _shown(layers: Sequence[int]) -> str:
    return " ".join(f"{a}" if a == b else f"{a}-{b}" if b > a + 1 else f"{a} {b}" for a, b in runs_of(layers))
