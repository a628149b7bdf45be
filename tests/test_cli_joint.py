"""`depthkv plan --axes`: the recipe that it writes, reuse of plans, that it goes on after a stop, bad input, report."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from depthkv import SharingPlan, load
from depthkv.calibrate import run
from depthkv.cli import joint, main
from depthkv.compress import CacheRecipe
from depthkv.compress.measure import streamed_losses
from depthkv.data import named_blocks, resolve_data, split_documents
from depthkv.errors import DepthKVError
from depthkv.evaluate.perplexity import spread
from depthkv.memory import cache_bytes, device_room, weight_bytes
from depthkv.report.reading import read_figures
from tiny import figures, tiny_checkpoint, tiny_text

LAYERS = 6
SMALL = ("--block-size", 96, "--blocks", 6, "--cost-blocks", 4, "--held-out-blocks", 4, "--evaluations", 3)
ALL = ("--axes", "depth", "bits", "tokens")
NESTED = [[0, 0, 2, 0, 0, 2], [0] * 6]
LARGER = [[0, 0, 2, 3, 4, 5], [0, 0, 2, 0, 4, 5]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(20):
        tiny_text(folder / f"{i}.txt", num_words=400, seed=i)
    return folder


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    SharingPlan([0, 0, 2, 0, 0, 5], {"nested": NESTED, "larger": LARGER}).save(path)
    return path


def choose(model: Path, text: object, *more: object, out: Path, small: tuple[object, ...] = SMALL) -> int:
    arguments = ["plan", model, "--data", text, "--out", out, *small, *more]
    return main([str(argument) for argument in arguments])


def test_a_recipe_is_chosen_measured_and_compared(
    model: Path, text: Path, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, limit = tmp_path / "recipe.json", 10_000
    more = ("--kv-budget", limit, "--context", 96, "--plan", plan_file, "--json", tmp_path / "f.json", *ALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Probe", lambda model: pytest.fail("calibrated"))
        assert choose(model, text, *more, out=out) == 0
    found, chosen = figures(tmp_path / "f.json"), CacheRecipe.load(out)
    loaded, tokenizer, _ = load(model)
    assert chosen.cache_bytes(loaded.config, loaded.dtype, 96) <= found["bytes"] <= limit
    assert found["recipe"] == {k: v for k, v in chosen.to_dict().items() if k != "provenance"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "f.json",
        "plan.json",
        "recipe.json",
        "recipe.losses.json",
    ]
    # chosen on training documents, compared on the others
    for part, count, got in (
        (0, 4, found["measured_loss"]),
        (1, 4, found["comparison"][0]["loss_score"]["value"]),
    ):
        blocks, _ = named_blocks(split_documents(resolve_data(text))[part], tokenizer, 96)
        losses = streamed_losses(loaded, chosen, blocks[spread(len(blocks), count)], 72)
        assert got == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    labels = [row["label"] for row in found["comparison"]] + found["no_room"]
    assert sorted(labels) == ["bits alone", "depth alone", "this recipe", "tokens alone"]
    # no single axis is better where it was chosen
    assert found["measured_loss"] <= min(row["measured_loss"] for row in found["comparison"])
    plans = {SharingPlan(sources) for sources in (*NESTED, *LARGER, [0, 0, 2, 0, 0, 5])}
    assert chosen.plan.is_full or chosen.plan in plans
    assert chosen.provenance["made_by"].startswith("depthkv plan") and chosen.provenance["budget"]["bytes"] == limit
    assert "Full cache" in (shown := capsys.readouterr().out) and "this recipe" in shown
    # a second run measures nothing but the held-out text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("depthkv.compress.losses.streamed_losses", lambda m, h, blocks, *a, **k: [1.0] * len(blocks))
        assert choose(model, text, *more, out=out) == 0
    assert CacheRecipe.load(out) == chosen


def test_layers_are_chosen_anew_without_a_plan(model: Path, text: Path, tmp_path: Path) -> None:
    more = ("--kv-budget", 100, "--axes", "bits", "depth", "--json", tmp_path / "f.json")
    assert choose(model, text, *more, out=tmp_path / "r.json") == 0
    found = figures(tmp_path / "f.json")
    assert found["axes"] == ["depth", "bits"] and found["recipe"]["tokens"] is None
    assert found["budget"]["bytes"] == 9600 and found["budget"]["context"] == 96
    assert (tmp_path / "r.calibration.json").exists()
    assert choose(model, text, "--retention", ".5", out=tmp_path / "p.json", small=SMALL) == 0
    # five sizes below the full cache, from what the plan's file says
    ladder = joint.read_ladder([tmp_path / "p.json"], (kind_of(model),) * LAYERS)
    assert sorted(len(entry.leaders) for entry in ladder) == [1, 2, 3, 4, 5]


def kind_of(model: Path) -> Any:
    from depthkv.architectures import layer_kinds
    from depthkv.checkpoint import load_config

    return layer_kinds(load_config(model))[0]


def test_larger_plans_are_made_from_the_order(model: Path) -> None:
    plan = SharingPlan([0, 0, 2, 0, 0, 5], {"order": [3, 1, 4, 5, 2]})
    ladder = joint.nested_around(plan, (kind_of(model),) * LAYERS)
    assert [list(entry.kv_source_layers) for entry in ladder[-3:]] == [
        [0, 1, 2, 0, 4, 5],
        [0, 0, 2, 0, 4, 5],
        [0, 0, 2, 0, 0, 5],
    ]
    assert [entry.leaders for entry in ladder[:2]] == [(0, 2), (0,)]


def test_memory_counts_weights_and_what_a_step_unpacks(
    model: Path, text: Path, tmp_path: Path, plan_file: Path
) -> None:
    config = load(model)[0].config
    room = cache_bytes(config, torch.float32, 96) // 2
    memory = 2**30
    memory += room - device_room(config, torch.float32, memory, 96, 1)
    more = ("--memory", memory, "--context", 96, "--plan", plan_file, "--json", tmp_path / "f.json", *ALL)
    assert choose(model, text, *more, out=tmp_path / "r.json") == 0
    found, chosen = figures(tmp_path / "f.json"), CacheRecipe.load(tmp_path / "r.json")
    assert chosen.cache_bytes(config, torch.float32, 96) <= found["bytes"] <= room
    assert weight_bytes(config, torch.float32) is not None


def test_half_of_the_held_out_documents_to_choose_on(model: Path, text: Path, tmp_path: Path) -> None:
    more = ("--kv-budget", 150, "--axes", "tokens", "--validation", "--json", tmp_path / "f.json")
    small = (*SMALL[:-6], "--cost-blocks", 2, "--held-out-blocks", 2, "--evaluations", 1)
    assert choose(model, text, *more, out=tmp_path / "r.json", small=small) == 0
    loaded, tokenizer, _ = load(model)
    held = split_documents(resolve_data(text))[1]
    blocks, _ = named_blocks(split_documents(held, 0.5, seed=1)[0], tokenizer, 96)
    losses = streamed_losses(loaded, CacheRecipe.load(tmp_path / "r.json"), blocks[spread(len(blocks), 2)], 72)
    assert figures(tmp_path / "f.json")["measured_loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_a_stopped_run_goes_on(model: Path, text: Path, tmp_path: Path, plan_file: Path, kill: signal.Signals) -> None:
    more = ("--kv-budget", 100, "--plan", plan_file, *ALL)
    assert choose(model, text, *more, out=tmp_path / "whole.json") == 0
    script = """
import os, sys
from depthkv.compress import losses
from depthkv.cli import main
left, signal = int(sys.argv[1]), int(sys.argv[2])
real = losses.streamed_losses
def measure(*args, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal)
    return real(*args, **options)
losses.streamed_losses = measure
sys.exit(main(sys.argv[3:]))
"""
    arguments = ["plan", model, "--data", text, "--out", tmp_path / "recipe.json", *SMALL, *more]
    command = [sys.executable, "-c", script, "15", str(int(kill)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == (130 if kill == signal.SIGINT else -kill), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "recipe.json").exists()
    assert len(figures(tmp_path / "recipe.losses.json")["losses"]) == 14
    assert choose(model, text, *more, out=tmp_path / "recipe.json") == 0
    assert CacheRecipe.load(tmp_path / "recipe.json") == CacheRecipe.load(tmp_path / "whole.json")


BAD_INPUT: dict[str, tuple[tuple[object, ...], str]] = {
    "an unknown axis": (("--kv-budget", 100, "--axes", "heads"), "--axes: expected some of depth, bits, tokens, got"),
    "a retention": (("--retention", ".5", *ALL), "expected --kv-budget or --memory with --axes depth bits tokens, got"),
    "no budget": (ALL, "expected one of --retention, --kv-budget and --memory"),
    "a plan for a plan": (("--kv-budget", 100, "--plan", "plan.json"), "expected more --axes than depth with --plan"),
    "losses of a plan": (("--kv-budget", 100, "--losses", "l.json"), "expected more --axes than depth with --losses"),
    "validation of a plan": (("--retention", ".5", "--validation"), "expected more --axes than depth with --valid"),
    "layers to keep beside a plan": (
        ("--kv-budget", 100, "--plan", "plan.json", "--keep", 1, *ALL),
        "expected --keep without --plan, got both",
    ),
    "layers to keep without depth": (
        ("--kv-budget", 100, "--axes", "bits", "--keep", 1),
        "expected --keep with depth among --axes",
    ),
    "a plan of other layers": (("--kv-budget", 100, "--plan", "other.json", *ALL), "other.json: expected"),
    "a plan that is none": (("--kv-budget", 100, "--plan", "folder/no.json", *ALL), "no.json"),
    "a ladder that is none": (("--kv-budget", 100, "--plan", "ladder.json", *ALL), "ladder.json: expected lists"),
    "a budget for everything": (
        ("--kv-budget", "1GiB", "--dtype", "float32", *ALL, "--plan", "plan.json"),
        "--kv-budget: expected a budget that the full cache does not fit into",
    ),
    "a budget for nothing": (("--kv-budget", 1, *ALL, "--plan", "plan.json"), "expected a budget of at least"),
    "blocks longer than the context": (
        ("--kv-budget", 100, "--context", 64, *ALL),
        "--block-size: expected at most the 64 tokens of --context, got 96",
    ),
    "losses onto the recipe": (("--kv-budget", 100, "--losses", "r.json", *ALL), "--losses: expected another file"),
    "the recipe onto a plan": (
        ("--kv-budget", 100, "--plan", "plan.json", "--out", "plan.json", *ALL),
        "--plan plan.json: expected another file",
    ),
    "losses of something else": (
        ("--kv-budget", 100, "--losses", "old.json", "--plan", "plan.json", *ALL),
        "--losses: old.json: expected losses",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line(
    name: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    plan_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    SharingPlan.every(2, 4).save("other.json")
    SharingPlan([0, 0, 2, 0, 0, 5], {"nested": 3}).save("ladder.json")
    (tmp_path / "old.json").write_text('{"losses": {}}', encoding="utf-8")
    before = sorted(path.name for path in tmp_path.rglob("*") if path.name != "r.losses.json")
    more, expected = BAD_INPUT[name]
    assert choose(model, text, *more, out=Path("r.json")) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("depthkv: ")]
    assert len(lines) == 1 and expected in lines[0], err
    assert "Traceback" not in err and out == ""
    # losses that were measured stay
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name != "r.losses.json") == before


# The report


@pytest.fixture(scope="module")
def written(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("written")
    SharingPlan([0, 0, 2, 0, 0, 5], {"nested": NESTED, "larger": LARGER}).save(folder / "plan.json")
    more = ("--kv-budget", 100, "--plan", folder / "plan.json", "--json", folder / "f.json", *ALL)
    assert choose(model, text, *more, out=folder / "r.json") == 0
    return figures(folder / "f.json")


def test_the_report_draws_it(written: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.json").write_text(json.dumps(written))
    assert main(["report", str(tmp_path / "f.json"), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "The recipe" in page and "nothing better at as few bytes" in page and "tokens alone" in page
    assert "&lt;" not in page
    assert page.count("<title>") > len([e for e in written["measured"] if e["on_front"]])
    assert "times smaller by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version to be 1"),
        (("axes",), ["heads"], "axes to be a list of some of depth, bits, tokens"),
        (("measured",), [], "measured to be a list of at least one"),
        (("measured", 0, "bytes"), "much", "measured[0].bytes to be a whole number"),
        (("comparison",), [], 'comparison[0].label to be "this recipe"'),
        (("comparison", 0, "recipe", "key_bits"), 3, "comparison[0].recipe: expected key_bits"),
        (("comparison", 0, "loss_score"), None, "comparison[0].loss_score to be an object"),
        (("budget",), [], "budget to be an object"),
    ],
)
def test_wrong_figures_are_named(
    written: dict[str, Any], tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    found = copy.deepcopy(written)
    place: Any = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "f.json").write_text(json.dumps(found))
    with pytest.raises(DepthKVError) as caught:
        read_figures(tmp_path / "f.json")
    assert message in str(caught.value)
