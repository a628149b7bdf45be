"""What a cache recipe is: which layers keep a cache, in how many bits, and how many tokens of it.

A `SharingPlan` stays about depth. A recipe adds the other two axes that can be chosen at deployment: bits (after KIVI,
arXiv:2402.02750) and time (after StreamingLLM, arXiv:2309.17453, and SnapKV, arXiv:2404.14469). How many heads there
are is up to the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from depthkv.architectures import LayerKind, layer_kinds
from depthkv.compress.packing import packed_bytes_per_token
from depthkv.compress.quantization import Along
from depthkv.compress.rules import OBSERVED_STEPS, RULES, Rule
from depthkv.errors import PlanError, RecipeError
from depthkv.files import checked_header, read_json, write_text
from depthkv.memory import kv_bytes_per_layer, layer_cache_bytes
from depthkv.plan import SharingPlan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

FORMAT = "depthkv-recipe"
VERSION = 1

Bits = Literal[16, 8, 4, 2, "fp8"]
BITS: tuple[Bits, ...] = (16, 8, "fp8", 4, 2)
"""16 stands for the dtype that the model computes in, whatever its width; "fp8" is float8_e4m3fn."""
ALONG: tuple[Along, Along] = ("tokens", "channels")
"""Along what groups of keys, and of values, run (`depthkv.compress.quantization`)."""

_KEYS = {
    "format",
    "version",
    "kv_source_layers",
    "key_bits",
    "value_bits",
    "group_size",
    "sinks",
    "recent",
    "tokens",
    "rule",
    "provenance",
}


@dataclass(frozen=True, kw_only=True)
class CacheRecipe:
    """How the leaders of a plan keep their keys and values.

    Layers with full attention only: what a sliding or chunked layer keeps is bounded by its window, and stays as it is.
    Of each sequence the first `sinks` and at least the last `recent` tokens are never quantised nor evicted; in between
    tokens are packed and evicted `group_size` at a time.

    Raises:
        RecipeError: a value out of range, or another number of bits than leaders.
    """

    plan: SharingPlan
    """Which layers keep a cache."""
    key_bits: Bits | tuple[Bits, ...] = 16
    """Of each number of the keys: one of `BITS` for all leaders, or one for each leader, in their order."""
    value_bits: Bits | tuple[Bits, ...] = 16
    """The same for the values."""
    group_size: int = 32
    """Tokens that share a scale in each channel of the keys, channels that share one in each token of the values."""
    sinks: int = 4
    """First tokens, which many heads attend to whatever they hold."""
    recent: int = 32
    """Last tokens."""
    tokens: int | None = None
    """Most tokens of a sequence that a leader keeps between two steps; None keeps all."""
    rule: str | Rule = "window"
    """Which tokens stay: a name in `depthkv.compress.rules.RULES`, or a rule of your own, which no file can hold."""
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Free-form JSON object."""

    def __post_init__(self) -> None:
        if not isinstance(self.plan, SharingPlan):
            raise RecipeError(f"expected plan to be a SharingPlan, got {type(self.plan).__name__}")
        for name in ("key_bits", "value_bits"):
            object.__setattr__(self, name, _bits(getattr(self, name), name, len(self.plan.leaders)))
        for name, least in (("group_size", 1), ("sinks", 0), ("recent", 1)):
            _at_least(getattr(self, name), name, least)
        if not (self.rule in RULES if isinstance(self.rule, str) else isinstance(self.rule, Rule)):
            raise RecipeError(
                f"expected rule to be one of {', '.join(RULES)}, or an object with needs_attention and scores, "
                f"got {self.rule!r}"
            )
        if self.group_size % 8 and self.is_quantised:
            raise RecipeError(f"expected a group_size that 8 divides, got {self.group_size}")
        if self.tokens is not None:
            _at_least(self.tokens, "tokens", 1)
            least = self.sinks + self.recent + self.group_size
            if self.tokens < least:
                raise RecipeError(
                    f"expected tokens of at least sinks + recent + group_size = {least}, got {self.tokens}"
                )
        try:
            object.__setattr__(self, "provenance", json.loads(json.dumps(dict(self.provenance), allow_nan=False)))
        except (TypeError, ValueError, RecursionError) as error:
            raise RecipeError(f"expected provenance as a JSON object, got {error}") from error

    @property
    def is_quantised(self) -> bool:
        """Whether anything is kept in fewer bits."""
        return any(bits != 16 for pair in self.bits.values() for bits in pair)

    @property
    def bits(self) -> dict[int, tuple[Bits, Bits]]:
        """Bits of keys and values by leader."""
        leaders = self.plan.leaders
        keys = self.key_bits if isinstance(self.key_bits, tuple) else (self.key_bits,) * len(leaders)
        values = self.value_bits if isinstance(self.value_bits, tuple) else (self.value_bits,) * len(leaders)
        return dict(zip(leaders, zip(keys, values, strict=True), strict=True))

    @property
    def eviction(self) -> Rule:
        """The rule itself."""
        return RULES[self.rule] if isinstance(self.rule, str) else self.rule

    @property
    def rule_name(self) -> str:
        """For people."""
        return self.rule if isinstance(self.rule, str) else type(self.rule).__name__

    def compressed(self, kinds: Sequence[LayerKind]) -> tuple[int, ...]:
        """Leaders whose caches the recipe changes: with full attention, and few bits or tokens."""
        return tuple(
            leader
            for leader, bits in self.bits.items()
            if kinds[leader].window is None and (self.tokens is not None or bits != (16, 16))
        )

    # Bytes

    def largest_lengths(self, num_tokens: int) -> list[int]:
        """Numbers of tokens up to `num_tokens`, one of which takes the most bytes on the way there, ascending.

        Before a group is packed or evicted the cache is a little larger than after it.
        """
        ends = {num_tokens, min(num_tokens, self.tokens or num_tokens)}
        return sorted({n for end in ends for n in range(max(1, end - self.group_size + 1), end + 1)})

    def kept_tokens(self, num_tokens: int) -> int:
        """Tokens that a leader with full attention keeps after `num_tokens`, however they came.

        Above `tokens`, whole groups are evicted until it fits.
        """
        if self.tokens is None or num_tokens <= self.tokens:
            return num_tokens
        return self.tokens - (self.tokens - num_tokens) % self.group_size

    def packed_tokens(self, kept: int) -> int:
        """How many of them are packed: whole groups between `sinks` and `recent`."""
        return max(0, kept - self.sinks - self.recent) // self.group_size * self.group_size

    def layer_bytes(self, kind: LayerKind, bits: tuple[Bits, Bits], dtype: torch.dtype, num_tokens: int) -> int:
        """Bytes of one leader's cache of one sequence without padding after `num_tokens`, exact."""
        if kind.window is not None:
            return layer_cache_bytes(kind, dtype, num_tokens)
        kept = self.kept_tokens(num_tokens)
        packed = self.packed_tokens(kept)
        plain = kv_bytes_per_layer(kind, dtype) // 2
        total = 2 * (kept - packed) * plain
        for width, along in zip(bits, ALONG, strict=True):
            per_token = (
                plain
                if width == 16
                else packed_bytes_per_token(width, self.group_size, kind.head_dim, kind.kv_heads, dtype, along)
            )
            total += int(packed * per_token)
        if self.observes(kept):
            total += 4 * kind.kv_heads * kept  # fp32 sums of attention
        return total

    def observes(self, kept: int) -> bool:
        """Whether tokens will soon be evicted by what is attended to, so that sums of it are kept."""
        return self.tokens is not None and self.eviction.needs_attention and kept > self.tokens - OBSERVED_STEPS

    def cache_bytes(self, config: PreTrainedConfig, dtype: torch.dtype, num_tokens: int, batch: int = 1) -> int:
        """Bytes of the cache of `batch` sequences of `num_tokens` tokens, all leaders together."""
        kinds = self.check(layer_kinds(config))
        return batch * sum(
            self.layer_bytes(kinds[leader], bits, dtype, num_tokens) for leader, bits in self.bits.items()
        )

    def working_bytes(self, kinds: Sequence[LayerKind], dtype: torch.dtype, num_tokens: int, batch: int = 1) -> int:
        """Most bytes of unpacked keys and values that a step holds beside the cache, of compressed leaders.

        A leader's pair lives until its last reader is done: of one whole prompt, or of what all sequences keep.
        """
        last = {source: layer for layer, source in enumerate(self.plan.kv_source_layers)}
        pairs = {leader: kv_bytes_per_layer(kinds[leader], dtype) for leader in self.compressed(kinds)}
        together = max(
            (sum(size for leader, size in pairs.items() if leader <= layer <= last[leader]) for layer in pairs),
            default=0,
        )
        return together * max(num_tokens, batch * min(num_tokens, self.tokens or num_tokens))

    def check(self, kinds: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
        """Raise `PlanError` unless the plan is for so many layers."""
        if self.plan.num_layers != len(kinds):
            raise PlanError(f"expected a recipe for {len(kinds)} layers, got one for {self.plan.num_layers}")
        return kinds

    # What it says

    def describe(self) -> str:
        """One line: layers, bits and tokens."""
        plan = self.plan
        parts = [f"{len(plan.leaders)} of {plan.num_layers} layers keep a cache"]
        for name, value in (("keys", self.key_bits), ("values", self.value_bits)):
            used = set(value) if isinstance(value, tuple) else {value}
            widths = [str(width) for width in reversed(BITS) if width in used]
            if widths != ["16"]:
                parts.append(f"{name} in {' or '.join(widths)}{'' if widths == ['fp8'] else ' bits'}")
        if self.tokens is not None:
            parts.append(f"at most {self.tokens:,} tokens by {self.rule_name}")
        return "; ".join(parts)

    def figures(self) -> dict[str, Any]:
        """For JSON files of figures: `describe()` in `words`, and the values that make up the recipe."""
        return {
            "words": self.describe(),
            "kv_source_layers": list(self.plan.kv_source_layers),
            "key_bits": list(self.key_bits) if isinstance(self.key_bits, tuple) else self.key_bits,
            "value_bits": list(self.value_bits) if isinstance(self.value_bits, tuple) else self.value_bits,
            "group_size": self.group_size,
            "sinks": self.sinks,
            "recent": self.recent,
            "tokens": self.tokens,
            "rule": self.rule_name,
        }

    # Files

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `save` writes."""
        if not isinstance(self.rule, str):
            raise RecipeError(f"expected a rule among {', '.join(RULES)} to write a recipe, got {self.rule_name}")
        values = {key: value for key, value in self.figures().items() if key != "words"}
        return {"format": FORMAT, "version": VERSION, **values, "provenance": dict(self.provenance)}

    @classmethod
    def from_dict(cls, data: object) -> CacheRecipe:
        """The inverse of `to_dict`; unknown keys, another format or version and wrong types are errors.

        Only format, version and kv_source_layers have to be there.
        """
        data = checked_header(data, FORMAT, VERSION, _KEYS, RecipeError)
        if "kv_source_layers" not in data:
            raise RecipeError('expected the key "kv_source_layers", got none')
        if not isinstance(data.get("provenance", {}), dict):
            raise RecipeError(f"expected provenance as a JSON object, got {type(data['provenance']).__name__}")
        values = {key: value for key, value in data.items() if key not in ("format", "version", "kv_source_layers")}
        return cls(plan=SharingPlan(data["kv_source_layers"]), **values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `recipe.json`: first beside the target, then renamed."""
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", "the recipe", RecipeError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CacheRecipe:
        """Read a `recipe.json`; the error names the file."""
        data = read_json(path, "recipe", RecipeError)
        try:
            return cls.from_dict(data)
        except (RecipeError, PlanError) as error:
            raise type(error)(f"{path}: {error}") from None


def _bits(value: object, name: str, num_leaders: int) -> Bits | tuple[Bits, ...]:
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) != num_leaders:
            raise RecipeError(f"expected {name} for each of the {num_leaders} leaders, got {len(value)}")
        widths = tuple(_width(entry, f"{name}[{i}]") for i, entry in enumerate(value))
        return widths[0] if len(set(widths)) == 1 else widths
    return _width(value, name)


def _width(value: object, name: str) -> Bits:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value not in BITS:
        raise RecipeError(f"expected {name} to be one of {', '.join(map(str, BITS))}, got {value!r}")
    return value


def _at_least(value: object, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RecipeError(f"expected {name} to be a whole number of at least {least}, got {value!r}")
