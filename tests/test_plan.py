from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthkv import SharingPlan
from depthkv.architectures import layer_kinds
from depthkv.errors import PlanError
from families import tiny_config


def test_constructors_agree_with_the_contract() -> None:
    assert SharingPlan.every(2, num_layers=30).leaders == tuple(range(0, 30, 2))
    assert SharingPlan.from_leaders([0, 3, 9], num_layers=12).kv_source_layers == (0, 0, 0, 3, 3, 3, 3, 3, 3, 9, 9, 9)
    explicit = SharingPlan(kv_source_layers=[0, 0, 2, 0, 2, 5])
    assert explicit.leaders == (0, 2, 5)
    assert explicit.followers == (1, 3, 4)
    assert explicit.retention == 0.5
    assert explicit.readers(2) == (2, 4)
    assert SharingPlan.full(30).is_full
    assert SharingPlan.full(30).retention == 1


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([0, 2, 2], "layer 1 to read itself or an earlier layer, got layer 2"),
        ([0, 0, 1], "layer 2 to read a leader, got layer 1"),
        ([1, 1], "layer 0"),
        ([0, -1], "layer 1"),
        ([], "at least one layer"),
        ("00", "list of layer numbers"),
        ([0, 0.0], "layer number"),
        ([0, True], "layer number"),
        (7, "list of layer numbers"),
    ],
)
def test_invalid_maps_name_the_layer(sources: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SharingPlan(sources)


def test_leaders_must_hold_layer_0_and_exist() -> None:
    with pytest.raises(PlanError, match="layer 0 among the leaders"):
        SharingPlan.from_leaders([1], 4)
    with pytest.raises(PlanError, match="between 0 and 3, got layer 4"):
        SharingPlan.from_leaders([0, 4], 4)
    with pytest.raises(PlanError, match="k of at least 1"):
        SharingPlan.every(0, 4)


def test_plan_is_immutable_and_hashable() -> None:
    plan = SharingPlan.every(2, 4)
    with pytest.raises(AttributeError):
        plan.kv_source_layers = (0, 1, 2, 3)  # type: ignore[misc]
    assert {plan, SharingPlan([0, 0, 2, 2], provenance={"by": "hand"})} == {plan}


def test_repr_draws_the_groups() -> None:
    assert repr(SharingPlan.every(4, 8)) == "SharingPlan(2/8 layers keep a cache: [0-3] [4-7])"
    assert SharingPlan([0, 1, 0, 1]).diagram() == "[0 2] [1 3]"


def test_kinds_keep_sliding_and_full_layers_apart() -> None:
    kinds = ["slide", "slide", "full", "slide", "slide", "full"]
    plan = SharingPlan.every(2, 6, kinds)
    assert plan.kv_source_layers == (0, 0, 2, 3, 3, 2)
    with pytest.raises(PlanError, match="layer 2, the first of its kind"):
        SharingPlan.from_leaders([0], 6, kinds)


@given(st.integers(1, 40), st.floats(0.02, 1))
def test_for_retention_is_close(num_layers: int, retention: float) -> None:
    plan = SharingPlan.for_retention(retention, [None] * num_layers)
    assert plan.leaders[0] == 0
    assert abs(len(plan.leaders) - retention * num_layers) <= max(1, 0.1 * num_layers)


def test_for_retention_means_every_kth() -> None:
    assert SharingPlan.for_retention(0.33, [None] * 30) == SharingPlan.every(3, 30)
    assert SharingPlan.for_retention(0.5, [None] * 30) == SharingPlan.every(2, 30)
    for bad in (0, 1.5, float("nan"), "half"):
        with pytest.raises(PlanError, match="retention"):
            SharingPlan.for_retention(bad, [None] * 4)  # type: ignore[arg-type]


@given(st.data())
def test_save_and_load_round_trip(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    leaders = {0} | set(data.draw(st.lists(st.integers(0, 15))))
    plan = SharingPlan.from_leaders(leaders, 16)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    SharingPlan(plan.kv_source_layers, provenance={"seed": 3}).save(path)
    loaded = SharingPlan.load(path)
    assert loaded == plan
    assert loaded.provenance == {"seed": 3}
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def _dict(**changes: Any) -> dict[str, Any]:
    return {**SharingPlan.every(2, 4).to_dict(), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_dict(version=2), '"version": 1, got 2'),
        (_dict(version=True), '"version": 1'),
        (_dict(format="plan"), "depthkv-plan"),
        (_dict(leaders=[0]), "got 'leaders'"),
        (_dict(kv_source_layers="0022"), "list of layer numbers"),
        (_dict(provenance=[1]), "provenance as a JSON object"),
        ({"format": "depthkv-plan", "version": 1}, "kv_source_layers"),
        ([0, 0], "JSON object, got list"),
    ],
)
def test_strict_parsing(tmp_path: Path, data: Any, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as caught:
        SharingPlan.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", '{"format": "depthkv-plan", "ver', "[" * 100_000, "\x00"])
def test_damaged_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=r"p\.json"):
        SharingPlan.load(path)
    with pytest.raises(PlanError, match="missing"):
        SharingPlan.load(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="binary"):
        SharingPlan.load(tmp_path / "binary.json")


def test_save_into_a_file_as_folder_fails_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlanError, match="expected to write the plan"):
        SharingPlan.full(2).save(tmp_path / "file" / "plan.json")


def test_bytes_per_token() -> None:
    config = tiny_config("llama")
    full = 6 * 2 * 2 * 8 * 4
    assert SharingPlan.full(6).kv_bytes_per_token(config, torch.float32) == full
    assert SharingPlan.every(3, 6).kv_bytes_per_token(config, torch.float16) == full // 6
    with pytest.raises(PlanError, match="6 layers, got one for 4"):
        SharingPlan.full(4).kv_bytes_per_token(config, torch.float32)


def test_layer_kinds_of_hybrid_models() -> None:
    kinds = layer_kinds(tiny_config("gemma3_text"))
    assert [kind.attention[0] for kind in kinds] == list("ssfssf")
    assert kinds[0].rope != kinds[2].rope
    assert {kind.rope for kind in layer_kinds(tiny_config("smollm3"))} >= {"none"}
