"""`share` on one family: the ways of generating, devices, compilation, errors, and what is not computed."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from depthkv import RandomCrossLayer, SharingPlan, route, share
from depthkv.cache import FollowerLayer
from depthkv.decoder import find_decoder
from depthkv.errors import CacheMismatchError, PlanError, UnsupportedModelError
from depthkv.memory import measured_cache_bytes
from depthkv.reference import ReferenceCache, reference_forward, reference_greedy
from families import NUM_LAYERS, tiny_config, tiny_model

PLAN = SharingPlan.every(2, NUM_LAYERS)
EARLY = SharingPlan.from_leaders([0, 2], NUM_LAYERS)
IDS = torch.randint(2, 97, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def generate(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    tokens: torch.Tensor = model.generate(ids, **options)
    return tokens[:, ids.shape[1] :]


@pytest.mark.parametrize("plan", [PLAN, EARLY], ids=["every2", "early"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 8},
        {"prefill_chunk_size": 5},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: "+".join(options) or "default",
)
def test_greedy_generation(model: PreTrainedModel, plan: SharingPlan, options: dict[str, Any]) -> None:
    ids = IDS[:1]
    if "prompt_lookup_num_tokens" in options:
        ids = torch.cat([ids, ids], dim=1)  # something to look up
    expected, _ = reference_greedy(model, plan.kv_source_layers, ids, 8)
    with share(model, plan):
        assert torch.equal(generate(model, ids, **options), expected)


def test_beams_and_samples(model: PreTrainedModel) -> None:
    """Against the same strategy on a model whose every forward is the reference's."""
    for options in ({"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_return_sequences": 2, "num_beams": 2}):
        with share(model, PLAN):
            torch.manual_seed(3)
            got = generate(model, **options)
        oracle = tiny_model("llama")
        forward = oracle.forward

        def no_cache(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            cache = ReferenceCache(PLAN.kv_source_layers)
            output = forward(*args, **{**kwargs, "past_key_values": cache, "use_cache": True})
            return CausalLMOutputWithPast(logits=output.logits)  # no cache, so every step recomputes everything

        oracle.forward = no_cache
        torch.manual_seed(3)
        assert torch.equal(got, generate(oracle, use_cache=False, **options)), options


def test_offloaded_cache_keeps_only_leaders() -> None:
    if not torch.cuda.is_available():
        pytest.skip("transformers' offloaded cache wants CUDA streams")
    model = tiny_model("llama").cuda()
    expected, _ = reference_greedy(model, PLAN.kv_source_layers, IDS.cuda(), 8)
    with share(model, PLAN):
        assert torch.equal(generate(model, IDS.cuda(), cache_implementation="offloaded"), expected)


def test_multi_turn_reuse_and_crop(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    with share(model, EARLY), torch.no_grad():
        first = model.generate(IDS, max_new_tokens=4, do_sample=False, past_key_values=cache)
        second = torch.cat([first, IDS[:, :5]], dim=1)
        tokens = model.generate(second, max_new_tokens=4, do_sample=False, past_key_values=cache)[:, second.shape[1] :]
        cache.crop(-3)
        assert cache.get_seq_length() == second.shape[1]
    assert torch.equal(tokens, reference_greedy(model, EARLY.kv_source_layers, second, 4)[0])


@pytest.mark.parametrize("plan", [PLAN, EARLY], ids=["every2", "early"])
def test_compiled_decode_with_a_static_cache(model: PreTrainedModel, plan: SharingPlan) -> None:
    expected, _ = reference_greedy(model, plan.kv_source_layers, IDS, 5)
    with share(model, plan), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        token = model(IDS, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        tokens = [token]
        step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        for _ in range(4):
            token = step(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            tokens.append(token)
    assert torch.equal(torch.cat(tokens, 1), expected)


# transformers 5.17 takes the meta device of offloaded weights for the model's
@pytest.mark.filterwarnings("ignore:You are calling .generate")
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_weights_offloaded_by_accelerate(offload: Any, family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    expected, _ = reference_greedy(model, PLAN.kv_source_layers, IDS, 4)
    offload(model, **({"offload_dir": str(tmp_path)} if offload is disk_offload else {}), execution_device="cpu")
    hooked = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    with share(model, PLAN), torch.no_grad():
        assert torch.equal(generate(model, max_new_tokens=4), expected)
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == hooked


def test_pair_moves_to_the_readers_device(model: PreTrainedModel) -> None:
    from depthkv.attention import LayerCache, Step

    step = Step((0, 0))
    keys = torch.ones(1, 2, 3, 4)
    LayerCache(step, 0, None).update(keys, keys, 0)
    elsewhere = torch.empty(1, 2, 3, 4, device="meta")
    assert LayerCache(step, 1, None).update(elsewhere, elsewhere, 1)[0].device.type == "meta"


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "gpt2"])
def test_followers_compute_no_k_and_v(family: str) -> None:
    model = tiny_model(family)
    decoder = find_decoder(model)
    attention = decoder.attention(0)
    fused = decoder.family.fused
    modules = [getattr(attention, name) for name in ([fused] if fused else ["k_proj", "v_proj"])]
    kv_width = 2 * decoder.kinds[0].kv_heads * decoder.kinds[0].head_dim
    assert all(isinstance(module, nn.Module) for module in modules)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(IDS, use_cache=False)
        return int(counter.get_total_flops())

    full = flops()
    with share(model, PLAN):
        shared = flops()
    # 2 FLOPs per multiply-add, for every token, from the hidden size to the width of K and V
    saved_per_follower = 2 * IDS.numel() * decoder.config.hidden_size * kv_width
    assert full - shared == len(PLAN.followers) * saved_per_follower
    assert flops() == full


def test_prefill_stops_early(model: PreTrainedModel) -> None:
    front = SharingPlan.from_leaders(range(NUM_LAYERS // 2), NUM_LAYERS)
    ids = torch.randint(2, 97, (1, 200), generator=torch.Generator().manual_seed(1))

    def flops(**options: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, use_cache=True, **options)
        return int(counter.get_total_flops())

    full = flops(logits_to_keep=1)
    with share(model, front):
        assert flops(logits_to_keep=1) < 0.53 * full
        assert flops() > 0.9 * full  # all positions' logits
        assert flops(logits_to_keep=1, output_hidden_states=True) > 0.9 * full


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text", "exaone4", "mistral", "mixtral"])
@pytest.mark.parametrize("keep", [1, 4])
def test_early_stop_is_exact(family: str, attention: str, keep: int) -> None:
    from depthkv.architectures import layer_kinds

    model = tiny_model(family, attention)
    kinds = layer_kinds(model.config)
    first_of_kind = {kinds.index(kind) for kind in kinds}
    plan = SharingPlan.from_leaders(first_of_kind, NUM_LAYERS, kinds)
    left = torch.ones_like(IDS)
    left[0, :4] = 0
    for mask in (None, left):
        with torch.no_grad():
            expected = reference_forward(model, plan.kv_source_layers, IDS, attention_mask=mask).logits[:, -keep:]
            with share(model, plan):
                got = model(IDS, attention_mask=mask, logits_to_keep=keep)
                torch.testing.assert_close(got.logits, expected, atol=1e-4, rtol=0)
                # the cache that it leaves behind serves the next token
                token = expected[:, -1:].argmax(-1)
                more = torch.cat([left if mask is not None else torch.ones_like(IDS), torch.ones(2, 1).long()], 1)
                cached = model(token, attention_mask=more, past_key_values=got.past_key_values).logits
            longer = torch.cat([IDS, token], 1)
            after = reference_forward(model, plan.kv_source_layers, longer, attention_mask=more).logits[:, -1:]
        if mask is None or family != "gpt2":  # gpt2 counts positions from the padding where none are given
            torch.testing.assert_close(cached, after, atol=1e-4, rtol=0)


def test_backward_through_a_plan(model: PreTrainedModel) -> None:
    model = model.double().train()
    reference_forward(model, PLAN.kv_source_layers, IDS, labels=IDS).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with share(model, PLAN):
        model(IDS, labels=IDS).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-9)
    # followers' K and V have no gradient here, nor in the reference, where nobody reads them
    assert got.keys() == expected.keys()
    assert [i for i in range(NUM_LAYERS) if f"model.layers.{i}.self_attn.k_proj.weight" in got] == list(PLAN.leaders)


def test_caches_do_not_cross_plans(model: PreTrainedModel) -> None:
    other = SharingPlan.from_leaders([0, 1, 2, 3], NUM_LAYERS)
    with share(model, PLAN), torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        assert [i for i, layer in enumerate(cache.layers) if isinstance(layer, FollowerLayer)] == list(PLAN.followers)
    with pytest.raises(CacheMismatchError, match="has its own keys and values"), torch.no_grad():
        model(IDS[:, :1], past_key_values=cache)
    with share(model, other), torch.no_grad():
        with pytest.raises(CacheMismatchError, match="layer 1 keeps its KV"):
            model(IDS[:, :1], past_key_values=cache)
    with torch.no_grad():
        full = model(IDS, use_cache=True).past_key_values
        with share(model, PLAN), pytest.raises(CacheMismatchError, match="19 tokens in layer 1"):
            model(IDS[:, :1], past_key_values=full)


def test_handle_and_double_share(model: PreTrainedModel) -> None:
    with torch.no_grad():
        before = model(IDS).logits
    handle = share(model, PLAN)
    assert handle.plan is PLAN
    with pytest.raises(PlanError, match="shared already"):
        share(model, PLAN)
    with pytest.raises(PlanError, match="shared already"):
        route(model, RandomCrossLayer())
    handle.remove()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    with pytest.raises(RuntimeError, match="boom"), share(model, PLAN):
        raise RuntimeError("boom")
    share(model, PLAN).remove()


def test_a_shared_model_is_neither_copied_nor_kept_alive() -> None:
    model = tiny_model("llama")
    handle = share(model, PLAN)
    with pytest.raises(PlanError, match="to copy or pickle"):
        copy.deepcopy(model)
    handle.remove()
    copy.deepcopy(model)
    share(model, PLAN)
    alive = weakref.ref(model)
    del model, handle
    gc.collect()
    assert alive() is None


def test_bare_decoder_and_lazy_cache(model: PreTrainedModel) -> None:
    with torch.no_grad():
        with share(model, PLAN):
            expected = model(IDS, output_hidden_states=True).hidden_states[-1]
        with share(model.model, PLAN):
            output = model.model(IDS, past_key_values=DynamicCache(), use_cache=True)
    torch.testing.assert_close(output.last_hidden_state, expected)
    assert measured_cache_bytes(output.past_key_values) == 3 * 2 * 2 * 2 * 19 * 8 * 4


def test_plans_that_do_not_fit() -> None:
    with pytest.raises(PlanError, match="6 layers, got one for 4"):
        share(tiny_model("llama"), SharingPlan.every(2, 4))
    with pytest.raises(PlanError, match="expected a SharingPlan, a CacheRecipe or a Router, got list"):
        share(tiny_model("llama"), [0, 0])  # type: ignore[arg-type]
    gemma = tiny_model("gemma3_text")
    with pytest.raises(PlanError, match=r"layer 2 \(full attention.* got layer 0 \(sliding attention of 8"):
        share(gemma, SharingPlan([0, 0, 0, 3, 4, 5]))
    smol = tiny_model("smollm3")
    with pytest.raises(PlanError, match="no rotary embedding"):
        share(smol, SharingPlan([0, 0, 0, 3, 4, 5]))
    assert smol(IDS).logits.isfinite().all()  # nothing is left behind


def test_unsupported_models() -> None:
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        share(nn.Linear(2, 2), PLAN)
    for family, options, message in [
        ("t5", {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 16, "vocab_size": 32}, "an encoder"),
        ("gpt2", {"add_cross_attention": True, "n_embd": 8, "n_layer": 2, "n_head": 2}, "cross attention"),
    ]:
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(family, **options)
        with pytest.raises(UnsupportedModelError, match=message):
            share(AutoModel.from_config(config), SharingPlan.full(2))
    mla = tiny_config("llama")
    mla.kv_lora_rank = 8
    with pytest.raises(UnsupportedModelError, match="MLA"):
        share(AutoModelForCausalLM.from_config(mla), PLAN)


def test_family_outside_the_table_is_proven_or_refused() -> None:
    from depthkv.architectures import FAMILIES

    name = "llama"
    row = FAMILIES.pop(name)
    try:
        model = tiny_model("llama")
        with share(model, PLAN), torch.no_grad():
            expected = model(IDS).logits
        torch.testing.assert_close(expected, reference_forward(model, PLAN.kv_source_layers, IDS).logits)
        decoder = find_decoder(model)
        layer = decoder.attention(3)
        original = type(layer).forward

        def stubborn(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            return original(self, *args, **kwargs)

        try:
            type(layer).forward = stubborn  # type: ignore[method-assign]
            with pytest.raises(UnsupportedModelError, match="no facts about"):
                share(model, PLAN)
        finally:
            type(layer).forward = original  # type: ignore[method-assign]
    finally:
        FAMILIES[name] = row


def test_peft_lora_on_k_and_v() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    with torch.no_grad():
        expected = reference_forward(model, PLAN.kv_source_layers, IDS).logits
        with share(model, PLAN):
            torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=0)
