"""vLLM with exported checkpoints writes what depthkv writes, in as many blocks more as there are layers fewer.

Skipped without vLLM: `make vllm-test` has it in an environment of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

pytest.importorskip("vllm")

from depthkv import SharingPlan, load, share
from depthkv.export import export
from depthkv.vllm_plugin import MODELS, register
from families import NUM_LAYERS, tiny_model
from tiny import tiny_tokenizer

SIZES = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 1024}
"""The CPU backend has no smaller heads."""
KV_BYTES = 2**25
HALF = SharingPlan([0, 0, 2, 2, 4, 4])
FRONT = SharingPlan([0, 1, 2, 2, 1, 0])
LENGTHS = (5, 150, 300, 77)
NEW = 12


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # apply_model sends a function
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def exported(folder: Path, family: str = "llama", plan: SharingPlan = HALF, **options: Any) -> Path:
    # all layers of one kind
    sliding = {"use_sliding_window": False, "sliding_window": None} if family == "qwen2" else {}
    model = tiny_model(family, **SIZES, **sliding)
    export(folder, model, tiny_tokenizer(), plan, **options)
    return folder


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    from vllm import LLM

    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    settings |= {"kv_cache_memory_bytes": KV_BYTES, "skip_tokenizer_init": True, "max_num_seqs": 8}
    llm = LLM(str(folder), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def prompts() -> list[list[int]]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (length,), generator=drawn).tolist() for length in LENGTHS]


def write(llm: Any, given: list[list[int]], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    found: list[Any] = llm.generate([{"prompt_token_ids": ids} for ids in given], greedy, use_tqdm=False, **options)
    return found


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def blocks(llm: Any) -> int:
    found: int = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return found


@torch.no_grad()
def own(folder: Path, given: list[list[int]], change: Callable[[Any], Any] | None = None) -> list[list[int]]:
    """What depthkv writes."""
    model, _, plan = load(folder)
    assert plan is not None
    model = model if change is None else change(model)
    written = []
    with share(model, plan):
        for ids in given:
            read = list(ids)
            for _ in range(NEW):
                read.append(int(model(torch.tensor([read])).logits[0, -1].argmax()))
            written.append(read[len(ids) :])
    return written


def projections(model: Any) -> list[int]:
    """Rows of each layer's projection on this rank; the weights themselves are packed away by then."""
    return [layer.self_attn.qkv_proj.output_size_per_partition for layer in model.model.layers]


@pytest.mark.parametrize("family", MODELS)
def test_family_writes_the_same(family: str, tmp_path: Path) -> None:
    folder = exported(tmp_path / family, family)
    with engine(folder) as llm:
        assert tokens(write(llm, prompts())) == own(folder, prompts())
        shapes = llm.apply_model(projections)[0]
        shared = blocks(llm)
    # 4 query heads and 2 x 2 for K and V, of 32: followers have the first only
    assert shapes == [256, 128] * 3
    with engine(exported(tmp_path / "full", family, SharingPlan.full(NUM_LAYERS))) as llm:
        assert shared >= 1.95 * blocks(llm)


def test_kept_weights_change_nothing(tmp_path: Path) -> None:
    with engine(exported(tmp_path / "kept", keep_kv=True)) as llm:
        assert tokens(write(llm, prompts())) == own(tmp_path / "kept", prompts())
        assert llm.apply_model(projections)[0] == [256, 128] * 3


def test_sources_that_are_not_the_nearest_leader(tmp_path: Path) -> None:
    folder = exported(tmp_path / "front", plan=FRONT)
    with engine(folder) as llm:
        assert tokens(write(llm, prompts())) == own(folder, prompts())


def test_prefix_caching_hits(tmp_path: Path) -> None:
    folder, given = exported(tmp_path / "half"), [prompts()[2], [*prompts()[2][:280], 7, 8, 9]]
    with engine(folder, enable_prefix_caching=True) as llm:
        first, second = write(llm, given[:1]), write(llm, given[1:])
        assert second[0].num_cached_tokens >= 128
    assert tokens(first) + tokens(second) == own(folder, given)


def test_chunked_prefill(tmp_path: Path) -> None:
    folder = exported(tmp_path / "half")
    with engine(folder, enable_chunked_prefill=True, max_num_batched_tokens=32) as llm:
        assert tokens(write(llm, prompts())) == own(folder, prompts())


def test_compiled(tmp_path: Path) -> None:
    folder = exported(tmp_path / "half")
    with engine(folder, enforce_eager=False) as llm:
        assert tokens(write(llm, prompts())) == own(folder, prompts())


def test_fp8_cache(tmp_path: Path) -> None:
    folder = exported(tmp_path / "half")
    with engine(folder, dtype="bfloat16") as llm:
        wide = blocks(llm)
    with engine(folder, dtype="bfloat16", kv_cache_dtype="fp8") as llm:
        written = tokens(write(llm, prompts()))
        assert blocks(llm) >= 1.95 * wide
    expected = own(folder, prompts())
    assert all(len(row) == NEW for row in written)
    # rounded keys turn some choices over, not most first ones
    assert sum(a[0] == b[0] for a, b in zip(written, expected, strict=True)) >= 2


def test_lora_requests(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    folder = exported(tmp_path / "half")

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        targets = ["q_proj", "o_proj", "gate_proj"]
        wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
        return wrapped

    plain = own(folder, prompts())
    adapted(load(folder)[0]).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    expected = own(folder, prompts(), adapted)
    assert plain != expected
    with engine(folder, enable_lora=True, max_lora_rank=8) as llm:
        assert tokens(write(llm, prompts())) == plain
        request = LoRARequest("one", 1, str(tmp_path / "lora"))
        assert tokens(write(llm, prompts(), lora_request=request)) == expected


def test_fast_prefill(tmp_path: Path) -> None:
    folder = exported(tmp_path / "front", plan=FRONT)
    with engine(folder, kv_sharing_fast_prefill=True) as llm:
        llm.apply_model(_count_rows)
        assert tokens(write(llm, prompts())) == own(folder, prompts())
        whole, last = llm.apply_model(_counted)[0]
    # the last layer ran for one position of each prompt
    assert last == len(LENGTHS) * NEW and whole == sum(LENGTHS) + len(LENGTHS) * (NEW - 1)
    with pytest.raises(RuntimeError):  # vLLM's own, after the reason went to its log
        with engine(folder, kv_sharing_fast_prefill=True, enforce_eager=False):
            pass


def _count_rows(model: Any) -> None:
    for layer in (model.model.layers[0], model.model.layers[-1]):
        layer.rows = 0

        def count(module: Any, given: Any, owner: Any = layer) -> None:
            owner.rows += len(given[0])

        layer.mlp.register_forward_pre_hook(count)


def _counted(model: Any) -> tuple[int, int]:
    return model.model.layers[0].rows, model.model.layers[-1].rows


def test_tensor_parallel(tmp_path: Path) -> None:
    folder = exported(tmp_path / "half")
    with engine(folder, tensor_parallel_size=2) as llm:
        assert tokens(write(llm, prompts())) == own(folder, prompts())
        assert llm.apply_model(projections) == [[128, 64] * 3] * 2


def test_pipeline_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    folder = exported(tmp_path / "half")
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,4")
    # of an eager model vLLM 0.32 on a CPU leaves a warm-up out that later stages need
    options = {"pipeline_parallel_size": 2, "enforce_eager": False}
    with engine(folder, **options) as llm:
        assert tokens(write(llm, prompts())) == own(folder, prompts())
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,3")
    with pytest.raises(RuntimeError):  # vLLM's own, after the reason went to its log
        with engine(folder, **options):
            pass
    printed = capfd.readouterr()
    assert "the stages are the layers 0 to 2, 3 to 5" in printed.out + printed.err


def test_backend_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.attention import Attention

    from depthkv.errors import UnsupportedModelError
    from depthkv.vllm_plugin.models import reading_sources

    def refuse(self: Any, *args: Any, kv_sharing_target_layer_name: str | None = None, **kwargs: Any) -> None:
        if kv_sharing_target_layer_name is not None:
            raise NotImplementedError

    monkeypatch.setattr(Attention, "__init__", refuse)
    layer = Attention.__new__(Attention)
    with reading_sources(HALF):
        layer.__init__(prefix="model.layers.2.self_attn.attn")
        with pytest.raises(UnsupportedModelError, match="expected an attention backend in which layer 3 can read"):
            layer.__init__(prefix="model.layers.3.self_attn.attn")
    assert Attention.__init__ is refuse


def test_register_again() -> None:
    register()
    register()


def test_unknown_to_vllm_without_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    folder = exported(tmp_path / "half")
    code = f"from vllm import LLM; LLM({str(folder)!r}, skip_tokenizer_init=True)"
    environment = os.environ | {"VLLM_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "depthkv_llama" in done.stderr
