"""Pictures and charts: written whole, of the right data, or refused with the file's name."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from markupsafe import Markup
from matplotlib.image import imread

from depthkv import SharingPlan
from depthkv.errors import DepthKVError
from depthkv.evaluate import CurveRow
from depthkv.report import plot_loss, plot_plan, plot_retention
from depthkv.report.charts import Item, Line, Point, item_chart, line_chart
from depthkv.report.parts import fixed, interval, per_cent, signed
from depthkv.report.pictures import smooth


def curve(*losses: float) -> list[CurveRow]:
    return [
        CurveRow(retention=1 / (i + 1), leaders=(0,), loss=loss, perplexity=2.0, kv_bytes_per_token=1024 // (i + 1))
        for i, loss in enumerate(losses)
    ]


def words(path: Path) -> str:
    """The text of an .svg whose letters are kept as text."""
    return path.read_text(encoding="utf-8")


@pytest.fixture
def svg_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")


def test_retention_shows_every_loss_and_label(tmp_path: Path, svg_text: None) -> None:
    plot_retention({"before": curve(3.3, 12.61, 11.9), "after": curve(3.1, 4.02, 4.5)}, tmp_path / "r.svg")
    text = words(tmp_path / "r.svg")
    for expected in ("before", "after", "12.61", "4.02", "4.50", "100 %", "33 %"):
        assert expected in text, expected


def test_loss_and_plan_are_pictures(tmp_path: Path) -> None:
    plot_loss(range(0, 400, 2), [5 - i / 100 for i in range(200)], tmp_path / "l.png")
    plot_plan(SharingPlan.every(3, 40), tmp_path / "p.png")
    for name in ("l.png", "p.png"):
        picture = imread(tmp_path / name)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01


@pytest.mark.parametrize("num_layers", [1, 2, 30, 80])
def test_plan_names_every_layer(num_layers: int, tmp_path: Path, svg_text: None) -> None:
    plot_plan(SharingPlan.every(2, num_layers), tmp_path / "p.svg")
    text = words(tmp_path / "p.svg")
    assert all(f">{layer}<" in text for layer in range(num_layers))


def test_plan_tells_kinds_apart(tmp_path: Path, svg_text: None) -> None:
    kinds = ["sliding", "sliding", "full", "full"]
    plot_plan(SharingPlan([0, 0, 2, 2]), tmp_path / "p.svg", kinds)
    assert "A: sliding" in words(tmp_path / "p.svg") and "B: full" in words(tmp_path / "p.svg")
    with pytest.raises(DepthKVError, match="4 layers, got 3"):
        plot_plan(SharingPlan([0, 0, 2, 2]), tmp_path / "q.svg", kinds[:3])


def test_smooth_keeps_length_and_level() -> None:
    assert smooth([2.0] * 7) == pytest.approx([2.0] * 7)
    noisy = [3.0 + (-1) ** i for i in range(200)]
    assert len(smooth(noisy)) == 200 and max(smooth(noisy)[10:-10]) < 3.3


@pytest.mark.parametrize("name", ["no/picture.doc", "picture.json"])
def test_unknown_types_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DepthKVError, match=Path(name).name):
        plot_loss([1], [2.0], tmp_path / name)
    assert list(tmp_path.rglob("*.*")) == []


def test_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "r.png").mkdir()
    with pytest.raises(DepthKVError, match=r"r\.png"):
        plot_loss([1], [2.0], tmp_path / "r.png")
    assert [path.name for path in tmp_path.iterdir()] == ["r.png"]


def test_nothing_to_draw() -> None:
    with pytest.raises(DepthKVError, match="at least one"):
        plot_retention({}, "x.png")
    with pytest.raises(DepthKVError, match="as many steps as losses"):
        plot_loss([1, 2], [2.0], "x.png")


def line(label: str, *heights: float, spread: float = math.nan, connected: bool = True) -> Line:
    points = [
        Point(x=2.0**i, y=y, low=y - spread, high=y + spread, words=f"{label} {i}") for i, y in enumerate(heights)
    ]
    return Line(label=label, points=tuple(points), connected=connected)


def corners(chart: Markup) -> list[list[tuple[float, float]]]:
    """Of every line."""
    found = re.findall(r'<polyline[^>]* points="([^"]*)"', chart)
    return [[tuple(map(float, pair.split(","))) for pair in points.split()] for points in found]  # type: ignore[misc]


class TestCharts:
    def test_lines_are_in_proportion(self) -> None:
        chart = line_chart(
            [line("a", 1.0, 2.0, 4.0)],
            [(1, "one"), (2, "two"), (4, "four")],
            title="T & U",
            x_label="x",
            y_label="y",
            log_x=True,
        )
        ((x0, y0), (x1, y1), (x2, y2)) = corners(chart)[0]
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # twice as much is as wide everywhere
        assert y0 - y1 == pytest.approx((y1 - y2) / 2, abs=0.2) and y0 > y1  # larger is higher
        # the axis says the same as the points do: the tick of 2 is as high as the point at 2
        ticks = {
            words: float(y) for y, words in re.findall(r'<text class="tick end" x="[^"]*" y="([^"]*)">([^<]*)<', chart)
        }
        tick = next(y for words, y in ticks.items() if float(words) == 2)
        assert tick - 4 == pytest.approx(y1, abs=0.2)
        assert 'aria-label="T &amp; U"' in chart and "four" in chart

    def test_intervals_reach_as_far_as_they_say(self) -> None:
        chart = line_chart([line("a", 1.0, 2.0, spread=0.5)], [(1, "1"), (2, "2")], title="", x_label="", y_label="")
        (_, y0), (_, y1) = corners(chart)[0]
        low, high = map(float, re.findall(r'class="whisker" d="M\S+ (\S+)L\S+ ([\d.]+)', chart)[0])
        assert low - high == pytest.approx(y0 - y1, abs=0.2) and (low + high) / 2 == pytest.approx(y0, abs=0.2)

    def test_figures_do_not_print_over_each_other(self) -> None:
        crowded = [line("a", 1.0, 1.0), line("b", 1.01, 1.02), line("c", 1.02, 1.0), line("d", 1.1, 5, connected=False)]
        chart = line_chart(crowded, [(1, "1"), (2, "2")], title="", x_label="", y_label="", labelled=True)
        marks = re.findall(r'class="mark[^"]*" x="([^"]*)" y="([^"]*)">([^<]*)<', chart)
        assert [words for *_, words in marks] == [
            "1.02",
            "1.00",
            "1.02",
            "1.00",
        ]  # highest and lowest of what is a line
        places = [(float(x), float(y)) for x, y, _ in marks]
        assert all(abs(x - u) > 25 or abs(y - v) >= 13 for i, (x, y) in enumerate(places) for u, v in places[i + 1 :])
        assert corners(chart)[0][0][0] < corners(chart)[1][0][0]  # intervals at one place stand beside each other

    def test_one_value_alone(self) -> None:
        """Neither axis has a length then."""
        chart = line_chart([line("a", 3.4)], [(1, "100 %")], title="", x_label="", y_label="", log_x=True)
        assert chart.count("<circle") == 1 and "nan" not in chart and "3.4" in chart
        assert item_chart([Item(label="a", value=0.0, text="0")], title="", bars=True).count("<rect") == 1

    def test_items_of_all_lengths(self) -> None:
        items = [Item(label="group"), Item(label="w" * 90, value=1.0, low=0.5, high=2.0, text="1.0 [0.5, 2.0]")]
        chart = item_chart(items, title="", reference=1.5)
        assert "w" * 90 in chart and f"{'w' * 90}</text>" not in chart and "\u2026" in chart
        assert float(re.findall(r'cx="([^"]*)"', chart)[0]) < float(re.findall(r'class="zero" x1="([^"]*)"', chart)[0])

    def test_numbers(self) -> None:
        assert [fixed(-0.5, 2), fixed(-0.001, 2), fixed(1234.5, 1)] == ["\u22120.50", "0.00", "1,234.5"]
        assert [signed(0.5, 1), signed(-0.5, 1), signed(0.001, 1)] == ["+0.5", "\u22120.5", "0.0"]
        assert [interval(1, 2, 1), interval(None, 2, 1), interval(math.nan, math.nan, 1)] == ["[1.0, 2.0]", "", ""]
        assert [per_cent(0.333), per_cent(0.0123), per_cent(0.0), per_cent(1.0)] == ["33 %", "1.2 %", "0 %", "100 %"]
