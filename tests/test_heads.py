"""Fewer KV heads: the merged model equals the given one with each head in the place of its group's mean."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from depthkv import RandomCrossLayer, SharingPlan, load, route, share
from depthkv.adapt.adapters import LoraSettings, add_adapter
from depthkv.architectures import FAMILIES, layer_kinds
from depthkv.checkpoint import save
from depthkv.cli import main
from depthkv.compress.heads import check_kv_heads, merge_kv_heads
from depthkv.decoder import find_decoder
from depthkv.errors import DepthKVError, UnsupportedModelError
from depthkv.memory import cache_bytes, kv_bytes_per_token, measured_cache_bytes
from families import CONFIGS, NUM_LAYERS, tiny_config, tiny_model
from tiny import tiny_checkpoint, tiny_text, tiny_tokenizer
from tiny import tiny_model as tiny_llama

REFUSED = {"gpt2", "gpt_neox"}
EAGER_ONLY = {"gemma2", "gpt_oss"}
MERGED = [family for family in CONFIGS if family not in REFUSED]
HEADS, HEAD_DIM = 4, 8


def mha(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model with a KV head for each of its 4 query heads, and norms that differ from head to head."""
    attention = "eager" if family in EAGER_ONLY else "sdpa"
    model = tiny_model(family, attention, seed, num_key_value_heads=HEADS, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
    return model


@torch.no_grad()
def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    ids = torch.randint(2, 64, (2, 19), generator=torch.Generator().manual_seed(1))
    found = model(ids, **options).logits
    assert isinstance(found, torch.Tensor)
    return found


def heads_of(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """The weights of the 4 heads, as views, for everything in a layer that has some of each KV head."""
    for layer in range(NUM_LAYERS):
        attention: Any = find_decoder(model).attention(layer)
        if hasattr(attention, "qkv_proj"):
            weight = attention.qkv_proj.weight
            yield from (list(part.chunk(HEADS)) for part in weight.chunk(3))  # as many query heads as KV heads
            continue
        for module in (attention.k_proj, attention.v_proj):
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    yield list(tensor.chunk(HEADS))
        norm = getattr(attention, "k_norm", None) or getattr(attention, "k_layernorm", None)
        if norm is not None and hasattr(norm, "norms"):
            yield [inner.weight for inner in norm.norms]
        elif norm is not None and norm.weight.numel() == HEADS * HEAD_DIM:
            yield list(norm.weight.chunk(HEADS))


@torch.no_grad()
def average(model: PreTrainedModel, kv_heads: int) -> None:
    """Every head becomes the mean of its group, of neighbours; the number of heads stays."""
    for number, heads in enumerate(heads_of(model)):
        if number % 3 == 0 and hasattr(find_decoder(model).attention(0), "qkv_proj"):
            continue  # the queries
        size = HEADS // kv_heads
        for start in range(0, HEADS, size):
            mean = torch.stack(heads[start : start + size]).mean(0)
            for head in heads[start : start + size]:
                head.copy_(mean)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_every_family_is_merged_or_refused() -> None:
    assert set(CONFIGS) == set(FAMILIES)
    for family in CONFIGS:
        if family in REFUSED:
            with pytest.raises(UnsupportedModelError, match=f"^expected .* got {family}"):
                check_kv_heads(tiny_config(family), 2)
            with pytest.raises(UnsupportedModelError, match=f"^expected .* got {family}"):
                merge_kv_heads(tiny_model(family), 4)  # as many as it has
        else:
            assert check_kv_heads(tiny_config(family, num_key_value_heads=2), 1) == (4 if family == "phi" else 2)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("family", MERGED)
def test_merging_equals_heads_that_are_the_mean_of_their_group(family: str, kv_heads: int) -> None:
    model = mha(family)
    before, config, given = state(model), model.config.to_dict(), logits(model)
    merged = merge_kv_heads(model, kv_heads)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(
        tensor.untyped_storage().data_ptr() == model.state_dict()[name].untyped_storage().data_ptr()
        for name, tensor in merged.state_dict().items()
        if name in before
    )
    assert torch.equal(logits(model), given)

    averaged = copy.deepcopy(model)
    average(averaged, kv_heads)
    expected = logits(averaged)
    assert (expected - given).abs().max() > 1e-2, "averaging changes nothing, so the test could not fail"
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(merge_kv_heads(averaged, kv_heads)), expected, atol=1e-5, rtol=0)

    assert {kind.kv_heads for kind in layer_kinds(merged.config)} == {kv_heads}
    assert type(merged) is type(model) and merged.config._attn_implementation == model.config._attn_implementation
    for layer in range(NUM_LAYERS):
        attention: Any = find_decoder(merged).attention(layer)
        assert attention.num_key_value_groups == HEADS // kv_heads
        assert getattr(attention, "num_key_value_heads", kv_heads) == kv_heads


@pytest.mark.parametrize("family", MERGED)
def test_as_many_heads_are_the_same_model(family: str) -> None:
    model = tiny_model(family, "eager" if family in EAGER_ONLY else "sdpa")
    heads = layer_kinds(model.config)[0].kv_heads
    merged = merge_kv_heads(model, heads)
    assert torch.equal(logits(merged), logits(model))
    assert merged.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("family", MERGED)
def test_a_merged_model_shares_and_its_cache_is_smaller(family: str) -> None:
    merged = merge_kv_heads(mha(family), 1)
    plan = SharingPlan.every(2, NUM_LAYERS, layer_kinds(merged.config))
    full = kv_bytes_per_token(tiny_config(family, num_key_value_heads=HEADS), torch.float32)
    assert kv_bytes_per_token(merged.config, torch.float32) * HEADS == full
    with share(merged, plan), torch.no_grad():
        torch.testing.assert_close(logits(merged, use_cache=True), logits(merged, use_cache=False), atol=1e-4, rtol=0)
        cache = merged(torch.ones(2, 5, dtype=torch.long), use_cache=True).past_key_values
    assert measured_cache_bytes(cache) == cache_bytes(merged.config, torch.float32, 5, 2, plan)
    with route(merged, RandomCrossLayer(cross_layer_prob=0.5, seed=0)):
        ids = torch.ones(2, 5, dtype=torch.long)
        merged(ids, labels=ids).loss.backward()
    assert all(find_decoder(merged).attention(0).get_parameter(n).grad is not None for n in _key_weights(merged))


def _key_weights(model: nn.Module) -> list[str]:
    family = find_decoder(model).family
    return [f"{family.fused or family.k_proj}.weight"]


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "stablelm", "cohere"])
def test_merging_twice_is_merging_once(family: str) -> None:
    model = mha(family)
    once, twice = merge_kv_heads(model, 1), merge_kv_heads(merge_kv_heads(model, 2), 1)
    for name, tensor in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], tensor)


def test_neighbouring_heads_form_a_group() -> None:
    model: Any = mha("llama")
    merged: Any = merge_kv_heads(model, 2)
    heads = model.model.layers[3].self_attn.v_proj.weight.view(HEADS, HEAD_DIM, -1)
    second = merged.model.layers[3].self_attn.v_proj.weight[HEAD_DIM:]
    torch.testing.assert_close(second, (heads[2] + heads[3]) / 2)


def test_dtype_ties_modes_and_generation_config_stay() -> None:
    model = mha("llama", tie_word_embeddings=True).to(torch.bfloat16).train()
    norm = model.get_parameter("model.norm.weight")
    norm.data = norm.data.float()  # kept in fp32, as some models keep a few weights
    norm.requires_grad_(False)
    assert model.generation_config is not None
    model.generation_config.max_new_tokens = 7
    draw = torch.get_rng_state()
    merged: Any = merge_kv_heads(model, 2)
    assert torch.equal(torch.get_rng_state(), draw)
    assert {name: p.dtype for name, p in merged.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert merged.dtype == merged.config.dtype == torch.bfloat16
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not merged.model.norm.weight.requires_grad and merged.model.embed_tokens.weight.requires_grad
    assert merged.training and merged.generation_config.max_new_tokens == 7
    assert not any(tensor.is_meta for tensor in [*merged.parameters(), *merged.buffers()])


@pytest.mark.parametrize("kv_heads", [0, -1, 3, 8, True, 2.0])
def test_a_number_that_is_no_divisor_is_refused(kv_heads: Any) -> None:
    with pytest.raises(
        DepthKVError, match=r"^expected a number of KV heads that divides the model's 4 \(1, 2, 4\), got"
    ):
        merge_kv_heads(mha("llama"), kv_heads)


def test_models_that_cannot_be_merged_are_refused() -> None:
    model = mha("llama")
    with pytest.raises(
        UnsupportedModelError, match=r"^expected a model of transformers without an adapter, got Linear"
    ):
        merge_kv_heads(nn.Linear(2, 2), 1)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="without an adapter, got PeftModelForCausalLM"):
        merge_kv_heads(add_adapter(mha("llama"), LoraSettings(rank=2)), 1)  # type: ignore[arg-type]
    inside = mha("llama")
    get_peft_model(inside, LoraConfig(target_modules=["k_proj"], task_type="CAUSAL_LM"))  # changes `inside`
    with pytest.raises(UnsupportedModelError, match=r"k_proj.*lora"):
        merge_kv_heads(inside, 1)
    model.hf_quantizer = object()
    with pytest.raises(UnsupportedModelError, match="quantised"):
        merge_kv_heads(model, 1)
    with pytest.raises(UnsupportedModelError, match=r"offloaded"):
        merge_kv_heads(mha("llama").to("meta"), 1)
    for name, words in {"deepseek_v3": r"\(MLA\)", "nemotron": "a family with tested facts, got nemotron"}.items():
        with pytest.raises(UnsupportedModelError, match=words):
            check_kv_heads(AutoConfig.for_model(name, num_hidden_layers=2), 1)


def test_a_norm_that_is_not_in_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "olmo2", FAMILIES["llama"])
    with pytest.raises(UnsupportedModelError, match=r"^expected only projections .*k_norm"):
        merge_kv_heads(mha("olmo2"), 2)


# Checkpoints and the command


def test_saved_and_loaded(tmp_path: Path) -> None:
    merged = merge_kv_heads(tiny_llama(num_key_value_heads=2), 1)
    save(tmp_path / "merged", merged, tiny_tokenizer())
    merged.save_pretrained(tmp_path / "plain")
    for folder in ("merged", "plain"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert again.config.num_key_value_heads == 1 and torch.equal(logits(again), logits(merged))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 2 KV heads and a plan."""
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "mha", SharingPlan.every(2, 4), num_key_value_heads=2)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_command_writes_a_model_to_adapt(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = tmp_path / "merged", tmp_path / "f.json"
    assert run("merge-heads", model, "--kv-heads", 1, "--out", out, "--json", figures) == 0
    shown = capsys.readouterr().out
    assert "2 to 1" in shown and "512 B" in shown and "256 B" in shown and f"depthkv adapt {out}" in shown
    found = json.loads(figures.read_text())
    assert (found["kv_heads_before"], found["kv_heads"]) == (2, 1)
    assert (found["kv_bytes_per_token_before"], found["kv_bytes_per_token"]) == (512, 256)
    merged, tokenizer, plan = load(out)
    assert plan == SharingPlan.every(2, 4) and plan.provenance["made_by"] == "depthkv merge-heads"
    assert tokenizer("w3")["input_ids"] == tiny_tokenizer()("w3")["input_ids"]
    assert torch.equal(logits(merged), logits(merge_kv_heads(load(model)[0], 1)))
    text = tiny_text(tmp_path / "text.txt")
    options = ["--tokens", 128, "--block-size", 32, "--blocks", 2, "--trainable", "layers", "--precision", "fp32"]
    assert run("adapt", out, "--data", text, "--out", tmp_path / "adapted", *options) == 0
    assert load(tmp_path / "adapted")[0].config.num_key_value_heads == 1


def test_the_command_in_another_dtype(model: Path, tmp_path: Path) -> None:
    options = ["--kv-heads", 1, "--dtype", "bf16", "--json", tmp_path / "f.json"]
    assert run("merge-heads", model, "--out", tmp_path / "merged", *options) == 0
    assert load(tmp_path / "merged")[0].dtype == torch.bfloat16
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["dtype"] == "bfloat16" and found["kv_bytes_per_token"] == 128


def test_bad_input_of_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2 = tmp_path / "gpt2"
    save(gpt2, tiny_model("gpt2"), tiny_tokenizer())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    out = tmp_path / "out"
    cases = [
        (
            [model, "--kv-heads", 3, "--out", out],
            "--kv-heads: expected a number of KV heads that divides the model's 2",
        ),
        ([model, "--kv-heads", "two", "--out", out], "--kv-heads"),
        ([model, "--out", out], "--kv-heads"),
        ([gpt2, "--kv-heads", 1, "--out", out], "got gpt2"),
        ([tmp_path / "none", "--kv-heads", 1, "--out", out], "none"),
        ([model, "--kv-heads", 1, "--out", tmp_path / "other"], "--out"),
        ([model, "--kv-heads", 1, "--out", model], "--out"),
    ]
    before = sorted(path.name for path in model.iterdir())
    for arguments, words in cases:
        assert run("merge-heads", *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("depthkv: ") and words in error
        assert error.count("\n") == 1 and not out.exists()
    assert sorted(path.name for path in model.iterdir()) == before
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


# The benchmark


def test_the_benchmark_and_its_tables(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import from_scratch
    import heads
    import tables

    sizes = dict(num_hidden_layers=4, hidden_size=16, intermediate_size=24, num_attention_heads=4)
    monkeypatch.setitem(from_scratch.SIZES, "small", sizes)
    (tmp_path / "text").mkdir()
    for number in range(12):
        tiny_text(tmp_path / "text" / f"{number}.txt", num_words=600, seed=number)
    common = ["--data", str(tmp_path / "text"), "--block-size", "32", "--blocks", "2", "--batch-size", "2"]
    common += ["--tokens", "128", "--device", "cpu", "--out", str(tmp_path / "heads.jsonl")]
    for recipe in ("layers", "adapter"):
        heads.main(["adapt", "--model", str(model), "--kv-heads", "1", "--recipe", recipe, *common])
    heads.main(["scratch", "--heads", "4", "1", "--vocab-size", "300", "--more", ".5", *common])
    monkeypatch.setattr(tables, "RAW", tmp_path)
    adapted = [line.split(" | ") for line in tables.heads().splitlines()[2:]]
    # 2 heads in 4, 2 and 1 layers, and one head in as many
    assert [line[1:4] for line in adapted[:6]] == [
        ["2 KV heads", "4 of 4", "256"],
        ["2 KV heads merged into 1", "4 of 4", "128"],
        ["2 KV heads", "2 of 4", "128"],
        ["2 KV heads merged into 1", "2 of 4", "64"],
        ["2 KV heads", "1 of 4", "64"],
        ["2 KV heads merged into 1", "1 of 4", "32"],
    ]
    assert len(adapted) == 12
    made = [line.strip("| ").split(" | ") for line in tables.heads_scratch().splitlines()]
    assert made[0][3:] == ["4 of 4 layers", "2 of 4 layers", "1 of 4 layers"]
    assert [line[0] for line in made[2:]] == [
        "4 KV heads from scratch",
        "1 KV head from scratch",
        "4 KV heads, trained on",
        "4 KV heads, merged into 1, trained on",
    ]
    assert "then" in made[4][3] and "then" not in made[3][3]
