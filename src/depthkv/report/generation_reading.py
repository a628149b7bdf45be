"""JSON files of `depthkv generate`, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from depthkv.errors import DepthKVError
from depthkv.memory import format_bytes
from depthkv.plan import SharingPlan
from depthkv.report.checked import CheckedObject, kind

FORMAT, VERSION = "depthkv-generation", 1


@dataclass(frozen=True, kw_only=True)
class SequenceFigures:
    """A prompt and what was written after it."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    plan: SharingPlan
    """Right after the prompt."""
    given_up: Mapping[int, int]
    """Tokens in the cache, padding included, by the layer that stopped to keep its own for them; in that order."""

    @property
    def left(self) -> int:
        """Layers that keep their caches in the end."""
        return len(self.plan.leaders) - len(self.given_up)


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What one forward left in the cache."""

    num_tokens: int
    """Of each sequence so far, padding included."""
    cache_bytes: int
    leaders: tuple[int, ...]
    """How many, of each sequence."""
    given_up: tuple[tuple[int, int], ...]
    """Sequence and layer of each leader that was given up before it."""


@dataclass(frozen=True, kw_only=True)
class GenerationFigures:
    """A file of `depthkv generate`."""

    file: str
    """Its name without folders."""
    model: str
    settings: Mapping[str, str]
    """How it was written, for the page: name to value."""
    environment: Mapping[str, str]
    command: str
    num_layers: int
    router: str | None
    """What chose the layers; None where one plan holds for all sequences."""
    budget: int | None
    """Most bytes of the cache."""
    ended_by_budget: bool
    """There was no room for another token."""
    peak_bytes: int
    full_bytes: int
    """Of a cache of every layer, for as many tokens."""
    sequences: tuple[SequenceFigures, ...]
    steps: tuple[StepFigures, ...]
    """Empty where the layers cannot change."""

    @property
    def mean_leaders(self) -> float:
        """Of each sequence, right after its prompt."""
        return sum(len(found.plan.leaders) for found in self.sequences) / len(self.sequences)

    @property
    def mean_left(self) -> float:
        """Of each sequence, in the end."""
        return sum(found.left for found in self.sequences) / len(self.sequences)


def generation_figures(top: CheckedObject, file: str) -> GenerationFigures:
    """The figures of a file of `depthkv generate`, from its JSON object.

    Raises:
        DepthKVError: a key that is missing or holds something else, or that does not fit another; names it.
    """
    if top.values.get("version") != VERSION or isinstance(top.values["version"], bool):
        raise top.wrong("version", str(VERSION))
    num_layers = top.whole("num_layers", 1)
    found = top.objects("sequences")
    if not found:
        raise DepthKVError("expected sequences to be a list of at least one object, got an empty list")
    plans = [sequence.led_plan(num_layers) for sequence in found]
    retention, own = top.share("retention"), sum(len(plan.leaders) for plan in plans) / len(plans) / num_layers
    if abs(retention - own) > 1e-6:
        raise top.wrong("retention", f"{own:.6g}, the mean share of the sequences' leaders")
    peak = top.whole("peak_cache_bytes", 1)
    steps, given_up = _steps(top, plans, peak)
    router = top.text("router") if "router" in top else None
    budget = top.whole("kv_budget", 1) if "kv_budget" in top else None
    return GenerationFigures(
        file=file,
        model=top.text("model"),
        settings={
            "layers chosen by": router or "one plan",
            **({"recipe": top.object("cache_recipe").text("words")} if "cache_recipe" in top else {}),
            "KV budget": "none" if budget is None else format_bytes(budget),
            "sequences": f"{len(plans):,}",
            "dtype": top.text("dtype"),
            "layers": str(num_layers),
        },
        environment=top.object("environment").shown(),
        command=top.text("command"),
        num_layers=num_layers,
        router=router,
        budget=budget,
        ended_by_budget=top.flag("ended_by_budget"),
        peak_bytes=peak,
        full_bytes=top.whole("full_cache_bytes", 1),
        sequences=tuple(
            SequenceFigures(
                prompt=sequence.text("prompt"),
                text=sequence.text("text"),
                prompt_tokens=sequence.whole("prompt_tokens", 1),
                new_tokens=sequence.whole("new_tokens"),
                plan=plan,
                given_up=gone,
            )
            for sequence, plan, gone in zip(found, plans, given_up, strict=True)
        ),
        steps=steps,
    )


def _steps(
    top: CheckedObject, plans: list[SharingPlan], peak: int
) -> tuple[tuple[StepFigures, ...], list[dict[int, int]]]:
    """Every step, and for each sequence when it gave up which layer: counts and layers have to agree."""
    steps: list[StepFigures] = []
    kept = [set(plan.leaders) for plan in plans]
    gone: list[dict[int, int]] = [{} for _ in plans]
    for found in top.objects("steps"):
        least = steps[-1].num_tokens + 1 if steps else 1
        step = StepFigures(
            num_tokens=found.whole("num_tokens", least),
            cache_bytes=found.whole("cache_bytes"),
            leaders=found.wholes("leaders", len(plans)),
            given_up=_pairs(found, kept),
        )
        if step.cache_bytes > peak:
            raise found.wrong("cache_bytes", f"at most peak_cache_bytes, {peak}")
        for row, layer in step.given_up:
            gone[row][layer] = step.num_tokens
        for row, (number, layers) in enumerate(zip(step.leaders, kept, strict=True)):
            if number != len(layers):
                expected = f"{len(layers)}, the leaders that the sequence has left"
                raise DepthKVError(f"expected {found.path('leaders')}[{row}] to be {expected}, got {number}")
        steps.append(step)
    return tuple(steps), gone


def _pairs(found: CheckedObject, kept: list[set[int]]) -> tuple[tuple[int, int], ...]:
    """Sequences and layers, which are taken out of `kept`."""
    pairs = []
    for i, pair in enumerate(found.sequence("given_up")):
        place = f"expected {found.path('given_up')}[{i}] to be"
        if not isinstance(pair, list) or len(pair) != 2:
            got = f"a list of {len(pair)}" if isinstance(pair, list) else kind(pair)
            raise DepthKVError(f"{place} a list of a sequence and a layer, got {got}")
        row, layer = pair
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(kept):
            raise DepthKVError(f"{place} of a sequence from 0 to {len(kept) - 1}, got {kind(row)}")
        if isinstance(layer, bool) or not isinstance(layer, int) or layer not in kept[row]:
            raise DepthKVError(f"{place} of a layer that sequence {row} still keeps, got {kind(layer)}")
        kept[row].remove(layer)
        pairs.append((row, layer))
    return tuple(pairs)
