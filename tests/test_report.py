"""Pictures: written whole, of the right data, or refused with the file's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from depthkv import SharingPlan
from depthkv.errors import DepthKVError
from depthkv.evaluate import CurveRow
from depthkv.report import plot_loss, plot_plan, plot_retention, smooth


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
