"""JSON files of `depthkv plan` with more axes than depth, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from depthkv.compress.figures import THIS_RECIPE, VERSION
from depthkv.compress.recipe import CacheRecipe
from depthkv.compress.space import AXES
from depthkv.errors import DepthKVError
from depthkv.evaluate.intervals import Score
from depthkv.report.checked import CheckedObject, kind


@dataclass(frozen=True, kw_only=True)
class MeasuredFigures:
    """One recipe that was measured."""

    axes: tuple[str, ...]
    """On which it saves bytes."""
    words: str
    bytes: int
    excess: float
    """Loss over the full cache's on the measured text, nats per token."""
    error: float | None
    """Standard error, paired."""
    predicted: float | None
    """Excess, before it was measured."""
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class RecipeRow:
    """One that was compared on held-out text."""

    label: str
    recipe: CacheRecipe
    bytes: int
    measured: float
    """Loss on the measured text."""
    loss: Score
    """Held out; the difference is from the full cache."""


@dataclass(frozen=True, kw_only=True)
class RecipeFigures:
    """A file. Losses are in nats per token."""

    file: str
    """Its name without folders."""
    model: str
    settings: Mapping[str, str]
    environment: Mapping[str, str]
    command: str
    axes: tuple[str, ...]
    words: str
    """The recipe, for people."""
    bytes: int
    full_bytes: int
    full_loss: float
    measured: tuple[MeasuredFigures, ...]
    rows: tuple[RecipeRow, ...]
    """This recipe first."""
    held_out_full: Score
    prediction_error: float | None
    """Mean, absolute, of recipes that were predicted before they were measured."""
    predictions: int


def recipe_figures(top: CheckedObject, file: str) -> RecipeFigures:
    """The figures of a file, from its JSON object.

    Raises:
        DepthKVError: a key that is missing or holds something else; names it.
    """
    if top.values.get("version") != VERSION or isinstance(top.values["version"], bool):
        raise top.wrong("version", str(VERSION))
    budget, text, prediction = top.object("budget"), top.object("text"), top.object("prediction")
    rows = tuple(map(_row, top.objects("comparison")))
    if not rows or rows[0].label != THIS_RECIPE:
        got = kind(rows[0].label) if rows else "an empty list"
        raise DepthKVError(f'expected comparison[0].label to be "{THIS_RECIPE}", got {got}')
    measured = tuple(map(_measured, top.objects("measured")))
    if not measured:
        raise DepthKVError("expected measured to be a list of at least one object, got an empty list")
    tokens, blocks = text.whole("block_size", 1), text.whole("blocks", 1)
    return RecipeFigures(
        file=file,
        model=top.text("model"),
        settings={
            "budget": budget.text("words"),
            "axes": ", ".join(_axes(top)),
            "text": ", ".join(top.texts("data")),
            "measured on": f"{blocks:,} blocks of {tokens:,} tokens, what follows the first "
            f"{text.whole('prompt_tokens', 1):,} of each",
            "held out": f"{text.whole('held_out_blocks', 1):,} blocks",
            "recipes measured": f"{len(measured):,}",
            "dtype": top.text("dtype"),
            "seed": str(top.whole("seed", -(2**63))),
            "layers": str(top.whole("num_layers", 1)),
        },
        environment=top.object("environment").shown(),
        command=top.text("command"),
        axes=_axes(top),
        words=top.text("words"),
        bytes=top.whole("bytes", 1),
        full_bytes=top.whole("full_bytes", 1),
        full_loss=top.number("full_loss"),
        measured=measured,
        rows=rows,
        held_out_full=top.score("held_out_full"),
        prediction_error=prediction.maybe_number("mean_absolute_error"),
        predictions=prediction.whole("recipes"),
    )


def _axes(found: CheckedObject) -> tuple[str, ...]:
    axes = found.texts("axes")
    for axis in axes:
        if axis not in AXES:
            raise found.wrong("axes", f"a list of some of {', '.join(AXES)}")
    return axes


def _measured(found: CheckedObject) -> MeasuredFigures:
    return MeasuredFigures(
        axes=_axes(found),
        words=found.text("words"),
        bytes=found.whole("bytes", 1),
        excess=found.number("excess"),
        error=found.maybe_number("error"),
        predicted=found.maybe_number("predicted_excess"),
        on_front=found.flag("on_front"),
    )


def _row(found: CheckedObject) -> RecipeRow:
    try:
        recipe = CacheRecipe.from_dict(found.object("recipe").values)
    except DepthKVError as error:
        raise DepthKVError(f"{found.path('recipe')}: {error}") from error
    return RecipeRow(
        label=found.text("label"),
        recipe=recipe,
        bytes=found.whole("bytes", 1),
        measured=found.number("measured_loss"),
        loss=found.score("loss_score"),
    )
