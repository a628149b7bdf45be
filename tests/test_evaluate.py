"""Perplexity equals the plain computation, and leaves the model as it was; the same for bench."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import CohereConfig, Gemma2Config, PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from depthkv import SharingPlan, share
from depthkv.bench import ARMS, BenchConfig, bench
from depthkv.errors import DataError, DepthKVError, PlanError
from depthkv.evaluate import perplexity, retention_curve, spread_blocks
from depthkv.memory import kv_bytes_per_token
from tiny import LAYERS, tiny_model

TEXT = sys.modules["depthkv.evaluate.text"]
BLOCKS = torch.randint(64, (5, 24), generator=torch.Generator().manual_seed(1))
HALF = SharingPlan.every(2, LAYERS)


def plain_losses(model: PreTrainedModel, blocks: torch.Tensor) -> list[float]:
    """One loss per block from the whole logits."""
    with torch.no_grad():
        return [
            cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:]).item()  # the obvious way
            for row in blocks
        ]


def capped_model(config_class: Any, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1)
    config = config_class(**{**sizes, **heads, "eos_token_id": 2, "initializer_range": 0.3, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


class TestPerplexity:
    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_equals_the_plain_computation(self, batch_size: int) -> None:
        model = tiny_model()
        result = perplexity(model, BLOCKS, batch_size=batch_size)
        expected = plain_losses(model, BLOCKS)
        assert result.block_losses == pytest.approx(expected, abs=1e-5)
        assert result.loss == pytest.approx(sum(expected) / len(expected), abs=1e-5)
        assert result.perplexity == pytest.approx(math.exp(result.loss))
        assert result.num_tokens == 5 * 23

    def test_is_measured_under_the_active_plan(self) -> None:
        model = tiny_model()
        full = perplexity(model, BLOCKS)
        with share(model, HALF):
            shared = perplexity(model, BLOCKS)
            expected = plain_losses(model, BLOCKS)
        assert shared.block_losses == pytest.approx(expected, abs=1e-5)
        assert abs(shared.loss - full.loss) > 1e-3
        assert perplexity(model, BLOCKS) == full

    @pytest.mark.parametrize("elements", [1, 64 * 7, 2**24])
    def test_chunks_do_not_change_it(self, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model()
        expected = perplexity(model, BLOCKS).block_losses
        monkeypatch.setattr(TEXT, "_CHUNK_ELEMENTS", elements)
        assert perplexity(model, BLOCKS).block_losses == pytest.approx(expected, abs=1e-6)

    def test_chunks_bound_the_logits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows: list[int] = []
        real = torch.Tensor.logsumexp
        monkeypatch.setattr(TEXT, "_CHUNK_ELEMENTS", 64 * 7)
        monkeypatch.setattr(torch.Tensor, "logsumexp", lambda t, dim: (rows.append(len(t)), real(t, dim))[1])
        perplexity(tiny_model(), BLOCKS)
        assert max(rows) == 7 and sum(rows) == 5 * 23

    @pytest.mark.parametrize("elements", [1, 2**24])
    @pytest.mark.parametrize(
        ("config_class", "changes"),
        [(Gemma2Config, {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8}), (CohereConfig, {})],
    )
    def test_capped_and_scaled_logits(
        self, config_class: Any, changes: dict[str, Any], elements: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TEXT, "_CHUNK_ELEMENTS", elements)
        model = capped_model(config_class, **changes)
        assert perplexity(model, BLOCKS).block_losses == pytest.approx(plain_losses(model, BLOCKS), abs=1e-5)

    def test_leaves_the_model_as_it_was(self) -> None:
        model = tiny_model(attention_dropout=0.5).train()
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        random_state = torch.get_rng_state()
        first = perplexity(model, BLOCKS)
        assert perplexity(model, BLOCKS) == first  # evaluation mode inside: no dropout
        assert model.training and "forward" not in model.lm_head.__dict__
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_restores_the_model_after_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model().train()

        def fail(*args: object) -> None:
            raise RuntimeError("no")

        monkeypatch.setattr(TEXT, "_compare", fail)
        with pytest.raises(RuntimeError, match="no"):
            perplexity(model, BLOCKS)
        assert model.training and "forward" not in model.lm_head.__dict__

    def test_bf16_loss_is_taken_in_fp32(self) -> None:
        model = tiny_model().to(torch.bfloat16)
        assert perplexity(model, BLOCKS).block_losses == pytest.approx(plain_losses(model, BLOCKS), abs=1e-5)

    def test_progress_counts_blocks(self) -> None:
        done: list[int] = []
        perplexity(tiny_model(), BLOCKS, batch_size=2, progress=done.append)
        assert done == [2, 2, 1]

    def test_a_loss_that_is_not_finite_is_an_error(self) -> None:
        model = tiny_model()
        with torch.no_grad():
            model.lm_head.weight[5] = math.nan
        with pytest.raises(DepthKVError, match="expected a finite loss, got nan"):
            perplexity(model, BLOCKS)

    @pytest.mark.parametrize(
        ("blocks", "message"),
        [
            (torch.zeros(0, 8, dtype=torch.long), "at least one block"),
            (torch.zeros(2, 1, dtype=torch.long), "at least two tokens"),
            (torch.zeros(8, dtype=torch.long), "at least one block"),
            (torch.full((1, 8), 64), "expected token ids from 0 to 63, got 64 to 64"),
            (torch.full((1, 8), -1), "expected token ids from 0 to 63"),
        ],
    )
    def test_unusable_blocks(self, blocks: torch.Tensor, message: str) -> None:
        with pytest.raises(DataError, match=message):
            perplexity(tiny_model(), blocks)


class TestRetentionCurve:
    def test_one_row_per_plan(self) -> None:
        model = tiny_model()
        plans = [SharingPlan.full(LAYERS), HALF, SharingPlan.from_leaders([0], LAYERS), HALF]
        done: list[int] = []
        rows = retention_curve(model, BLOCKS, plans, batch_size=5, progress=done.append)
        assert [row.retention for row in rows] == [1.0, 0.5, 0.25, 0.5]
        assert [row.kv_bytes_per_token for row in rows] == [256, 128, 64, 128]
        assert rows[0].loss == pytest.approx(perplexity(model, BLOCKS).loss)
        assert rows[1] == rows[3] and sum(done) == 4 * 5
        with share(model, HALF):
            assert rows[1].loss == perplexity(model, BLOCKS).loss
        assert rows[1].to_dict() == {
            "retention": 0.5,
            "leaders": [0, 2],
            "loss": rows[1].loss,
            "perplexity": math.exp(rows[1].loss),
            "kv_bytes_per_token": 128,
        }

    def test_bytes_of_another_dtype(self) -> None:
        (row,) = retention_curve(tiny_model(), BLOCKS, [HALF], kv_dtype=torch.float16)
        assert row.kv_bytes_per_token == 64

    def test_a_plan_for_another_model(self) -> None:
        with pytest.raises(PlanError, match="expected a plan for 4 layers, got one for 5"):
            retention_curve(tiny_model(), BLOCKS, [SharingPlan.full(5)])

    def test_spread_blocks(self) -> None:
        blocks = torch.arange(10)[:, None]
        assert spread_blocks(blocks, 4).flatten().tolist() == [0, 2, 5, 7]
        assert torch.equal(spread_blocks(blocks, 99), blocks)


class TestBench:
    def test_bytes_and_counts(self) -> None:
        model = tiny_model()
        config = BenchConfig(prompt_tokens=12, new_tokens=5, repeats=2)
        done: list[int] = []
        result = bench(model, HALF, config, done.append)
        tokens = 12 + 5 - 1  # the last token is never read
        per_token = kv_bytes_per_token(model.config, torch.float32)
        assert result.median("full", "cache_bytes") == tokens * per_token
        assert result.median("shared", "cache_bytes") == tokens * per_token / 2
        assert result.ratio("cache_bytes") == 0.5
        assert {arm: len(samples) for arm, samples in result.samples.items()} == {"full": 2, "shared": 2}
        assert sum(done) == 2 * (2 + 1)
        assert "forward" not in model.model.__dict__

    def test_arms_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import depthkv.bench as bench_module

        model, order = tiny_model(), []
        real = bench_module._run

        def run(*args: Any) -> Any:
            order.append("shared" if "forward" in model.model.__dict__ else "full")
            return real(*args)

        monkeypatch.setattr(bench_module, "_run", run)
        bench(model, HALF, BenchConfig(prompt_tokens=4, new_tokens=2, repeats=3))
        pairs = [set(order[i : i + 2]) for i in range(0, 8, 2)]
        assert pairs == [{"full", "shared"}] * 4 and order[2] != order[4]

    def test_figures(self) -> None:
        figures = bench(tiny_model(), HALF, BenchConfig(prompt_tokens=8, new_tokens=3, repeats=3)).to_dict()
        for arm in ARMS:
            for field in ("ttft_s", "decode_tokens_per_s", "cache_bytes"):
                low, middle, high = (figures["arms"][arm][name] for name in (f"{field}_min", field, f"{field}_max"))
                assert 0 < low <= middle <= high
            assert figures["arms"][arm]["peak_bytes"] is None or figures["arms"][arm]["peak_bytes"] > 0
        assert figures["leaders"] == [0, 2] and figures["repeats"] == 3 and figures["dtype"] == "float32"

    @pytest.mark.parametrize("field", ["prompt_tokens", "repeats", "batch_size"])
    def test_too_small(self, field: str) -> None:
        with pytest.raises(DepthKVError, match=f"expected {field} of at least 1, got 0"):
            BenchConfig(**{field: 0})
        with pytest.raises(DepthKVError, match="expected new_tokens of at least 2, got 1"):
            BenchConfig(new_tokens=1)
