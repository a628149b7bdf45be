"""Models and tokenizers made from scratch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from depthkv import SharingPlan, load, share
from depthkv.adapt import AdaptConfig, adapt
from depthkv.adapt.pretrain import END_OF_TEXT, equal_cache_layers, from_config, train_tokenizer
from depthkv.checkpoint import save
from depthkv.data import Document, token_blocks
from depthkv.errors import CheckpointError, DataError, DepthKVError, PlanError
from depthkv.samplers import FullCache, LeaderSubset
from families import CONFIGS, NUM_LAYERS, tiny_config
from tiny import tiny_model, tiny_tokenizer

DOCUMENTS = [
    Document("a", "the cat sat on the mat, the cat ate. " * 20),
    Document("b", "Zwölf Bären\n\n  \tand 3 €! " * 9),
]


def write_config(folder: Path, config: Any, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict() | changes))
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_config(tmp_path, tiny_model().config)


class TestFromConfig:
    def test_same_seed_same_weights(self, llama: Path) -> None:
        first, again, other = from_config(llama, seed=3), from_config(llama, seed=3), from_config(llama, seed=4)
        for (name, weight), same in zip(first.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(weight, same), name
        assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)
        assert first.dtype == torch.float32 and not first.training

    def test_global_random_state_is_neither_used_nor_changed(self, llama: Path) -> None:
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        first = from_config(llama)
        assert torch.equal(torch.rand(3), expected)
        again = from_config(llama)
        assert torch.equal(first.get_input_embeddings().weight, again.get_input_embeddings().weight)

    def test_from_a_checkpoint_in_bf16(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        save(folder, tiny_model().to(torch.bfloat16), tiny_tokenizer(), SharingPlan([0, 0, 2, 2]))
        model = from_config(folder, seed=1)
        assert model.dtype == torch.float32
        assert not hasattr(model.config, "kv_source_layers")
        stored, _, _ = load(folder)
        assert stored.dtype == torch.bfloat16
        assert not torch.allclose(model.get_input_embeddings().weight, stored.get_input_embeddings().weight.float())

    @pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "qwen2_moe", "smollm3", "gpt2", "gemma3_text"])
    def test_fewer_layers(self, tmp_path: Path, family: str) -> None:
        assert family in CONFIGS
        whole = tiny_config(family)
        path = write_config(tmp_path, whole)
        model: Any = from_config(path, num_layers=NUM_LAYERS - 2)
        assert model.config.num_hidden_layers == NUM_LAYERS - 2
        for key in ("layer_types", "no_rope_layers"):
            if getattr(whole, key, None):
                assert getattr(model.config, key) == getattr(whole, key)[: NUM_LAYERS - 2]
        tokens = torch.arange(1, 13)[None]
        with torch.no_grad():
            assert model(input_ids=tokens).logits.isfinite().all()
        model.save_pretrained(tmp_path / "saved")  # transformers checks the lists' lengths here

    def test_numbers_of_cut_layers_are_dropped(self, tmp_path: Path) -> None:
        path = write_config(tmp_path, tiny_config("qwen2_moe"), mlp_only_layers=[1, 5])
        assert from_config(path, num_layers=4).config.mlp_only_layers == [1]

    @pytest.mark.parametrize("num_layers", [0, -1, 5, True, 2.0])
    def test_wrong_number_of_layers(self, llama: Path, num_layers: Any) -> None:
        with pytest.raises(CheckpointError, match=r"^expected num_layers from 1 to 4, .*got "):
            from_config(llama, num_layers=num_layers)

    def test_smaller_vocabulary(self, tmp_path: Path) -> None:
        path = write_config(
            tmp_path,
            tiny_model().config,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=[2, 40],
            pad_token_id=40,
        )
        model: Any = from_config(path, vocab_size=32)
        assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == 32
        assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, [2], None)
        assert from_config(path).config.pad_token_id == 40
        assert from_config(path, vocab_size=2).config.eos_token_id is None
        with pytest.raises(CheckpointError, match="expected vocab_size of at least 1, got 0"):
            from_config(path, vocab_size=0)

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            from_config(tmp_path / "none.json")

    def test_sizes_that_do_not_fit(self, tmp_path: Path) -> None:
        path = write_config(tmp_path, tiny_model().config, hidden_act="nonsense")
        with pytest.raises(CheckpointError, match=r"expected a config that makes a model, got .*config\.json"):
            from_config(path)


class TestEqualCacheLayers:
    @pytest.mark.parametrize(
        ("num_layers", "retention", "expected"),
        [
            (8, 1.0, 8),
            (8, 0.5, 4),
            (8, 0.25, 2),
            (12, 0.25, 3),
            (28, 0.6, 17),
            (10, 0.33, 4),
            (3, 0.01, 1),
            (1, 0.5, 1),
        ],
    )
    def test_as_many_as_the_plan_keeps(self, num_layers: int, retention: float, expected: int) -> None:
        assert equal_cache_layers(num_layers, retention) == expected
        assert len(SharingPlan.for_retention(retention, [None] * num_layers).leaders) == expected

    @pytest.mark.parametrize(("num_layers", "retention"), [(0, 0.5), (4, 0.0), (4, 1.5)])
    def test_errors(self, num_layers: int, retention: float) -> None:
        with pytest.raises(PlanError, match="expected "):
            equal_cache_layers(num_layers, retention)


class TestTokenizer:
    def test_round_trip(self, tmp_path: Path) -> None:
        tokenizer = train_tokenizer(DOCUMENTS, 300)
        text = "  A cat , isn 't 日本 ?\n\nthe\tmat\r\n "
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert len(tokenizer) == tokenizer.vocab_size <= 300
        assert len(tokenizer("the cat")["input_ids"]) == 2
        save(tmp_path / "model", tiny_model(vocab_size=len(tokenizer)), tokenizer)
        _, loaded, _ = load(tmp_path / "model")
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded.eos_token == END_OF_TEXT

    def test_documents_are_parted_by_the_end_of_text(self) -> None:
        tokenizer = train_tokenizer(DOCUMENTS, 300)
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, 0)
        blocks = token_blocks(DOCUMENTS, tokenizer, 8)
        assert int((blocks == 0).sum()) >= 1 and int(blocks.max()) < len(tokenizer)

    def test_deterministic(self) -> None:
        first, again = (train_tokenizer(iter(DOCUMENTS), 320).backend_tokenizer.to_str() for _ in range(2))
        assert first == again

    def test_smallest_is_the_bytes(self) -> None:
        assert len(train_tokenizer(DOCUMENTS, 257)) == 257
        with pytest.raises(DepthKVError, match="expected vocab_size of at least 257, got 256"):
            train_tokenizer(DOCUMENTS, 256)

    @pytest.mark.parametrize("documents", [[], [Document("blank", " \n")]])
    def test_no_text(self, documents: list[Document]) -> None:
        with pytest.raises(DataError, match="expected text to train a tokenizer on, got none"):
            train_tokenizer(documents, 300)


@pytest.mark.parametrize("sampler", [FullCache(), LeaderSubset()])
def test_trains_from_scratch(llama: Path, sampler: Any) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 280)
    model = from_config(llama, vocab_size=len(tokenizer))
    blocks = token_blocks(DOCUMENTS, tokenizer, 16)
    config = AdaptConfig(max_tokens=40 * 64, block_size=16, batch_size=4, learning_rate=1e-2, trainable="all")
    result = adapt(model, blocks, config, sampler=sampler, progress=False)
    assert result.losses[-1] < result.losses[0] - 1
    with share(model, SharingPlan.every(2, 4)), torch.no_grad():
        assert model(input_ids=blocks[:1]).logits.isfinite().all()
