"""The command line: what each command shows and writes, and that bad input gets one line and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, T5Config

import depthkv.cli
import depthkv.cli.train
from depthkv import SharingPlan, load, share
from depthkv.cli import main
from depthkv.evaluate import perplexity
from depthkv.memory import measured_cache_bytes
from tiny import LAYERS, POSITIONS, figures, tiny_checkpoint, tiny_text

HALF = SharingPlan.every(2, LAYERS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("texts") / "text.txt")


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    HALF.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


# inspect


def seventy_billion(folder: Path) -> Path:
    """The shape of a 70B model: 80 layers, 8 KV heads, head_dim 128, 128K positions."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        vocab_size=128256,
        dtype="float16",
        architectures=["LlamaForCausalLM"],
    )
    path = folder / "70b.json"
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return path


def test_inspect_refuses_an_empty_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    config = MistralConfig(architectures=["MistralForCausalLM"]).to_dict() | {"sliding_window": 0}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert run("inspect", path) == 2
    assert "expected sliding_window of at least 1 where layer 0 has a window, got 0" in capsys.readouterr().err


def test_inspect_a_bare_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = seventy_billion(tmp_path)
    assert run("inspect", config, "--context", 131072, "--memory", "192GiB", "--json", tmp_path / "o.json") == 0
    found = figures(tmp_path / "o.json")
    full, half, quarter = found["plans"]
    assert full["cache_bytes"] == 40 * 2**30 and half["cache_bytes"] == 20 * 2**30
    assert quarter["cache_bytes"] == 10 * 2**30
    assert found["kv_bytes_per_token"] == 2 * 80 * 8 * 128 * 2
    beside_weights = 192 * 2**30 - found["weight_bytes"]
    room = beside_weights - full["activation_bytes"]
    assert 0 < room < beside_weights
    assert full["sequences"] == room // (40 * 2**30) == 0 and half["sequences"] == room // (20 * 2**30) == 1
    assert quarter["sequences"] == 3 and full["sequences_ratio"] is None and quarter["sequences_ratio"] is None
    shown = " ".join(capsys.readouterr().out.split())
    assert "40.00 GiB" in shown and "20.00 GiB" in shown and "70.6 billion" in shown
    assert "half: with this plan 1 sequence, where the full cache has room for none, or " in shown


def test_inspect_says_what_a_plan_makes_room_for(
    tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = seventy_billion(tmp_path)
    SharingPlan.every(4, 80).save(plan_file)
    options = ("--context", 8192, "--plan", plan_file, "--json", tmp_path / "o.json")
    assert run("inspect", config, "--memory", "160GiB", *options) == 0
    found = figures(tmp_path / "o.json")
    full, quarter = found["plans"]
    room = 160 * 2**30 - found["weight_bytes"] - full["activation_bytes"]
    assert full["activation_bytes"] == quarter["activation_bytes"] > 0
    assert full["sequences"] == room // full["cache_bytes"] and quarter["sequences"] == room // quarter["cache_bytes"]
    assert full["sequences_ratio"] == full["context_ratio"] == 1
    assert quarter["sequences_ratio"] == quarter["sequences"] / full["sequences"] > 3.9
    assert quarter["context_ratio"] == quarter["longest_context"] / full["longest_context"] > 1.5
    for row in found["plans"]:
        for tokens, fits in ((row["longest_context"], True), (row["longest_context"] + 1, False)):
            assert run("inspect", config, *options[2:], "--context", tokens) == 0
            one = figures(tmp_path / "o.json")["plans"][found["plans"].index(row)]
            assert (one["cache_bytes"] + one["activation_bytes"] <= 160 * 2**30 - found["weight_bytes"]) == fits
    assert (
        f"plan.json: with this plan {quarter['sequences_ratio']:.1f}x more sequences ({quarter['sequences']} instead "
        f"of {full['sequences']}), or {quarter['longest_context']:,} instead of {full['longest_context']:,} tokens"
    ) in " ".join(capsys.readouterr().out.split())


def test_inspect_without_room(model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", model, "--plan", plan_file, "--memory", "1KiB", "--json", tmp_path / "o.json") == 0
    for row in figures(tmp_path / "o.json")["plans"]:
        assert row["sequences"] == row["longest_context"] == 0
        assert row["sequences_ratio"] is row["context_ratio"] is None
    shown = " ".join(capsys.readouterr().out.split())
    assert f"plan.json: no sequence of {POSITIONS:,} tokens fits The weights alone need more." in shown
    # less than the positions that the model has, but more than nothing
    assert run("inspect", model, "--plan", plan_file, "--memory", "128KiB", "--json", tmp_path / "o.json") == 0
    full, half = figures(tmp_path / "o.json")["plans"]
    assert half["sequences"] == 0 and half["longest_context"] > full["longest_context"] > 0
    longer = f"{half['longest_context']:,} instead of {full['longest_context']:,} tokens do"
    assert f"no sequence of {POSITIONS:,} tokens fits, but {longer}" in " ".join(capsys.readouterr().out.split())


def test_inspect_counts_no_weights_that_it_does_not_know(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("depthkv.inspect_model.num_parameters", lambda config: None)
    options = ("--context", 64, "--json", tmp_path / "o.json")
    assert run("inspect", model, "--memory", "1MiB", *options) == 0
    found = figures(tmp_path / "o.json")
    full = found["plans"][0]
    assert found["weight_bytes"] is None
    assert full["sequences"] == (2**20 - full["activation_bytes"]) // full["cache_bytes"] > 0
    assert "but not the weights, which are unknown" in " ".join(capsys.readouterr().out.split())


def test_inspect_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MistralConfig(num_hidden_layers=4, sliding_window=256, architectures=["MistralForCausalLM"])
    config.save_pretrained(tmp_path)
    options = ("--context", 1024, "--dtype", "bfloat16", "--memory", "6GiB", "--json", tmp_path / "o.json")
    assert run("inspect", tmp_path, *options) == 0
    full, half, _ = figures(tmp_path / "o.json")["plans"]
    # a follower holds neither its window nor K and V of the whole prompt
    assert full["activation_bytes"] - half["activation_bytes"] == 2 * (1024 - 255) * full["kv_bytes_per_token"] // 4
    assert half["cache_bytes"] == full["cache_bytes"] // 2 == 255 * half["kv_bytes_per_token"]
    # the whole prompt has to fit, although the cache is bounded
    assert 1024 < full["longest_context"] < half["longest_context"] < 2**20
    shown = " ".join(capsys.readouterr().out.split())
    assert "All layers have windows: what is written after such a prompt needs no more memory." in shown


def test_inspect_shows_what_cannot_share(tmp_path: Path) -> None:
    config = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 16,
        "intermediate_size": 64,
        "vocab_size": 100,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run("inspect", tmp_path, "--json", tmp_path / "o.json") == 0
    groups = figures(tmp_path / "o.json")["groups"]
    assert [group["layers"] for group in groups] == [[0, 1, 2, 3, 4], [5]]


def test_inspect_a_plan(model: Path, plan_file: Path, tmp_path: Path) -> None:
    assert run("inspect", model, "--plan", plan_file, "--json", tmp_path / "o.json") == 0
    found = figures(tmp_path / "o.json")["plans"]
    assert [row["name"] for row in found] == ["full", "plan.json"] and found[1]["leaders"] == [0, 2]


# evaluate


def test_evaluate_takes_several_retentions(model: Path, text: Path, tmp_path: Path) -> None:
    options = ("--data", text, "--block-size", 32, "--blocks", 3, "--json", tmp_path / "o.json")
    assert run("evaluate", model, "--retention", 1, ".5", "0.25", *options) == 0
    rows = figures(tmp_path / "o.json")["rows"]
    assert [row["retention"] for row in rows] == [1.0, 0.5, 0.25]
    assert [row["leaders"] for row in rows] == [[0, 1, 2, 3], [0, 2], [0]]
    assert len({round(row["loss"], 6) for row in rows}) == 3
    assert rows[0]["kv_bytes_per_token"] == 2 * rows[1]["kv_bytes_per_token"] == 4 * rows[2]["kv_bytes_per_token"]
    assert run("evaluate", model, *options) == 0  # the usual retentions, the model's own plan if it has one
    assert [row["retention"] for row in figures(tmp_path / "o.json")["rows"]] == [1.0, 0.5, 0.5, 0.25]


def test_evaluate_measures_what_perplexity_does(model: Path, text: Path, plan_file: Path, tmp_path: Path) -> None:
    from depthkv.data import resolve_data, token_blocks

    options = ("--data", text, "--block-size", 32, "--blocks", 999, "--all-text", "--json", tmp_path / "o.json")
    assert run("evaluate", model, "--plan", plan_file, *options) == 0
    (row,) = figures(tmp_path / "o.json")["rows"]
    loaded, tokenizer, _ = load(model)
    with share(loaded, HALF):
        expected = perplexity(loaded, token_blocks(resolve_data(text), tokenizer, 32))
    assert row["perplexity"] == pytest.approx(expected.perplexity) and row["loss"] == pytest.approx(expected.loss)


# generate


def test_generate_writes_what_the_model_writes(
    model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt", "w1 w2 w3", "--max-new-tokens", 6, "--json", tmp_path / "o.json")
    assert run("generate", model, "--plan", plan_file, *options) == 0
    found = figures(tmp_path / "o.json")
    loaded, tokenizer, _ = load(model)
    encoded = tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
    with share(loaded, HALF):
        expected: Any = loaded.generate(
            **encoded, max_new_tokens=6, do_sample=False, pad_token_id=2, return_dict_in_generate=True
        )
    assert found["text"] == tokenizer.decode(expected.sequences[0, 3:], skip_special_tokens=True)
    assert found["leaders"] == [0, 2]
    assert found["peak_cache_bytes"] == measured_cache_bytes(expected.past_key_values)
    assert found["full_cache_bytes"] == 2 * found["peak_cache_bytes"]
    assert found["text"] in capsys.readouterr().out


def test_generate_uses_the_checkpoints_own_plan(tmp_path: Path) -> None:
    planned = tiny_checkpoint(tmp_path / "planned", plan=HALF)
    assert run("generate", planned, "--prompt", "w1", "--max-new-tokens", 2, "--json", tmp_path / "o.json") == 0
    assert figures(tmp_path / "o.json")["leaders"] == [0, 2]


def test_generate_sampling_follows_the_seed(model: Path, tmp_path: Path) -> None:
    texts = []
    for seed in (1, 1, 2):
        options = ("--temperature", 2.0, "--max-new-tokens", 12, "--seed", seed, "--json", tmp_path / "o.json")
        assert run("generate", model, "--prompt", "w1", *options) == 0
        texts.append(figures(tmp_path / "o.json")["text"])
    assert texts[0] == texts[1] != texts[2]


# bench


def test_bench_measures_both_arms(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt-tokens", 16, "--new-tokens", 4, "--repeats", 2, "--json", tmp_path / "o.json")
    assert run("bench", model, *options) == 0
    found = figures(tmp_path / "o.json")
    full, shared = found["arms"]["full"], found["arms"]["shared"]
    assert full["cache_bytes"] == 2 * shared["cache_bytes"] > 0
    assert full["ttft_s"] > 0 and full["decode_tokens_per_s"] > 0 and "peak_bytes" in full
    # a table, then one line of JSON
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == found


# adapt


def adapt(model: Path, text: Path, out: Path, *more: object) -> int:
    options = ("--block-size", 32, "--blocks", 2, "--precision", "fp32", "--batch-size", 2, "--learning-rate", 1e-2)
    return run("adapt", model, "--data", text, "--out", out, *options, *more)


def test_adapt_trains_the_model_and_an_adapter_for_sharing(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert adapt(model, text, out, "--tokens", 32 * 40, "--json", tmp_path / "o.json") == 0
    found = figures(tmp_path / "o.json")
    assert found["tokens"] == 32 * 40 and found["steps"] == 6 and len(found["finetune_losses"]) == 14
    assert [row["retention"] for row in found["rows"]] == [1.0, 0.5, 0.5, 0.25]
    assert found["rows"][1]["loss"] < found["rows_before"][1]["loss"]
    adapted, _, plan = load(out)
    base, _, none = load(out / "base")
    assert plan == HALF and plan.provenance["tokens"] == 32 * 40 and none is None
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, base(ids).logits)
    assert not torch.equal(base(ids).logits, load(model)[0](ids).logits)
    # the folder is a model for every other command, and its plan is used
    assert run("evaluate", out, "--data", text, "--blocks", 2, "--block-size", 32, "--json", tmp_path / "e.json") == 0
    assert figures(tmp_path / "e.json")["rows"][1]["loss"] == pytest.approx(found["rows"][1]["loss"], rel=1e-4)
    assert adapt(model, text, out, "--tokens", 64) == 0  # replaced


def test_the_last_line_tells_training_from_all_that_the_command_took(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def slow_save(*arguments: Any, **options: Any) -> Any:
        nonlocal now
        now = 120.0
        return real(*arguments, **options)

    real, clock = depthkv.cli.train.save, time.perf_counter
    monkeypatch.setattr(depthkv.cli.train, "save", slow_save)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + now)
    assert adapt(model, text, tmp_path / "out", "--tokens", 64, "--trainable", "layers", "--json", tmp_path / "j") == 0
    training = figures(tmp_path / "j")["seconds"]
    found = re.search(r"([\d.]+) minutes of training, ([\d.]+) in all; ", capsys.readouterr().out)
    assert found is not None and training < 60
    assert float(found[1]) == pytest.approx(training / 60, abs=0.06) and 2 <= float(found[2]) < 4


def test_adapter_alone_refers_to_the_model(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ("--tokens", 32 * 8, "--finetune", 0, "--trainable", "dora", "--rank", 2, "--objective", "distill")
    assert adapt(model, text, out, *more) == 0
    assert not (out / "base").exists() and (out / "adapter_model.safetensors").stat().st_size < 100_000
    assert load(out)[2] == HALF


@pytest.mark.parametrize(
    "more",
    [
        ("--objective", "attention", "--sampler", "r-cla+leader-subset"),
        ("--objective", "distill", "--sampler", "per-sequence:r-cla", "--accumulate-steps", 2),
        ("--local-steps", 3, "--sampler", "plan", "--gradient-checkpointing"),
        ("--eval-every", 2, "--early-stop", 1, "--best-mix", "1:1,.5:2"),
        ("--trainable", "query-output", "--sampler", "rd-cla:2", "--independent-maps"),
    ],
    ids=lambda more: more[1],
)
def test_adapt_has_options(more: tuple[object, ...], model: Path, text: Path, tmp_path: Path) -> None:
    more = more if "--trainable" in more else ("--trainable", "layers", *more)
    assert adapt(model, text, tmp_path / "out", "--tokens", 32 * 16, *more) == 0
    assert load(tmp_path / "out")[2] == HALF


def test_adapt_trains_and_measures_on_every_text(model: Path, text: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other.txt", text.read_text().upper())
    losses = []
    for texts in ((text,), (other,), (text, other, text)):
        more = [part for name in texts[1:] for part in ("--data", name)]
        assert adapt(model, texts[0], tmp_path / "out", "--tokens", 64, *more, "--json", tmp_path / "o.json") == 0
        found = figures(tmp_path / "o.json")
        assert found["data"] == [str(name) for name in dict.fromkeys(texts)]
        losses.append(found["rows_before"][0]["loss"])
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)


def test_adapt_names_the_text_that_is_too_short(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = written(tmp_path / "other.txt", "a b c")
    assert adapt(model, text, tmp_path / "out", "--tokens", 64, "--data", other) == 2
    assert "other.txt" in capsys.readouterr().err


def test_dry_run_estimates_and_writes_nothing(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for trainable in ("lora", "all"):
        more = ("--tokens", 32 * 40, "--trainable", trainable, "--dry-run", "--json", tmp_path / "o.json")
        assert adapt(model, text, tmp_path / "out", *more) == 0
        found = figures(tmp_path / "o.json")
        most = max(found["num_trained"], found["num_finetuned"])
        assert found["num_steps"] == 20 and found["optimizer_bytes"] == 8 * most
        assert (found["num_finetuned"] > 0) == (trainable == "lora")
        assert found["total_bytes"] > found["weight_bytes"] > 4 * found["num_trained"] - 1
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert "20 steps, 1,280 tokens: 14 of fine-tuning, 6 with routing" in lines and "20 steps, 1,280 tokens" in lines
    assert shown.err.count("1,280 tokens are few: some million are a start (docs/faq.md") == 2
    assert "minutes of training" in shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["o.json"]


def test_dry_run_divides_minutes_by_the_time_of_a_step(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(model, text, tmp_path / "out", "--minutes", 600, "--dry-run", "--json", tmp_path / "o.json") == 0
    found = figures(tmp_path / "o.json")
    steps = [found[f"num_{stage}_steps"] for stage in ("finetune", "routed")]
    expected = [share * 600 * 60 / found["seconds_per_step"] for share in (0.7, 0.3)]
    assert steps == pytest.approx(expected, abs=1.1) and found["num_steps"] == sum(steps)
    shown = capsys.readouterr()
    parts = f"{steps[0]:,} of fine-tuning, {steps[1]:,} with routing"
    assert f"about {sum(steps):,} steps, {64 * sum(steps):,} tokens: {parts}\n" in shown.out
    assert "about 600.0 minutes of training" in shown.out and "are few" not in shown.err


def test_pre_training_and_the_shallower_model(model: Path, text: Path, tmp_path: Path) -> None:
    for more, layers in (((), 4), (("--equal-cache", 0.5), 2)):
        out = tmp_path / f"out{layers}"
        assert adapt(model, text, out, "--from-config", "--tokens", 32 * 8, *more) == 0
        new, _, plan = load(out)
        assert new.config.num_hidden_layers == layers and plan == (HALF if layers == 4 else None)


def test_question_answering(model: Path, tmp_path: Path) -> None:
    def question(number: int) -> dict[str, Any]:
        answer = {"text": f"w{number}", "answer_start": 0}
        return {"id": str(number), "question": "w1 w2", "answers": [answer]}

    articles = [
        {"title": f"t{a}", "paragraphs": [{"context": f"w{a} w5 w6", "qas": [question(a), question(5)]}]}
        for a in range(8)
    ]
    squad = written(tmp_path / "squad.json", json.dumps({"data": articles}))
    out = tmp_path / "out"
    more = ("--task", "qa", "--tokens", 32 * 8, "--trainable", "layers", "--json", tmp_path / "o.json")
    assert adapt(model, squad, out, *more) == 0
    rows = figures(tmp_path / "o.json")["rows"]
    assert [row["num_questions"] for row in rows] == [2] * 4 and all(0 <= row["f1"] <= 100 for row in rows)


def test_adapt_writes_a_checkpoint_with_its_plan(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ("--trainable", "layers", "--json", tmp_path / "o.json")
    assert adapt(model, text, out, "--tokens", 32 * 40, *more) == 0
    found = figures(tmp_path / "o.json")
    assert found["tokens"] == 32 * 40 and found["steps"] == 20 == len(found["losses"]) and found["seconds"] > 0
    assert [row["retention"] for row in found["rows"]] == [1.0, 0.5, 0.5, 0.25]
    assert found["rows"][1]["loss"] < found["rows_before"][1]["loss"]
    _, _, plan = load(out)
    assert plan == HALF and plan.provenance["tokens"] == 32 * 40
    assert {"loss.png", "plan.png", "retention.png", "plan.json", "config.json"} <= {p.name for p in out.iterdir()}
    assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []


@pytest.mark.parametrize("stop", [7, 17], ids=["fine-tuning", "adapter"])
def test_adapt_goes_on_after_an_interruption(
    stop: int, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert adapt(model, text, whole, "--tokens", 32 * 40) == 0
    real, steps = torch.optim.AdamW.step, 0

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert adapt(model, text, out, "--tokens", 32 * 40) == 130
    shown = capsys.readouterr().err
    assert "out.unfinished" in shown and "Traceback" not in shown and not out.exists() and "going on" not in shown
    assert adapt(model, text, out, "--tokens", 32 * 40) == 0
    assert steps == 20
    shown = capsys.readouterr()
    assert f"going on from step {stop} of {out}.unfinished" in shown.err.splitlines()
    for what in ("measuring before training", "measuring after training"):
        assert what in shown.err.splitlines()
    assert "minutes of training, " in shown.out and " in this call; " in shown.out
    for name in ("base/model.safetensors", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize(
    ("save_every", "kept"), [((), None), (("--save-every", 1e-9), 11)], ids=["ten minutes", "every step"]
)
def test_a_kill_loses_what_came_after_the_last_checkpoint(
    save_every: tuple[object, ...],
    kept: int | None,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Killed(BaseException):
        pass

    real, steps = torch.optim.AdamW.step, 0

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 12:
            raise Killed
        return real(self, *arguments, **options)

    more = ("--tokens", 32 * 40, "--blocks", 0, *save_every)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.AdamW, "step", step)
        adapt(model, text, tmp_path / "out", *more)
    capsys.readouterr()
    assert adapt(model, text, tmp_path / "out", *more) == 0
    state = tmp_path / "out.unfinished"
    expected = f"no checkpoint in {state}: from the beginning"
    assert (f"going on from step {kept} of {state}" if kept else expected) in capsys.readouterr().err.splitlines()
    assert not state.exists()


# Bad input


DISTILL = ("--trainable", "layers", "--blocks", "0", "--objective", "distill", "--teacher")


def broken_config(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "lla', encoding="utf-8")
    return folder


def config_of(config: Any, folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return path


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def plan_with(folder: Path, content: str) -> Path:
    return written(folder / "bad-plan.json", content)


def plan_json(**changes: Any) -> str:
    return json.dumps({"format": "depthkv-plan", "version": 1, "kv_source_layers": [0, 0, 2, 2], **changes})


def mla_config() -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(num_hidden_layers=2)


Case = Callable[[Path, Path, Path], list[object]]
"""From a model, a text and an empty folder to arguments."""

BAD_INPUT: dict[str, tuple[Case, str]] = {
    "no such model": (lambda m, t, d: ["inspect", d / "nothing"], "nothing"),
    "no such builtin model": (lambda m, t, d: ["inspect", "builtin:gpt9"], "smollm2-135m"),
    "a folder without a model": (lambda m, t, d: ["inspect", d], "config.json"),
    "broken config": (lambda m, t, d: ["inspect", broken_config(d)], "config.json"),
    "encoder-decoder": (lambda m, t, d: ["inspect", config_of(T5Config(), d)], "T5Config"),
    "latent attention": (lambda m, t, d: ["inspect", config_of(mla_config(), d)], "latent"),
    "not a gguf file": (lambda m, t, d: ["inspect", written(d / "x.gguf", "GGML")], "x.gguf"),
    "bad memory": (lambda m, t, d: ["inspect", m, "--memory", "24 parsecs"], "--memory"),
    "no memory": (lambda m, t, d: ["inspect", m, "--memory", "0GiB"], "--memory"),
    "endless memory": (lambda m, t, d: ["inspect", m, "--memory", "1e999GiB"], "--memory"),
    "memory and a plan for other layers": (
        lambda m, t, d: ["inspect", m, "--memory", "1GiB", "--plan", plan_with(d, plan_json(kv_source_layers=[0, 0]))],
        "4 layers, got one for 2",
    ),
    "negative context": (lambda m, t, d: ["inspect", m, "--context", "-1"], "--context"),
    "unknown command": (lambda m, t, d: ["compress", m], "compress"),
    "unknown option": (lambda m, t, d: ["inspect", m, "--colour", "red"], "--colour"),
    "missing argument": (lambda m, t, d: ["inspect"], "MODEL"),
    "missing option": (lambda m, t, d: ["evaluate", m], "--data"),
    "plan file missing": (lambda m, t, d: ["generate", m, "--prompt", "a", "--plan", d / "p.json"], "p.json"),
    "plan for other layers": (
        lambda m, t, d: ["generate", m, "--prompt", "a", "--plan", plan_with(d, plan_json(kv_source_layers=[0, 0]))],
        "4 layers, got one for 2",
    ),
    "plan truncated": (
        lambda m, t, d: ["generate", m, "--prompt", "a", "--plan", plan_with(d, plan_json()[:-4])],
        "bad-plan.json",
    ),
    "plan with unknown keys": (
        lambda m, t, d: ["evaluate", m, "--data", t, "--plan", plan_with(d, plan_json(leader=3))],
        "leader",
    ),
    "plan of another version": (
        lambda m, t, d: ["bench", m, "--plan", plan_with(d, plan_json(version=2))],
        "version",
    ),
    "plan that reads a later layer": (
        lambda m, t, d: ["bench", m, "--plan", plan_with(d, plan_json(kv_source_layers=[0, 2, 2, 2]))],
        "layer 1",
    ),
    "plan with words": (
        lambda m, t, d: ["bench", m, "--plan", plan_with(d, plan_json(kv_source_layers=["0", 0, 0, 0]))],
        "kv_source_layers",
    ),
    "plan and retention": (
        lambda m, t, d: ["bench", m, "--plan", plan_with(d, plan_json()), "--retention", ".5"],
        "both",
    ),
    "retention 0": (lambda m, t, d: ["evaluate", m, "--data", t, "--retention", "1", "0"], "--retention"),
    "retention without a number": (lambda m, t, d: ["evaluate", m, "--data", t, "--retention", "half"], "--retention"),
    "no such text": (lambda m, t, d: ["evaluate", m, "--data", d / "no.txt"], "no.txt"),
    "empty text": (lambda m, t, d: ["evaluate", m, "--data", written(d / "e.txt", " \n")], "e.txt"),
    "binary text": (lambda m, t, d: ["evaluate", m, "--data", written(d / "b.txt", b"\0\1\2" * 99)], "b.txt"),
    "text shorter than a block": (
        lambda m, t, d: ["evaluate", m, "--data", written(d / "s.txt", "w1 w2 w3 w4 w5"), "--block-size", "64"],
        "64 tokens",
    ),
    "block longer than the model's positions": (
        lambda m, t, d: ["evaluate", m, "--data", t, "--block-size", str(POSITIONS + 1)],
        f"{POSITIONS} positions",
    ),
    "bad dtype": (lambda m, t, d: ["generate", m, "--prompt", "a", "--dtype", "int3"], "int3"),
    "bad device": (lambda m, t, d: ["generate", m, "--prompt", "a", "--device", "tpu"], "tpu"),
    "GPU that is not there": (lambda m, t, d: ["generate", m, "--prompt", "a", "--device", "cuda:99"], "cuda:99"),
    "empty prompt": (lambda m, t, d: ["generate", m, "--prompt", " "], "--prompt"),
    "prompt too long": (lambda m, t, d: ["generate", m, "--prompt", "w1 " * POSITIONS], "positions"),
    "no new tokens": (lambda m, t, d: ["generate", m, "--prompt", "w1", "--max-new-tokens", "0"], "--max-new-tokens"),
    "temperature below 0": (lambda m, t, d: ["generate", m, "--prompt", "w1", "--temperature", "-1"], "--temperature"),
    "json into no folder": (lambda m, t, d: ["inspect", m, "--json", d / "no" / "o.json"], "o.json"),
    "json onto a folder": (lambda m, t, d: ["inspect", m, "--json", d], "folder"),
    "adapt onto a file": (lambda m, t, d: ["adapt", m, "--data", t, "--out", written(d / "f", "x")], "file"),
    "adapt into a folder of something else": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", written(d / "f", "x").parent],
        "holds f",
    ),
    "two budgets": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", "--minutes", "1", "--tokens", "9"],
        "both",
    ),
    "probability above 1": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", "--cross-layer-prob", "1.5"],
        "--cross-layer-prob",
    ),
    "best mix without measuring": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", "--best-mix", "1:1"],
        "--best-mix with --eval-every",
    ),
    "shallower model without pre-training": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", "--equal-cache", ".5"],
        "--equal-cache with --from-config",
    ),
    "unknown task": (lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", "--task", "poetry"], "poetry"),
    "unknown weights to train": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", "--trainable", "some"],
        "--trainable among lora",
    ),
    "unknown sampler": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", "--sampler", "dice"],
        "--sampler: expected a sampler among r-cla",
    ),
    "unknown objective": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", "--objective", "fun"],
        "objective to be one of lm, distill",
    ),
    "questions that are none": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", "--task", "qa"],
        "questions in JSON",
    ),
    "stored teacher that is missing": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", *DISTILL, d / "none.safetensors"],
        "stored teacher in",
    ),
    "learning rate of 0": (
        lambda m, t, d: ["adapt", m, "--data", t, "--out", d / "o", "--learning-rate", "0"],
        "--learning-rate",
    ),
    "demo into a folder of something else": (
        lambda m, t, d: ["demo", "--model", m, "--data", t, "--out", written(d / "thesis.tex", "x").parent],
        "thesis.tex",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line(
    name: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, expected = BAD_INPUT[name]
    arguments = case(model, text, tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("depthkv: ") and expected in err, err
    assert "Traceback" not in err and "Error" not in err
    assert out == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_weights_of_another_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tiny_checkpoint(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert run("generate", broken, "--prompt", "w1") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_full_disk(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.save", full)
    assert adapt(model, text, tmp_path / "out", "--tokens", 64) == 2
    err = capsys.readouterr().err
    assert "no space left on the disk" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_not_enough_memory(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr("depthkv.cli.bench.bench_grid", exhausted)
    assert run("bench", model) == 2
    err = capsys.readouterr().err
    assert "out of memory" in err and err.count("\n") == 1


def test_ctrl_c_exits_with_130(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("depthkv.cli.evaluate.load", stop)
    assert run("evaluate", model, "--data", text, "--block-size", 32) == 130
    assert capsys.readouterr().err == "depthkv: interrupted\n"


def test_internal_errors_keep_their_traceback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("depthkv.cli.bench.bench_grid", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("bench", model)


@pytest.mark.parametrize(
    "command", ["demo", "inspect", "merge-heads", "adapt", "evaluate", "generate", "bench", "report"]
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "--json" in capsys.readouterr().out


def test_no_arguments_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "evaluate" in capsys.readouterr().out


def test_the_program_itself(model: Path) -> None:
    """As a process: exit code, and nothing on stdout but the result."""
    code = "import sys; from depthkv.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", str(model), "--plan", "missing.json", "--prompt", "w1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(depthkv.cli.__file__).parents[2])},
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


# Files that are read


@pytest.mark.parametrize(
    "command", [("evaluate", "--data", "text.txt"), ("generate", "--prompt", "a"), ("bench",), ("inspect",)]
)
def test_figures_are_not_written_over_a_plan(
    command: tuple[str, ...], model: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = plan_file.read_bytes()
    name, *options = command
    assert run(name, model, *options, "--plan", plan_file, "--json", plan_file.parent / "." / "plan.json") == 2
    assert "--json: expected another file than those that are read" in capsys.readouterr().err
    assert plan_file.read_bytes() == before


def test_figures_replace_no_checkpoint_and_no_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_text(tmp_path / "text.txt")
    weights = model / "model.safetensors"
    named = {text: "--json", weights: "--json", model / "config.json": "--json: expected another file"}
    before = {file: file.read_bytes() for file in named}
    for file, message in named.items():
        assert run("evaluate", model, "--data", text, "--json", file) == 2
        assert message in capsys.readouterr().err
        assert file.read_bytes() == before[file]


def test_a_command_after_two_dashes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--", "inspect", model) == 0
    assert "layers" in capsys.readouterr().out
