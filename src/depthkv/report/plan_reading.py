"""JSON files of `depthkv plan`, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from depthkv.calibrate.store import SIMILARITIES
from depthkv.errors import DepthKVError
from depthkv.evaluate.intervals import Score
from depthkv.plan import SharingPlan
from depthkv.planner.explain import EVEN, THIS_PLAN
from depthkv.planner.figures import VERSION
from depthkv.report.checked import CheckedObject, Matrix, kind


@dataclass(frozen=True, kw_only=True)
class Difference:
    """From another loss on the same items, in nats per token."""

    value: float
    low: float | None
    """End of its 95 % interval, None where there is none."""
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether there is an interval, and it leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class NestedPlan:
    """One size of the nested order. Losses are on the calibration text, in nats per token."""

    leaders: tuple[int, ...]
    bytes_per_token: int
    predicted: float
    measured: float | None
    free: float
    """Predicted loss of the best plan of this size that need not be nested."""
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A way to choose a plan, and the one that it gives."""

    label: str
    plan: SharingPlan
    bytes_per_token: int
    predicted: float
    """Loss on the calibration text, in nats per token."""
    measured: float
    """The same, measured."""
    loss: Score
    """On held-out text; the difference is from the full cache."""
    against_even: Difference | None
    """From the evenly spaced plan, on held-out text."""


@dataclass(frozen=True, kw_only=True)
class Certainty:
    """How the choice changes when the calibration documents are drawn again. Shares are of the resamples."""

    resamples: int
    leader_share: tuple[float, ...]
    """For each layer: in which it leads."""
    same_plan: float
    better_than_even: float | None
    """In which the chosen plan's measured loss is below the evenly spaced plan's; None where that is the plan."""


@dataclass(frozen=True, kw_only=True)
class PlanFigures:
    """A file of `depthkv plan`. Losses are in nats per token, of the calibration text where nothing else is said."""

    file: str
    """Its name without folders."""
    model: str
    data: tuple[str, ...]
    settings: Mapping[str, str]
    """What was measured, for the page: name to value."""
    environment: Mapping[str, str]
    command: str
    plan: SharingPlan
    budget: str
    """What was asked for, in words."""
    bytes_per_token: int
    full_bytes_per_token: int
    predicted: float
    measured: float
    full_loss: float
    """Of the full cache."""
    held_out_full: Score
    held_out_adapter_off: Score | None
    """Of the full cache as it is used without a plan, where the model has an adapter that sharing turns on."""
    """Of the full cache on held-out text."""
    similarity: Mapping[str, Matrix]
    """By measure of `SIMILARITIES`, those that the file has."""
    cost: Matrix
    """How much the loss rises if only layer `l` reads layer `j`; None where it was not measured."""
    order: tuple[int, ...]
    """Layers in the order in which they stop to keep a cache."""
    nested: tuple[NestedPlan, ...]
    """From the full cache to the smallest."""
    rules: tuple[Rule, ...]
    """This plan first."""
    certainty: Certainty | None

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.plan.num_layers

    @property
    def even(self) -> Rule | None:
        """The evenly spaced plan, where it was compared with."""
        return next((rule for rule in self.rules if rule.label == EVEN), None)


def plan_figures(top: CheckedObject, file: str) -> PlanFigures:
    """The figures of a file of `depthkv plan`, from its JSON object.

    Raises:
        DepthKVError: a key that is missing or holds something else; names it.
    """
    if top.values.get("version") != VERSION or isinstance(top.values["version"], bool):
        raise top.wrong("version", str(VERSION))
    num_layers = top.whole("num_layers", 1)
    plan = top.led_plan(num_layers)
    top.share("retention")
    data, budget, similarity = top.texts("data"), top.object("budget"), top.object("similarity")
    nested = tuple(_nested(found, num_layers) for found in top.objects("nested"))
    if not nested:
        raise DepthKVError("expected nested to be a list of at least one object, got an empty list")
    return PlanFigures(
        file=file,
        model=top.text("model"),
        data=data,
        settings=_settings(top, data, budget.text("words")),
        environment=top.object("environment").shown(),
        command=top.text("command"),
        plan=plan,
        budget=budget.text("words"),
        bytes_per_token=top.whole("kv_bytes_per_token", 1),
        full_bytes_per_token=top.whole("full_kv_bytes_per_token", 1),
        predicted=top.number("predicted_loss"),
        measured=top.number("measured_loss"),
        full_loss=top.number("full_loss"),
        held_out_full=top.score("held_out_full"),
        held_out_adapter_off=top.score("held_out_adapter_off") if "held_out_adapter_off" in top else None,
        similarity={key: similarity.matrix(key, num_layers) for key in SIMILARITIES if key in similarity},
        cost=top.matrix("cost", num_layers),
        order=top.layers("order", num_layers),
        nested=nested,
        rules=_rules(top, num_layers, plan),
        certainty=_certainty(top.object("certainty"), num_layers) if "certainty" in top else None,
    )


def _settings(top: CheckedObject, data: tuple[str, ...], budget: str) -> dict[str, str]:
    used = top.object("calibration")
    tokens, documents = used.whole("tokens", 1), used.whole("documents", 1)
    blocks = f"blocks of {used.whole('block_size', 1):,}"
    search = f"{used.whole('search_evaluations'):,} plans measured, {_seconds(used, 'search_seconds')}"
    return {
        "budget": budget,
        "text": ", ".join(data),
        "calibration text": f"{tokens:,} tokens in {blocks}, {documents:,} document{'s' * (documents != 1)}",
        "of it for the cost map": f"{used.whole('cost_tokens'):,} tokens",
        "similarities": _seconds(used, "similarity_seconds"),
        "cost map": _seconds(used, "cost_seconds"),
        "search": search,
        "dtype": top.text("dtype"),
        "seed": str(top.whole("seed", -(2**63))),
        "layers": str(top.whole("num_layers", 1)),
    }


def _seconds(found: CheckedObject, key: str) -> str:
    seconds = found.number(key)
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _nested(found: CheckedObject, num_layers: int) -> NestedPlan:
    leaders = found.layers("leaders", num_layers)
    if not leaders:
        raise DepthKVError(f"expected {found.path('leaders')} to be a list of at least one layer, got an empty list")
    return NestedPlan(
        leaders=leaders,
        bytes_per_token=found.whole("kv_bytes_per_token", 1),
        predicted=found.number("predicted_loss"),
        measured=found.maybe_number("measured_loss"),
        free=found.number("free_predicted_loss"),
        chosen=found.flag("chosen"),
    )


def _rules(top: CheckedObject, num_layers: int, plan: SharingPlan) -> tuple[Rule, ...]:
    rules = [_rule(found, num_layers) for found in top.objects("comparison")]
    if not rules or rules[0].label != THIS_PLAN:
        got = kind(rules[0].label) if rules else "an empty list"
        raise DepthKVError(f'expected comparison[0].label to be "{THIS_PLAN}", got {got}')
    if rules[0].plan != plan:
        got = f"{list(rules[0].plan.kv_source_layers)}"
        raise DepthKVError(f"expected comparison[0].kv_source_layers to be those of the file's plan, got {got}")
    labels = [rule.label for rule in rules]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise DepthKVError(f"expected comparison[{i}].label to be one of its own, got {kind(label)} again")
    return tuple(rules)


def _rule(found: CheckedObject, num_layers: int) -> Rule:
    return Rule(
        label=found.text("label"),
        plan=found.led_plan(num_layers),
        bytes_per_token=found.whole("kv_bytes_per_token", 1),
        predicted=found.number("predicted_loss"),
        measured=found.number("measured_loss"),
        loss=found.score("loss_score"),
        against_even=_difference(found.object("against_even")) if "against_even" in found else None,
    )


def _difference(found: CheckedObject) -> Difference:
    low, high = found.maybe_number("low"), found.maybe_number("high")
    if (low is None) != (high is None):
        raise found.wrong("high" if high is None else "low", "a number like the interval's other end")
    return Difference(value=found.number("difference"), low=low, high=high)


def _certainty(found: CheckedObject, num_layers: int) -> Certainty:
    return Certainty(
        resamples=found.whole("resamples", 1),
        leader_share=found.shares("leader_share", num_layers),
        same_plan=found.share("same_plan"),
        better_than_even=found.share("better_than_even") if "better_than_even" in found else None,
    )
