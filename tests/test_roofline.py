"""The counts of the roofline equal what torch counts in a real forward, and the parameters of a real model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import families
from depthkv.adapt.adapters import LoraSettings, add_adapter
from depthkv.architectures import layer_kinds
from depthkv.decoder import find_decoder
from depthkv.plan import SharingPlan
from depthkv.roofline import MachineLimits, Work, forward_work, measure_limits, roofline
from depthkv.sharing import share
from tiny import tiny_model

BATCH, TOKENS = 2, 7
FULL = SharingPlan.full(4)
FRONT = SharingPlan.from_leaders([0, 1], 4)
"""Layers 2 and 3 run for the last position only in prefill."""
HALF = SharingPlan.every(2, 4)


@contextmanager
def sharing(model: nn.Module, plan: SharingPlan) -> Iterator[None]:
    with nullcontext() if plan.is_full else share(model, plan):
        yield


def counted(model: Any, plan: SharingPlan) -> dict[str, int]:
    """FLOPs of a prefill and a decoding step of eager attention, as torch counts them; without rotary embeddings, whose
    angles are computed as an outer product."""
    found = {}
    ids = torch.arange(1, 1 + BATCH * TOKENS).view(BATCH, TOKENS)
    with torch.no_grad(), sharing(model, plan):
        cache = DynamicCache(config=model.config)
        for phase, tokens in (("prefill", ids), ("decode", ids[:, :1])):
            with FlopCounterMode(display=False) as counter:
                model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            flops = counter.get_flop_counts()
            rotary = sum(sum(by.values()) for name, by in flops.items() if name.endswith("rotary_emb"))
            found[phase] = counter.get_total_flops() - rotary
    return found


def works(model: nn.Module, plan: SharingPlan) -> dict[str, Work]:
    decoder = find_decoder(model)
    with sharing(model, plan):
        return {
            "prefill": forward_work(decoder, plan, batch_size=BATCH, new_tokens=TOKENS),
            "decode": forward_work(decoder, plan, batch_size=BATCH, new_tokens=1, past_tokens=TOKENS),
        }


def eager_square(model: Any, plan: SharingPlan, flops: int) -> int:
    """Attention's FLOPs of a prefill as eager attention spends them: it computes the upper half of the square, too, and
    masks it. Layers above the last leader have one query each, and no upper half."""
    whole = plan.leaders[-1] + 1
    last = (plan.num_layers - whole) * TOKENS
    per_pair = flops // (whole * TOKENS * (TOKENS + 1) // 2 + last)
    return int(per_pair * (whole * TOKENS * TOKENS + last))


class TestFlops:
    @pytest.mark.parametrize("plan", [FULL, HALF, FRONT], ids=["full", "half", "front"])
    def test_equal_those_that_torch_counts(self, plan: SharingPlan) -> None:
        model = tiny_model(attn_implementation="eager")
        found, expected = works(model, plan), counted(model, plan)
        assert found["decode"].flops == expected["decode"]
        prefill = found["prefill"]
        square = eager_square(model, plan, prefill.attention_flops)
        assert prefill.weight_flops + square == expected["prefill"]

    @pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "mixtral", "gpt_oss", "gemma3_text", "cohere"])
    def test_of_other_families(self, family: str) -> None:
        """Fused projections, experts, windows, norms of heads."""
        model = families.tiny_model(family, "eager")
        model.set_experts_implementation("eager")  # torch does not count grouped products
        plan = SharingPlan.for_retention(0.5, layer_kinds(model.config))
        for chosen in (SharingPlan.full(plan.num_layers), plan):
            found, expected = works(model, chosen), counted(model, chosen)
            assert found["decode"].flops == expected["decode"]
            square = eager_square(model, chosen, found["prefill"].attention_flops)
            assert found["prefill"].weight_flops + square == expected["prefill"]

    def test_prefill_that_stops_early_needs_logits_to_keep(self) -> None:
        decoder = find_decoder(tiny_model())
        early, all_logits = (
            forward_work(decoder, FRONT, batch_size=1, new_tokens=TOKENS, last_logits_only=last)
            for last in (True, False)
        )
        head = 64 * 16
        # layer 2 and 3 without K and V: 2 x 16 x 16 of attention, 3 x 16 x 32 of the MLP
        assert all_logits.weight_flops - early.weight_flops == 2 * (TOKENS - 1) * (head + 2 * (2 * 256 + 3 * 512))

    def test_an_adapter_counts_where_it_is_on(self) -> None:
        base = tiny_model(attn_implementation="eager")
        plain = {plan: works(base, plan) for plan in (FULL, HALF)}
        model = add_adapter(base, LoraSettings(rank=2))
        assert works(model, FULL) == plain[FULL]
        found, expected = works(model, HALF), counted(model, HALF)
        assert found["decode"].flops == expected["decode"] > plain[HALF]["decode"].flops
        per_layer = 2 * (2 * (16 + 16) + 3 * (16 + 32))  # rank 2 of q, o, gate, up and down
        keys_values = 2 * 2 * 2 * (16 + 8)  # of 2 leaders
        assert found["decode"].weight_bytes - plain[HALF]["decode"].weight_bytes == 4 * (4 * per_layer + keys_values)

    def test_window(self) -> None:
        """A query sees no more than the window."""
        model = families.tiny_model("mistral", "eager")  # a window of 8 tokens
        decoder, plan = find_decoder(model), SharingPlan.full(6)
        heads, head_dim, window = 4, 8, 8
        work = forward_work(decoder, plan, batch_size=1, new_tokens=12)
        pairs = sum(key <= query < key + window for query in range(12) for key in range(12))
        assert work.attention_flops == 6 * 4 * heads * head_dim * pairs
        step = forward_work(decoder, plan, batch_size=1, new_tokens=1, past_tokens=30)
        assert step.attention_flops == 6 * 4 * heads * head_dim * window
        assert step.cache_read_bytes == 6 * window * (2 * 2 * head_dim * 4)


class TestBytes:
    def test_weights_are_those_of_the_model(self) -> None:
        model = tiny_model()
        every = sum(parameter.nbytes for parameter in model.parameters())
        embedding, row = model.get_input_embeddings().weight.nbytes, 16 * 4
        found = works(model, FULL)
        assert found["decode"].weight_bytes == every - embedding + BATCH * row
        assert found["prefill"].weight_bytes == every - embedding + BATCH * TOKENS * row
        skipped = sum(
            parameter.nbytes
            for name, parameter in model.named_parameters()
            if ("k_proj" in name or "v_proj" in name) and int(name.split(".")[2]) in HALF.followers
        )
        assert skipped > 0
        assert works(model, HALF)["decode"].weight_bytes == found["decode"].weight_bytes - skipped

    def test_tied_embeddings_are_read_by_the_head(self) -> None:
        model = tiny_model(tie_word_embeddings=True)
        every = sum(parameter.nbytes for parameter in model.parameters())
        assert works(model, FULL)["decode"].weight_bytes == every + BATCH * 16 * 4

    def test_followers_read_and_do_not_write(self) -> None:
        model = tiny_model().to(torch.bfloat16)
        token = 2 * 8 * 2  # keys and values of one head of 8 in 2 bytes
        for plan, written in ((FULL, 4), (HALF, 2), (FRONT, 2)):
            found = works(model, plan)
            assert found["decode"].cache_read_bytes == BATCH * 4 * (TOKENS + 1) * token
            assert found["decode"].cache_written_bytes == BATCH * written * token
            assert found["prefill"].cache_written_bytes == BATCH * TOKENS * written * token
        assert found["decode"].num_bytes == sum(
            getattr(found["decode"], name) for name in ("weight_bytes", "cache_read_bytes", "cache_written_bytes")
        )

    def test_experts_that_a_batch_reads(self) -> None:
        model = families.tiny_model("mixtral")
        decoder, plan = find_decoder(model), SharingPlan.full(6)
        experts = sum(parameter.nbytes for parameter in model.parameters() if parameter.ndim == 3)

        def read(batch: int) -> int:
            work = forward_work(decoder, plan, batch_size=batch, new_tokens=1)
            rows = min(batch, 97) * 32 * 4
            every = sum(parameter.nbytes for parameter in model.parameters())
            return work.weight_bytes - (every - experts - 97 * 32 * 4 + rows)

        assert read(1) == experts / 2  # 2 of 4
        assert read(2) == experts * 0.75
        assert read(1000) == experts


class TestRoofline:
    LIMITS = MachineLimits(bandwidth_bytes_per_s=100.0, matmul_flops_per_s=1000.0)

    def test_the_slower_of_two_limits(self) -> None:
        zero = dict(cache_read_bytes=0, cache_written_bytes=0, attention_flops=0)
        work = {
            "prefill": Work(weight_bytes=100, weight_flops=4000, **zero),
            "decode": Work(weight_bytes=50, weight_flops=100, **zero),
        }
        found = roofline(work, self.LIMITS, {"prefill": 8.0, "decode": None})
        assert found["prefill_limit_s"] == 4.0 and found["prefill_share"] == 0.5
        assert found["decode_limit_s"] == 0.5 and found["decode_share"] is None
        assert found["prefill_bytes"] == 100 and found["decode_flops"] == 100

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_limits_of_this_machine(self, dtype: torch.dtype) -> None:
        limits = measure_limits(torch.device("cpu"), dtype)
        for value in (limits.bandwidth_bytes_per_s, limits.matmul_flops_per_s):
            assert math.isfinite(value) and 1e8 < value < 1e15
