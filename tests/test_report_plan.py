"""The page of a plan says how it was chosen, in pictures that are in proportion, and refuses wrong files."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from depthkv.cli import main
from depthkv.errors import DepthKVError
from depthkv.plan import SharingPlan
from depthkv.report.maps import Scale, layer_map, scale_of
from depthkv.report.plan_diagram import plan_diagram
from depthkv.report.plan_reading import PlanFigures
from depthkv.report.reading import read_figures
from figures import bench, evaluation, score
from plan_figures import FULL_LOSS, MEASURES, plan_file
from test_report_html import EVIL, Tree, charts_of, page_of, poison, shapes

SECTIONS = ["plan", "plan-sizes", "plan-rules", "plan-costs", "plan-similarity", "plan-order"]
ABOUT = ["environment", "commands"]


def figures_of(tmp_path: Path, found: dict[str, Any]) -> PlanFigures:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    figures = read_figures(path)
    assert isinstance(figures, PlanFigures)
    return figures


def pixels(address: str) -> list[list[int]]:
    """Rows of a PNG's palette numbers."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"), validate=True)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, place = {}, 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        name, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", data, place + 8 + length) == (zlib.crc32(name + body),)
        chunks[name] = body
        place += 12 + length
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    lines = zlib.decompress(chunks[b"IDAT"])
    assert len(lines) == height * (width + 1) and len(chunks[b"PLTE"]) == 256 * 3 and chunks[b"tRNS"] == b"\0"
    return [list(lines[i * (width + 1) + 1 : (i + 1) * (width + 1)]) for i in range(height)]


def images_of(svg: str) -> list[list[list[int]]]:
    return [pixels(address) for address in re.findall(r'<image [^>]*href="([^"]*)"', svg)]


class TestPage:
    def test_everything_is_there(self, tmp_path: Path) -> None:
        page = page_of(tmp_path, plan_file())
        tree = Tree(page.html)
        assert tree.sections == SECTIONS + ABOUT
        assert page.verdict == (
            "With the caches of 15 of 30 layers, held-out loss rises by 0.44 nats [0.42, 0.47] per token, from 3.45 to "
            "3.89, 0.42 nats [0.37, 0.46] below the evenly spaced plan of equal bytes."
        )
        assert "Layers with a cache" in tree.texts["dt"] and {"15 of 30", "11.25 KiB", "37 %"} < set(tree.texts["dd"])
        cells = [text.strip() for text in tree.texts["td"]]
        assert "half of the layers" in cells and "16,384 tokens in blocks of 512, 24 documents" in cells
        assert (
            "\u22120.420[\u22120.460, \u22120.370]" in cells and "3.895[3.825, 3.972]+0.445 [+0.424, +0.466]" in cells
        )
        assert len(images_of(page.html)) == 2 * (1 + len(MEASURES))  # each map with its legend
        commands = tree.texts["pre"][0].splitlines()
        assert commands == [plan_file()["command"], "depthkv report f0.json --out report.html"]

    def test_what_is_absent_is_left_out(self, tmp_path: Path) -> None:
        found = plan_file()
        found["certainty"] = None
        found["similarity"] = {"key_cka": found["similarity"]["key_cka"], "of tomorrow": 3}
        found["cost"] = [[None] * 30 for _ in range(30)]
        found["nested"] = [size for size in found["nested"] if size["chosen"]]
        found["comparison"] = found["comparison"][:1]
        found["comparison"][0]["against_even"] = None
        page = page_of(tmp_path, found)
        tree = Tree(page.html)
        assert tree.sections == ["plan", "plan-sizes", "plan-rules", "plan-similarity", *ABOUT]
        assert "resample" not in page.html and "evenly" not in page.verdict and len(images_of(page.html)) == 2

    @pytest.mark.parametrize(
        ("against", "expected"),
        [
            ({"difference": 0.2, "low": 0.1, "high": 0.3}, ", 0.20 nats [0.10, 0.30] above the evenly spaced plan"),
            ({"difference": -0.2, "low": None, "high": None}, ", 0.20 nats below the evenly spaced plan"),
            (
                {"difference": 0.01, "low": -0.02, "high": 0.04},
                ", +0.01 nats [\u22120.02, +0.04] from the evenly spaced plan of equal bytes, maybe by chance.",
            ),
        ],
    )
    def test_verdict(self, against: dict[str, Any], expected: str, tmp_path: Path) -> None:
        found = plan_file()
        found["comparison"][0]["against_even"] = against
        assert expected in page_of(tmp_path, found).verdict

    def test_beside_other_files(self, tmp_path: Path) -> None:
        page = page_of(tmp_path, evaluation(), plan_file(), bench())
        tree = Tree(page.html)
        assert tree.sections[:7] == [*SECTIONS, "curve"] and tree.sections[-4:] == ["speed", "provenance", *ABOUT]
        assert page.verdict.startswith("At 50 % of the cache, loss rises by")
        assert "; with the caches of 15 of 30 layers, held-out loss" in page.verdict
        assert '<th scope="col">builtin:smollm2-135m (plan)</th>' in page.html

    def test_several_plans(self, tmp_path: Path) -> None:
        files = [plan_file(), plan_file(retention=0.25)]
        tree = Tree(page_of(tmp_path, *files, labels=["half", "quarter"]).html)
        assert tree.sections == [f"{name}-{i}" for i in (1, 2) for name in SECTIONS] + ABOUT
        assert "The plan: quarter" in tree.texts["h2"]
        ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert "of 30 layers (quarter)" in page_of(tmp_path, *files, labels=["half", "quarter"]).verdict
        with pytest.raises(DepthKVError, match="'same' twice"):
            page_of(tmp_path, *files, labels=["same", "same"])

    def test_needs_nothing_from_outside(self, tmp_path: Path) -> None:
        html = page_of(tmp_path, plan_file(), plan_file(80, general=True)).html
        tree = Tree(html)
        assert not {"script", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in tree.tags}
        assert all((attrs["href"] or "").startswith("data:image/png;base64,") for attrs in tree.all("image"))
        without = re.sub(r"data:image/png;base64,[\w+/=]+", "", html)
        assert not re.search(r"https?:|//|@import|url\(|\bsrc=", without)
        assert not re.search(r'(fill|stroke)="#', without)  # a colour of its own would not turn dark
        charts = [attrs for attrs in tree.all("svg") if attrs["class"] == "chart"]
        assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)

    def test_markup_in_the_file_stays_text(self, tmp_path: Path) -> None:
        files = [poison(plan_file()), poison(plan_file(12))]
        for found in files:
            for rule, label in zip(found["comparison"], ("this plan", "evenly spaced"), strict=False):
                rule["label"] = label
        html = page_of(tmp_path, *files, labels=[EVIL, f"{EVIL}2"]).html
        tree = Tree(html)
        assert "script" not in {tag for tag, _ in tree.tags} and "<script" not in html.lower()
        assert not any(name.startswith("on") for _, attrs in tree.tags for name in attrs)
        for tag in ("title", "h1", "h2", "th", "td", "pre", "p", "text", "dd"):
            assert any(EVIL in text for text in tree.texts[tag]), tag
        assert any(EVIL in (attrs.get("aria-label") or "") for attrs in tree.all("svg"))

    def test_same_bytes(self, tmp_path: Path) -> None:
        found = plan_file(80, kinds=2, general=True)
        assert page_of(tmp_path, found).html == page_of(tmp_path, copy.deepcopy(found)).html
        other = copy.deepcopy(found)
        other["cost"][40][20] *= 100
        assert page_of(tmp_path, found).html != page_of(tmp_path, other).html

    @pytest.mark.parametrize(("layers", "most"), [(30, 500), (40, 800), (80, 250)])
    def test_size(self, layers: int, most: int, tmp_path: Path) -> None:
        assert len(page_of(tmp_path, plan_file(layers, general=True)).html) < 1024 * most

    @pytest.mark.parametrize("layers", [1, 2, 5, 17])
    @pytest.mark.parametrize("kinds", [1, 2])
    def test_small_and_mixed_models(self, layers: int, kinds: int, tmp_path: Path) -> None:
        if layers >= kinds:
            page = page_of(tmp_path, plan_file(layers, kinds=kinds, general=True))
            assert "nan" not in page.html and Tree(page.html).sections[0] == "plan"

    def test_one_document_has_no_intervals(self, tmp_path: Path) -> None:
        found = plan_file()
        for rule in found["comparison"]:
            rule["loss_score"] = rule["loss_score"] | dict.fromkeys(
                ["low", "high", "difference_low", "difference_high"]
            )
            rule["against_even"] = rule["against_even"] and rule["against_even"] | {"low": None, "high": None}
        page = page_of(tmp_path, found)
        assert "rises by 0.44 nats per token, from 3.45 to 3.89, 0.42 nats below" in page.verdict
        assert "there was one document alone" in page.html and "nan" not in page.html

    def test_better_than_the_full_cache_is_explained(self, tmp_path: Path) -> None:
        found = plan_file()
        assert "comes from training on such text" not in page_of(tmp_path, found).html
        found["comparison"][0]["loss_score"] = score(3.2, 0.05, 3.45)
        assert "comes from training on such text" in page_of(tmp_path, found).html


class TestPictures:
    def test_map(self) -> None:
        values = ((1.0, None, None), (0.2, 1.0, None), (None, 0.8, 1.0))
        scale = scale_of(values)
        assert scale == Scale(low=0.2, high=0.8)  # the diagonal does not count
        found, legend = images_of(layer_map(values, scale, title="t"))
        assert found == [[255, 0, 0], [1, 255, 0], [0, 255, 255]]
        assert legend[0][0] == 1 and legend[0][-1] == 255 and legend[0] == sorted(legend[0])

    def test_log_scale(self) -> None:
        scale = scale_of(((0.0, None, None), (0.001, 0.0, None), (-3.0, 10.0, 0.0)), log=True, falling=True)
        assert scale is not None
        assert [scale.share(value) for value in (-3.0, 0.0, 0.001, 0.1, 10.0)] == pytest.approx([1, 1, 1, 0.5, 0])
        assert [words for _, words in scale.marks()] == ["0.001", "0.01", "0.1", "1", "10"]
        assert scale_of(((0.0, None), (-1.0, 0.0)), log=True) is None

    def test_cost_map_shows_the_plan(self, tmp_path: Path) -> None:
        found = plan_file(12, general=True)
        chart = next(chart for chart in charts_of(page_of(tmp_path, found).html) if "one layer reads another" in chart)
        pairs = {(source, layer) for layer, source in enumerate(found["kv_source_layers"]) if source != layer}
        (path,) = re.findall(r'<path class="chosen"[^>]* d="([^"]*)"', chart)
        assert {(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)", path)} == pairs
        cells = images_of(chart)[0]
        assert all(cells[i][i] == 0 for i in range(12)) and cells[4][0] == 0  # own cache; not measured
        assert chart.count("\u2190") == sum(value != 0 for row in cells for value in row)

    @pytest.mark.parametrize(
        "sources",
        [
            [0, 1, 0, 1, 0, 5],
            [i % 7 if i >= 7 else i for i in range(80)],
            [i - i % 5 for i in range(80)],
            [0] * 130,
            [0],
        ],
    )
    def test_diagram(self, sources: list[int]) -> None:
        """Every layer and every reader is drawn, and no two brackets of a row lie on each other."""
        plan = SharingPlan(sources)
        svg = plan_diagram(plan, title="t")
        assert svg.count('class="keeps"') == len(plan.leaders) and svg.count('class="reads"') == len(plan.followers)
        heads = "".join(re.findall(r'<path class="head" d="([^"]*)"', svg))
        assert heads.count("M") == len(plan.followers)
        spans: dict[float, list[tuple[float, float]]] = {}
        for path in re.findall(r'<path class="bracket" d="([^"]*)"', svg):
            start, y, end = re.match(r"M([\d.]+) (?:[\d.]+V)?([\d.]+)H([\d.]+)", path).groups()  # type: ignore[union-attr]
            spans.setdefault(float(y), []).append((float(start), float(end)))
        for lane in spans.values():
            lane.sort()
            assert all(before[1] < after[0] for before, after in itertools.pairwise(lane))
        width, height = re.match(r'<svg class="chart" viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
        boxes = re.findall(r'<rect [^>]*x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
        assert all(float(x) + float(w) <= float(width) and float(y) + float(h) <= float(height) for x, y, w, h in boxes)

    def test_curve_marks_the_chosen_plan(self, tmp_path: Path) -> None:
        found = plan_file()
        curves = [chart for chart in charts_of(page_of(tmp_path, found).html) if "what a token costs in it" in chart]
        assert len(curves) == 2  # sizes far below the chosen one flatten the rest
        for chart in curves:
            assert chart.count('class="ring"') == 1 and f"chosen: {found['measured_loss']:.2f}" in chart
            assert f"full cache {FULL_LOSS:.2f}" in chart and "evenly spaced: " in chart
        points = [len(line.split()) for line in re.findall(r'<polyline[^>]* points="([^"]*)"', curves[0])]
        assert points == [sum(size["measured_loss"] is not None for size in found["nested"]), len(found["nested"])]

    def test_plan_that_is_not_nested(self, tmp_path: Path) -> None:
        found = plan_file()
        for size in found["nested"]:
            size["chosen"] = False
        html = page_of(tmp_path, found).html
        assert f"chosen: {found['measured_loss']:.2f}" in html and 'class="frame"' not in html

    def test_certainty(self, tmp_path: Path) -> None:
        found = plan_file(4)
        found["certainty"]["leader_share"] = [1.0, 0.5, 0.0, 0.25]
        chart = next(chart for chart in charts_of(page_of(tmp_path, found).html) if "share of the resamples" in chart)
        heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
        assert heights == pytest.approx([130, 65, 1, 32.5], abs=0.1)

    def test_order(self, tmp_path: Path) -> None:
        found = plan_file(8)
        html = page_of(tmp_path, found).html
        shown = re.search(r'<figure class="plan">.*?</figure>', html, re.S)
        assert shown is not None and re.findall(r"<b>(\d+)</b>", shown[0]) == [str(layer) for layer in found["order"]]
        chart = next(chart for chart in charts_of(html) if "keeps its cache down to" in chart)
        assert f"layer {found['order'][0]} keeps its cache down to 8 layers" in chart
        assert "layer 0 keeps its cache down to 1 layers" in chart


def drop(*path: Any) -> Callable[[Any], None]:
    return put(None, *path, drop=True)


def put(value: Any, *path: Any, drop: bool = False) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        for key in path[:-1]:
            found = found[key]
        if drop:
            del found[path[-1]]
        else:
            found[path[-1]] = value

    return change


class TestReading:
    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (put(2, "version"), "version to be 1, got 2"),
            (drop("command"), "command to be text, got no such key"),
            (put([1], "data"), r"data\[0\] to be text, got 1"),
            (drop("budget", "words"), r"budget\.words to be text"),
            (put(0, "calibration", "tokens"), r"calibration\.tokens to be a whole number of at least 1, got 0"),
            (put([0, 2] * 3, "kv_source_layers"), "kv_source_layers: expected layer 1 to read itself or an earlier"),
            (put([0, 0], "kv_source_layers"), "kv_source_layers to be a list of 6 layers"),
            (put([0], "leaders"), r"leaders to be the layers that read themselves, \[0, .*, got \[0\]"),
            (put(1.5, "retention"), r"retention to be a number from 0 to 1, got 1\.5"),
            (put(None, "predicted_loss"), "predicted_loss to be a number, got null"),
            (put([[0.0] * 6] * 5, "cost"), "cost to be a list of 6 rows, got 5"),
            (put([0.0] * 5, "cost", 2), r"cost\[2\] to be a list of 6 numbers or null, got one of 5"),
            (put("x", "cost", 3), r'cost\[3\] to be a list of 6 numbers or null, got "x"'),
            (put("x", "cost", 3, 1), r'cost\[3\]\[1\] to be a number, got "x"'),
            (put(0.5, "cost", 3, 4), r"cost\[3\]\[4\] to be null, since a layer reads no later one, got 0\.5"),
            (put(True, "similarity", "key_r2", 1, 0), r"similarity\.key_r2\[1\]\[0\] to be a number, got true"),
            (put([1, 1], "order"), r"order\[1\] to be a layer from 0 to 5 that is not in the list yet, got 1"),
            (put([6], "order"), r"order\[0\] to be a layer from 0 to 5 .*, got 6"),
            (put([], "nested"), "nested to be a list of at least one object"),
            (put([], "nested", 1, "leaders"), r"nested\[1\]\.leaders to be a list of at least one layer"),
            (drop("nested", 0, "chosen"), r"nested\[0\]\.chosen to be true or false, got no such key"),
            (put([], "comparison"), r'comparison\[0\]\.label to be "this plan", got an empty list'),
            (put("mine", "comparison", 0, "label"), r'comparison\[0\]\.label to be "this plan", got "mine"'),
            (put("this plan", "comparison", 2, "label"), r"comparison\[2\]\.label to be one of its own"),
            (drop("comparison", 1, "loss_score", "value"), r"comparison\[1\]\.loss_score\.value to be a number"),
            (
                put(None, "comparison", 2, "against_even", "low"),
                r"comparison\[2\]\.against_even\.low to be a number like the interval's other end, got null",
            ),
            (put([1.0], "certainty", "leader_share"), r"certainty\.leader_share to be a list of 6 numbers, got 1"),
            (put(2, "certainty", "leader_share", 4), r"certainty\.leader_share\[4\] to be a number from 0 to 1, got 2"),
            (drop("certainty", "same_plan"), r"certainty\.same_plan to be a number from 0 to 1, got no such key"),
        ],
    )
    def test_wrong_keys_are_named(self, change: Callable[[Any], None], expected: str, tmp_path: Path) -> None:
        found = plan_file(6)
        change(found)
        with pytest.raises(DepthKVError, match=rf"p\.json: (expected )?{expected}"):
            figures_of(tmp_path, found)

    def test_another_plan_in_the_comparison(self, tmp_path: Path) -> None:
        found = plan_file()
        found["comparison"][0] = found["comparison"][2] | {"label": "this plan"}
        with pytest.raises(
            DepthKVError, match=r"comparison\[0\]\.kv_source_layers to be those of the file's plan, got"
        ):
            figures_of(tmp_path, found)

    def test_no_key_may_be_dropped_or_be_something_else(self, tmp_path: Path) -> None:
        """Whatever is taken out or replaced, the answer is a page or an error that names the file, never a crash."""
        figures = plan_file(4)
        figures["similarity"] = {"key_cka": figures["similarity"]["key_cka"]}
        refused = 0
        for path in shapes(figures):
            for value in ("drop", None, [], {}, "text", -1, 1e999, 10**400, True):
                wrong = copy.deepcopy(figures)
                put(value, *path, drop=value == "drop")(wrong)
                try:
                    page_of(tmp_path, wrong)
                except DepthKVError as error:
                    refused += 1
                    assert re.search(r"f0\.json: .*expected .*, got ", str(error)), str(error)
        assert refused > 300

    def test_unknown_keys_are_left(self, tmp_path: Path) -> None:
        found = plan_file()
        expected = figures_of(tmp_path, found)
        assert figures_of(tmp_path, found | {"of tomorrow": 1}) == expected


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text(json.dumps(plan_file()), encoding="utf-8")
    arguments = ["report", str(tmp_path / "p.json"), "--label", "mine", "--out", str(tmp_path / "r.html")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("With the caches of 15 of 30 layers")
    assert Tree((tmp_path / "r.html").read_text(encoding="utf-8")).sections == SECTIONS + ABOUT
