"""Exported checkpoints: they say what the model says under its plan, and nothing runs them in another way."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from depthkv import RandomCrossLayer, SharingPlan, load, route, share
from depthkv.adapt.adapters import LoraSettings, add_adapter, save_adapter
from depthkv.adaptive.similarity import similarity_router
from depthkv.architectures import FAMILIES, layer_kinds
from depthkv.checkpoint import load_config, load_tokenizer, save
from depthkv.cli import main
from depthkv.errors import CheckpointError, PlanError, UnsupportedModelError
from depthkv.export import export
from depthkv.vllm_plugin import MODELS, untested
from depthkv.vllm_plugin.checks import check_fast_prefill, check_stages, num_trailing_followers, plan_of
from depthkv.vllm_plugin.configs import CONFIGS as VLLM_CONFIGS
from families import CONFIGS, NUM_LAYERS, tiny_model
from tiny import LAYERS, figures, tiny_checkpoint, tiny_text, tiny_tokenizer

EAGER_ONLY = {"gemma2", "gpt_oss"}
HALF = SharingPlan.every(2, LAYERS)
NOT_STORED = re.compile(r"\.(k_proj|v_proj|k_norm|k_layernorm)\.")


def half_of(model: Any) -> SharingPlan:
    return SharingPlan.every(2, NUM_LAYERS, layer_kinds(model.config))


@torch.no_grad()
def said(model: Any, plan: SharingPlan | None) -> torch.Tensor:
    ids = torch.randint(2, 60, (2, 13), generator=torch.Generator().manual_seed(1))
    if plan is None:
        return model(ids).logits  # type: ignore[no-any-return]
    with share(model, plan):
        return model(ids).logits  # type: ignore[no-any-return]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with a plan."""
    return tiny_checkpoint(tmp_path / "source", HALF)


@pytest.fixture
def exported(tmp_path: Path, source: Path) -> Path:
    assert main(["export", str(source), "--out", str(tmp_path / "exported")]) == 0
    return tmp_path / "exported"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("family", CONFIGS)
def test_family_is_the_same_after_export(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, "eager" if family in EAGER_ONLY else "sdpa")
    plan = half_of(model)
    expected = said(model, plan)
    keep_kv = FAMILIES[family].fused is not None
    if keep_kv:
        with pytest.raises(UnsupportedModelError, match=r"expected a family .* got .* one projection"):
            export(tmp_path / "out", model, tiny_tokenizer(), plan)
        assert not any(tmp_path.iterdir())
    export(tmp_path / "out", model, tiny_tokenizer(), plan, keep_kv=keep_kv)
    loaded, _, found = load(tmp_path / "out")
    if family in EAGER_ONLY:
        loaded.set_attn_implementation("eager")
    assert found == plan and type(loaded) is type(model) and loaded.config.model_type == family
    torch.testing.assert_close(said(loaded, plan), expected, atol=1e-5, rtol=0)
    if not keep_kv:
        with pytest.raises(PlanError, match=f"expected layer {plan.followers[0]} to read another layer's"):
            loaded(torch.ones(1, 3, dtype=torch.long))


def test_what_the_folder_holds(exported: Path, source: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "depthkv_llama" and config["architectures"] == ["DepthKVLlamaForCausalLM"]
    assert config["kv_source_layers"] == [0, 0, 2, 2]
    expected = {"model_type": "llama", "architecture": "LlamaForCausalLM", "follower_kv": False, "version": "0.1.0"}
    assert config["depthkv"] == expected
    assert json.loads((exported / "plan.json").read_text())["provenance"]["base_model"] == str(source)
    assert load_tokenizer(exported)("w3 w4") == tiny_tokenizer()("w3 w4")
    with safe_open(exported / "model.depthkv.safetensors", "pt") as weights:
        stored = {name for name in weights.keys() if NOT_STORED.search(name)}
    assert stored == {f"model.layers.{i}.self_attn.{name}.weight" for i in (0, 2) for name in ("k_proj", "v_proj")}


def test_other_software_fails_loudly(exported: Path) -> None:
    """transformers alone would make the missing K and V up."""
    with pytest.raises(ValueError, match="depthkv_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(exported)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.LlamaForCausalLM.from_pretrained(exported)


def test_plans_that_need_what_was_removed_are_refused(exported: Path) -> None:
    model, tokenizer, plan = load(exported)
    assert plan == HALF
    before = sorted(name for name, _ in model.named_parameters())
    for wrong in (SharingPlan.full(LAYERS), SharingPlan([0, 1, 1, 1])):
        with pytest.raises(PlanError, match=r"expected layer 1 .* removed in the export"):
            share(model, wrong)
    with pytest.raises(PlanError, match="expected layer 1 "):
        route(model, RandomCrossLayer(cross_layer_prob=0.5))
    with pytest.raises(PlanError, match="expected layer 1 "):
        similarity_router(model, [torch.ones(8, dtype=torch.long)], 0.5)
    with share(model, plan, kv_budget="1MiB"):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False)
    with share(model, SharingPlan([0, 0, 0, 0])):  # fewer leaders need no more weights
        model(torch.ones(1, 3, dtype=torch.long))
    assert sorted(name for name, _ in model.named_parameters()) == before
    for write in (save, export):
        with pytest.raises((CheckpointError, PlanError), match="export"):
            write(exported.with_name("again"), model, tokenizer, plan)  # type: ignore[operator]
    assert not exported.with_name("again").exists()


def test_kept_weights_run_in_every_way(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "kept"
    assert main(["export", str(source), "--out", str(out), "--keep-kv", "--dtype", "bfloat16"]) == 0
    assert load(out)[0].dtype == torch.bfloat16
    assert main(["export", str(source), "--out", str(out), "--keep-kv"]) == 0  # and takes its place
    original, kept = load(source)[0], load(out)[0]
    for plan in (None, HALF, SharingPlan([0, 0, 0, 3])):
        torch.testing.assert_close(said(kept, plan), said(original, plan))
    with pytest.raises(ValueError, match="depthkv_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(out)
    save(tmp_path / "plain", kept, tiny_tokenizer())  # what is saved of it is an ordinary checkpoint
    assert "depthkv" not in (tmp_path / "plain" / "config.json").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    kept.save_pretrained(tmp_path / "theirs")  # and what transformers itself saves of it, too
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(said(load(tmp_path / "theirs")[0], None), said(original, None))


def test_adapter_is_merged(tmp_path: Path, source: Path) -> None:
    adapted = add_adapter(load(source)[0], LoraSettings(rank=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    save_adapter(tmp_path / "adapted", adapted, base=str(source), plan=HALF)
    options = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "figures.json")]
    assert main(["export", str(tmp_path / "adapted"), *options]) == 0
    expected = said(load(tmp_path / "adapted")[0], HALF)
    assert (expected - said(load(source)[0], HALF)).abs().max() > 0.1  # else a lost adapter would go unseen
    model, _, plan = load(tmp_path / "out")
    assert plan is not None and plan.provenance["adapter_merged"] is True
    torch.testing.assert_close(said(model, HALF), expected, atol=1e-4, rtol=1e-4)
    found = figures(tmp_path / "figures.json")
    assert found["leaders"] == [0, 2] and found["kv_bytes_per_token"] * 2 == found["full_kv_bytes_per_token"] == 256
    assert found["weight_bytes"] == (tmp_path / "out" / "model.depthkv.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("depthkv"), 'expected "depthkv" in config.json'),
        (lambda values: values["depthkv"].update(model_type="qwen2"), "expected the model type depthkv_qwen2"),
        (lambda values: values.pop("kv_source_layers"), "expected kv_source_layers"),
        (lambda values: values.update(kv_source_layers=[0, 0, 2, 3]), "to agree, got two plans"),
        (lambda values: values.update(kv_source_layers=[0, 0, 1, 2]), "expected layer 2 to read a leader"),
    ],
)
def test_damaged_exports_are_refused(exported: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_config(exported, change)
    with pytest.raises(CheckpointError, match=message):
        load(exported)


def test_missing_leader_is_refused(exported: Path) -> None:
    path = exported / "model.depthkv.safetensors"
    weights = load_file(path)
    del weights["model.layers.2.self_attn.k_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"got none for model\.layers\.2\.self_attn\.k_proj"):
        load(exported)


def test_commands_take_an_export(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> dict[str, Any]:
        out = tmp_path / "figures.json"
        assert main([*map(str, arguments), "--json", str(out)]) == 0, capsys.readouterr().err
        return figures(out)

    text = tiny_text(tmp_path / "text.txt")
    assert "its own" in {plan["name"] for plan in run("inspect", exported)["plans"]}
    assert run("generate", exported, "--prompt", "w3 w4", "--max-new-tokens", 3)["leaders"] == [0, 2]
    bench = run("bench", exported, "--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1)
    assert set(bench["arms"]) == {"shared"} and bench["leaders"] == [0, 2] and bench["ratios"]["ttft_s"] is None
    evaluated = run("evaluate", exported, "--data", text, "--block-size", 32, "--blocks", 2, "--batch-size", 2)
    assert [row["leaders"] for row in evaluated["rows"]] == [[0, 2]] and "full_cache" not in evaluated
    capsys.readouterr()
    for wrong in (["--suite", "agreement"], ["--retention", "1"]):
        assert main(["evaluate", str(exported), "--data", str(text), "--block-size", "32", *wrong]) == 2
        assert re.fullmatch(r"depthkv: .*expected (suites|leaders among).*\n", capsys.readouterr().err)
    options = ["--data", str(text), "--block-size", "32"]
    half = ["--retention", ".5"]
    for command in (
        ["plan", *options, *half, "--out", "p.json"],
        ["adapt", *options, "--out", "adapted"],
        ["router", *options, *half, "--out", "r.safetensors"],
        ["merge-heads", "--kv-heads", "1", "--out", "merged"],
    ):
        assert main([command[0], str(exported), *command[1:]]) == 2
        assert "expected a model with all its weights, got an export" in capsys.readouterr().err


def test_bad_input(tmp_path: Path, source: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, kept = tiny_checkpoint(tmp_path / "plain"), tiny_checkpoint(tmp_path / "kept")
    SharingPlan.every(2, 5).save(tmp_path / "five.json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    out, adapted = tmp_path / "out", tmp_path / "adapted"
    save_adapter(adapted, add_adapter(load(source)[0], LoraSettings(rank=2)), base=str(source), plan=HALF)
    cases: list[tuple[list[object], str]] = [
        ([plain, "--out", out], "expected --plan or --retention"),
        ([source, "--out", source], "expected another folder"),
        ([source, "--out", tmp_path / "other"], "which holds notes.txt"),
        ([source, "--out", kept], "expected a new or empty folder or an earlier export, got"),
        ([source, "--out", out, "--plan", tmp_path / "five.json"], "expected a plan for 4 layers"),
        ([source, "--out", out, "--plan", tmp_path / "none.json"], "none.json"),
        ([source, "--out", out, "--plan", tmp_path / "five.json", "--retention", ".5"], "got both"),
        ([exported, "--out", out], "got an export without followers' K and V"),
        ([adapted, "--out", source], "expected another folder than that of MODEL's base"),
        ([tmp_path / "nothing", "--out", out], "nothing"),
    ]
    capsys.readouterr()
    for arguments, message in cases:
        assert main(["export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not out.exists()


def test_config_alone(exported: Path) -> None:
    config: Any = load_config(exported)
    assert config.model_type == "llama" and config.kv_source_layers == [0, 0, 2, 2]


# The plugin, as far as it goes without vLLM


def test_importing_the_plugin_imports_no_vllm() -> None:
    assert "vllm" not in sys.modules


def test_plugin_knows_the_model_types_that_export_writes() -> None:
    assert [config.model_type for config in VLLM_CONFIGS] == [f"depthkv_{name}" for name in MODELS]


def test_untested_versions_are_named() -> None:
    assert untested("0.32.0") is None and untested("0.32.1+cpu") is None
    for version in ("0.31.9", "0.320.0", "1.0", "dev"):
        assert version in str(untested(version))


def test_sources_stay_within_a_pipeline_stage() -> None:
    plan = SharingPlan([0, 0, 2, 2, 4, 4])
    check_stages(plan, [(0, 2), (2, 6)])
    with pytest.raises(PlanError, match=r"layer 3 .*stage \(3 to 5\), got layer 2; the stages are .* 0 to 2, 3 to 5"):
        check_stages(plan, [(0, 3), (3, 6)])


def test_fast_prefill_is_for_what_can_leave_positions_out() -> None:
    check_fast_prefill(eager=True, stages=1)
    for eager, stages in ((False, 1), (True, 2)):
        with pytest.raises(UnsupportedModelError, match="expected --enforce-eager and one pipeline stage"):
            check_fast_prefill(eager=eager, stages=stages)


def test_plan_of_a_config() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=4, kv_source_layers=[0, 0, 2, 2])
    assert plan_of(config) == HALF and num_trailing_followers(HALF) == 1
    config.kv_source_layers = [0, 0]
    with pytest.raises(PlanError, match="expected a plan for 4 layers"):
        plan_of(config)
    config.kv_source_layers = None
    with pytest.raises(PlanError, match="expected kv_source_layers"):
        plan_of(config)
    latent = transformers.DeepseekV3Config(num_hidden_layers=4, kv_source_layers=[0, 0, 2, 2])
    with pytest.raises(UnsupportedModelError, match="MLA"):
        plan_of(latent)
