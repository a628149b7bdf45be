"""What was measured on a model and a text, in one JSON file: the state of a run that was stopped, and its result."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from depthkv.architectures import LayerKind
from depthkv.errors import DepthKVError
from depthkv.files import read_json, write_text
from depthkv.plan import SharingPlan

FORMAT, VERSION = "depthkv-calibration", 1

_SAMPLE = 4096
"""Elements of each weight that the fingerprint looks at."""

Matrix = list[list[float | None]]
"""`[layers][layers]`: entry [l][j] is of reader l and source j, None where l cannot read j."""

KV_SIMILARITIES = ("key_cka", "key_cosine", "key_r2", "value_cka", "value_cosine", "value_r2", "kv_distance")
OUTPUT_SIMILARITIES = ("output_cosine", "output_error")
SIMILARITIES = (*KV_SIMILARITIES, *OUTPUT_SIMILARITIES)
"""Cheap measures. Keys are taken before the rotary embedding (cosine and distance are the same after it). `kv_distance`
is the root of the mean squared Euclidean distance of keys and values together. `output_cosine` and `output_error`
compare what the attention of layer l gives when it reads j with what it gives on its own: mean cosine over tokens, and
squared error relative to the squared output. All but the last and the distance grow with similarity."""


@dataclass(kw_only=True)
class Calibration:
    """Measurements on one model and text. Losses are in nats per token, one for each block of `block_documents`."""

    fingerprint: str
    """Of the weights, the text, the dtype and the sizes: another one means that nothing here holds."""
    kinds: list[str]
    """Of each layer; layers of unlike kinds cannot share."""
    block_documents: list[str]
    """Name of the document that each block of the cost measurement starts in."""
    block_size: int
    """Tokens of each block."""
    similarity_tokens: int = 0
    """Tokens that keys and values were compared on."""
    output_tokens: int = 0
    """Tokens that attention outputs were compared on."""
    similarity: dict[str, Matrix] = field(default_factory=dict)
    """By measure, over all KV heads, see `SIMILARITIES`."""
    similarity_heads: dict[str, list[Matrix]] = field(default_factory=dict)
    """The same for each KV head, of the measures that have heads. Heads of unlike numbers are left out."""
    full_losses: list[float] = field(default_factory=list)
    """Every layer reads its own keys and values (an adapter that belongs to sharing is on)."""
    cost_losses: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    """By reader and source: that layer alone reads another one."""
    plan_losses: dict[tuple[int, ...], list[float]] = field(default_factory=dict)
    """By `kv_source_layers`: of plans that were measured on the same blocks."""
    searches: dict[str, int] = field(default_factory=dict)
    """By a search's key: how many plans had been measured when it began, so that it can be taken up again."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase: similarity, outputs, costs, plans."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.kinds)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(reader, earlier source) of one kind, by reader."""
        for layer in range(self.num_layers):
            for source in range(layer):
                if self.kinds[layer] == self.kinds[source]:
                    yield layer, source

    @property
    def num_pairs(self) -> int:
        """How many pairs could share."""
        return sum(1 for _ in self.pairs())

    @property
    def full_loss(self) -> float:
        """Mean of `full_losses`."""
        return _mean(self.full_losses)

    @property
    def has_costs(self) -> bool:
        """Whether every pair was measured on every block."""
        wanted = len(self.block_documents)
        return len(self.full_losses) == wanted and all(
            len(self.cost_losses.get(layer, {}).get(source, ())) == wanted for layer, source in self.pairs()
        )

    def cost(self) -> torch.Tensor:
        """Loss increase when only layer l reads j, `[layers, layers]`, fp64; 0 on the diagonal, inf where impossible.

        Raises:
            DepthKVError: the costs are not measured.
        """
        if not self.has_costs:
            raise DepthKVError("expected a calibration with the cost of every pair of layers, got one without")
        cost = torch.full((self.num_layers, self.num_layers), math.inf, dtype=torch.float64)
        cost.fill_diagonal_(0.0)
        for layer, source in self.pairs():
            cost[layer, source] = _mean(self.cost_losses[layer][source]) - self.full_loss
        return cost

    def plan_loss(self, plan: SharingPlan) -> float | None:
        """Mean loss of a plan on the blocks, if it was measured."""
        if plan.is_full:
            return self.full_loss
        losses = self.plan_losses.get(plan.kv_source_layers)
        return None if losses is None else _mean(losses)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write beside the target, then rename."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        data["plan_losses"] = [
            {"kv_source_layers": list(sources), "losses": losses} for sources, losses in self.plan_losses.items()
        ]
        text = json.dumps({"format": FORMAT, "version": VERSION, **data}, allow_nan=False)
        write_text(path, text + "\n", "the calibration")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            DepthKVError: no such file, no JSON, unknown or missing keys, wrong types; names the file.
        """
        data = read_json(path, "calibration", parse_constant=_no_constant)
        try:
            return _checked(data)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            got = str(error) if isinstance(error, DepthKVError) else f"a damaged one ({type(error).__name__}: {error})"
            got = got if got.startswith("expected") else f"expected a calibration, got {got}"
            raise DepthKVError(f"{path}: {got}") from error


def fingerprint(model: nn.Module, blocks: torch.Tensor, settings: Sequence[Any]) -> str:
    """A hash of the config, of elements from all over every weight, of the tokens, and of `settings`.

    Raises:
        DepthKVError: weights that are not in memory.
    """
    config: Any = model.config
    left_out = ("transformers_version", "_name_or_path", "quantization_config")
    facts = {key: value for key, value in config.to_dict().items() if key not in left_out}
    digest = hashlib.sha256(json.dumps([facts, list(settings)], sort_keys=True, default=str).encode())
    digest.update(blocks.to(torch.int64).contiguous().numpy().tobytes())
    for name, module in model.named_modules():  # of adapters: their weights alone do not say how much they count
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            digest.update(f"{name} {sorted(scaling.items())}".encode())
    for name, weight in sorted(model.state_dict().items()):
        if not isinstance(weight, torch.Tensor):
            continue
        if weight.is_meta:
            raise DepthKVError(f"expected a model whose weights are all in memory, got {name} offloaded")
        flat = weight.detach().flatten()
        # no sums: they depend on the order, and so on the number of threads
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _checked(data: Any) -> Calibration:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DepthKVError(
            f'expected "format": "{FORMAT}", got {data.get("format") if isinstance(data, dict) else data!r}'
        )
    if data.get("version") != VERSION:
        raise DepthKVError(f'expected "version": {VERSION}, got {data.get("version")!r}')
    known = {entry.name for entry in fields(Calibration)} | {"format", "version"}
    for keys, what in ((data.keys() - known, "only known keys"), (known - data.keys(), "all keys")):
        if keys:
            raise DepthKVError(f"expected {what}, got {'' if keys <= data.keys() else 'none of '}{sorted(keys)[0]!r}")
    found = Calibration(
        fingerprint=_text(data["fingerprint"]),
        kinds=[_text(kind) for kind in data["kinds"]],
        block_documents=[_text(name) for name in data["block_documents"]],
        block_size=_whole(data["block_size"]),
        similarity_tokens=_whole(data["similarity_tokens"]),
        output_tokens=_whole(data["output_tokens"]),
        full_losses=_numbers(data["full_losses"]),
        cost_losses={
            int(layer): {int(source): _numbers(losses) for source, losses in row.items()}
            for layer, row in data["cost_losses"].items()
        },
        searches={_text(key): _whole(count) for key, count in data["searches"].items()},
        seconds={_text(name): _number(value) for name, value in data["seconds"].items()},
    )
    size = found.num_layers
    found.similarity = {_text(name): _matrix(m, size) for name, m in data["similarity"].items()}
    found.similarity_heads = {_text(n): [_matrix(m, size) for m in ms] for n, ms in data["similarity_heads"].items()}
    for names in (KV_SIMILARITIES, OUTPUT_SIMILARITIES):
        if any(name in found.similarity for name in names) and not set(names) <= set(found.similarity):
            raise DepthKVError(f"expected all of {', '.join(names)} or none, got {', '.join(found.similarity)}")
    for entry in data["plan_losses"]:
        plan = SharingPlan(entry["kv_source_layers"])
        if plan.num_layers != size:
            raise DepthKVError(f"expected measured plans of {size} layers, got one of {plan.num_layers}")
        found.plan_losses[plan.kv_source_layers] = _numbers(entry["losses"])
    allowed = set(found.pairs())
    for layer, row in found.cost_losses.items():
        for source in row:
            if (layer, source) not in allowed:
                raise DepthKVError(f"expected costs of pairs that can share, got layer {layer} reading {source}")
    blocks = len(found.block_documents)
    for losses in (found.full_losses, *(row for rows in found.cost_losses.values() for row in rows.values())):
        if len(losses) > blocks:
            raise DepthKVError(f"expected losses of at most {blocks} blocks, got {len(losses)}")
    if any(len(losses) != blocks for losses in found.plan_losses.values()):
        raise DepthKVError(f"expected losses of {blocks} blocks for every measured plan, got another number")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which is no number in JSON")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"expected a number, got {value!r}")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a whole number, got {value!r}")
    return value


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list):
        raise TypeError(f"expected a list of numbers, got {type(values).__name__}")
    return [_number(value) for value in values]


def _matrix(rows: Any, size: int) -> Matrix:
    if not isinstance(rows, list) or len(rows) != size or any(len(row) != size for row in rows):
        raise TypeError(f"expected {size} rows of {size} numbers")
    return [[None if value is None else _number(value) for value in row] for row in rows]


def kind_names(kinds: Sequence[LayerKind]) -> list[str]:
    """Names that are equal where the kinds are; kinds that read alike, such as by their rotary bases, get numbers."""
    different = list(dict.fromkeys(kinds))
    words = [str(kind) for kind in different]
    names = {
        k: w if words.count(w) == 1 else f"{w} ({i})" for i, (k, w) in enumerate(zip(different, words, strict=True))
    }
    return [names[kind] for kind in kinds]
