"""Sections of the page about recipes, from files of `depthkv plan` with more axes than depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from depthkv.compress.recipe import CacheRecipe
from depthkv.compress.space import axes_of
from depthkv.memory import format_bytes
from depthkv.report.charts import Line, Point, line_chart, swatch
from depthkv.report.parts import (
    Cell,
    Chart,
    Facts,
    Grid,
    Row,
    Section,
    Table,
    change_words,
    fixed,
    headings,
    interval,
    listed,
    score_cell,
    signed,
)
from depthkv.report.plan_diagram import plan_diagram
from depthkv.report.recipe_reading import MeasuredFigures, RecipeFigures

Recipes = Mapping[str, RecipeFigures]
"""Files by their labels."""

_HIGHEST = 1.5
"""Recipes that lose so many times more than the chosen one and the best single axis are not drawn."""


def recipe_words(recipes: Recipes) -> list[str]:
    """For the verdict: what each recipe saves and costs."""
    clauses = []
    for label, found in recipes.items():
        whose = "" if len(recipes) == 1 else f" ({label})"
        used = axes_of(found.rows[0].recipe) or found.axes
        change = change_words(found.rows[0].loss, found.held_out_full, 2, " nats", " per token")
        smaller = f"with a cache {found.full_bytes / found.bytes:.1f} times smaller by {listed(used)}"
        clauses.append(f"{smaller}{whose}, held-out loss {change}")
    return clauses


def recipe_sections(recipes: Recipes) -> list[Section]:
    """Each file's recipe, and loss against bytes of all that was measured."""
    return [
        _section(found, "" if len(recipes) == 1 else f": {label}", "" if len(recipes) == 1 else f"-{number}")
        for number, (label, found) in enumerate(recipes.items(), 1)
    ]


def _section(found: RecipeFigures, title: str, anchor: str) -> Section:
    recipe = found.rows[0].recipe
    charts = [_chart(found)]
    if not recipe.plan.is_full:
        diagram = plan_diagram(recipe.plan, title=f"The plan: {recipe.plan.diagram()}")
        charts.insert(0, Chart(svg=diagram, caption="Layers that keep a cache, and those that read it."))
    parts = (Facts(entries=_entries(found)), Grid(parts=tuple(charts)), _comparison(found), _front(found))
    return Section(
        anchor=f"recipe-choice{anchor}",
        title=f"The recipe{title}",
        intro="Which layers keep a cache, in how many bits, and how many tokens of it. Chosen by measuring some "
        "recipes and predicting the others; what is chosen was measured.",
        parts=parts,
    )


def _entries(found: RecipeFigures) -> tuple[tuple[str, str, str], ...]:
    own = found.rows[0]
    recipe = own.recipe
    entries = [
        ("Cache", format_bytes(own.bytes), f"{found.full_bytes / own.bytes:.1f} times smaller than the full cache"),
        ("Layers with a cache", f"{len(recipe.plan.leaders)} of {recipe.plan.num_layers}", ""),
        ("Bits", _bits(recipe), "of keys and of values"),
        ("Tokens", _tokens(recipe), "" if recipe.tokens is None else f"by {recipe.rule_name}"),
        (
            "Held-out loss",
            fixed(own.loss.value, 3),
            f"{signed(own.loss.difference or 0.0, 3)} "
            f"{interval(own.loss.difference_low, own.loss.difference_high, 3, sign=True)}".rstrip(),
        ),
    ]
    if found.prediction_error is not None:
        entries.append(
            ("Predictions off by", fixed(found.prediction_error, 3), f"nats, mean of {found.predictions} recipes")
        )
    return tuple(entries)


def _chart(found: RecipeFigures) -> Chart:
    """Loss against bytes: a line for the front, points for what saves on one, two or three axes."""
    losses = sorted(row.measured - found.full_loss for row in found.rows[1:])
    highest = max(_HIGHEST * max(found.rows[0].measured - found.full_loss, *losses[:1]), 0.1)
    drawn = [entry for entry in found.measured if entry.excess <= highest]
    front = sorted((entry for entry in drawn if entry.on_front), key=lambda entry: -entry.bytes)
    groups: dict[str, list[MeasuredFigures]] = {}
    for entry in drawn:
        if entry.axes:
            groups.setdefault(_group(entry), []).append(entry)
    order = [name for name in ("depth", "bits", "tokens", "two axes", "all three") if name in groups]
    lines = [Line(label="best of all", points=tuple(_point(found, entry, mark=False) for entry in front), bare=True)]
    lines += [
        Line(
            label=name,
            points=tuple(_point(found, entry, mark=True) for entry in groups[name]),
            connected=False,
        )
        for name in order
    ]
    sizes = _sizes(found, drawn)
    svg = line_chart(
        lines,
        sizes,
        title="Loss against bytes of the cache",
        x_label="bytes of the cache",
        y_label="loss over the full cache (nats per token)",
        log_x=True,
        zero=True,
        shifted=False,
        height=330.0,
    )
    legend = [(swatch(0, bare=True), "nothing better at as few bytes")]
    legend += [(swatch(number, connected=False), name) for number, name in enumerate(order, 1)]
    left_out = len(found.measured) - len(drawn)
    rest = f" {left_out} that lose more than {fixed(highest, 2)} are left out." if left_out else ""
    return Chart(svg=svg, caption=f"Every recipe that was measured.{rest}", legend=tuple(legend))


def _group(entry: MeasuredFigures) -> str:
    return entry.axes[0] if len(entry.axes) == 1 else "two axes" if len(entry.axes) == 2 else "all three"


def _point(found: RecipeFigures, entry: MeasuredFigures, *, mark: bool) -> Point:
    words = f"{entry.words}: {format_bytes(entry.bytes)}, {signed(entry.excess, 3)} nats"
    is_own = mark and entry.words == found.words and entry.bytes == found.bytes
    return Point(x=float(entry.bytes), y=entry.excess, words=words, mark="chosen" if is_own else "")


def _sizes(found: RecipeFigures, drawn: Sequence[MeasuredFigures]) -> list[tuple[float, str]]:
    """The full cache's bytes and halves of them, down to what was measured."""
    least = min(entry.bytes for entry in drawn)
    sizes, part = [], 1
    while found.full_bytes / part >= least * 0.9:
        size = found.full_bytes / part
        words, _, unit = format_bytes(size).partition(" ")
        sizes.append((size, f"{float(words):.3g} {unit}\n{'full' if part == 1 else f'1/{part}'}"))
        part *= 2
    return sizes


def _comparison(found: RecipeFigures) -> Table:
    rows = tuple(
        Row(
            heading=row.label,
            cells=(
                Cell(text=f"{len(row.recipe.plan.leaders)} of {row.recipe.plan.num_layers}"),
                Cell(text=_bits(row.recipe)),
                Cell(text=_tokens(row.recipe)),
                Cell(text=format_bytes(row.bytes)),
                Cell(text=fixed(row.measured, 3)),
                score_cell(row.loss, 3),
            ),
        )
        for row in found.rows
    )
    names = headings("", "layers", "bits", "tokens", "bytes", "measured loss", "held-out loss")
    return Table(caption="At the same budget", headings=names, rows=rows)


def _front(found: RecipeFigures) -> Table:
    kept = sorted((entry for entry in found.measured if entry.on_front), key=lambda entry: -entry.bytes)
    rows = tuple(
        Row(
            heading=entry.words,
            cells=(
                Cell(text=format_bytes(entry.bytes)),
                Cell(text=f"{found.full_bytes / entry.bytes:.1f}x"),
                Cell(text=signed(entry.excess, 3)),
                Cell(text="" if entry.error is None else fixed(entry.error, 3)),
                Cell(text="" if entry.predicted is None else signed(entry.predicted, 3)),
            ),
        )
        for entry in kept
    )
    names = headings("", "bytes", "smaller", "loss over the full cache", "standard error", "predicted")
    return Table(
        caption="The front: nothing measured is better at as few bytes", headings=names, rows=rows, folded=True
    )


def _bits(recipe: CacheRecipe) -> str:
    both = []
    for value in (recipe.key_bits, recipe.value_bits):
        widths = sorted({value} if isinstance(value, int) else set(value))
        both.append("-".join(map(str, widths)))
    return " / ".join(both)


def _tokens(recipe: CacheRecipe) -> str:
    return "all" if recipe.tokens is None else f"{recipe.tokens:,}"
