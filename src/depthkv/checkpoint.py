"""Load and save models, with the sharing plan that belongs to them.

A model is named by a hub id, a folder, a .gguf file or `builtin:NAME`. Whatever is wrong with it is reported as one
`CheckpointError`. Weights come from safetensors or GGUF files only: pickled weights can run code when they are read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers  # its classes are loaded when they are used: that takes seconds

from depthkv.downloads import BUILTIN_ADAPTERS, Progress
from depthkv.errors import CheckpointError, PlanError
from depthkv.export import (
    EXPORT_KEY,
    VARIANT,
    exported_config,
    is_export,
    is_exported,
    lacks_follower_kv,
    remove_follower_kv,
)
from depthkv.folders import one_line, require_replaceable, written_folder
from depthkv.location import Location, locate
from depthkv.plan import SharingPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load", "load_config", "load_tokenizer", "save"]

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_NOT_CAUSAL = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_KEY = "kv_source_layers"

_ADAPTERS = Path(__file__).parent / "adapters"
_BASE = "base"
"""What an adapter calls a base model that lies in its own folder."""


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, SharingPlan | None]:
    """Load a causal language model, its tokenizer, and the sharing plan in its config.json, if there is one.

    The plan is not applied: `share(model, plan)` does that. Where `name` is the folder of an adapter
    (`depthkv.adapt.adapters`), its base is loaded and wrapped; the adapter is on while layers share, and off otherwise.
    An export (`depthkv.export`) whose followers have no K and V weights runs under `share` with its plan only.

    Args:
        name: a folder (also of an adapter), a .gguf file, `builtin:NAME` or a hub id.
        dtype: "auto" (as stored; float32 for GGUF), "float32", "bfloat16", "float16", "float64" or a torch.dtype.
        device: "cpu", "cuda", "cuda:N", or "auto" (spread over the visible GPUs, the CPU if there is none).
        trust_remote_code: run Python code that comes with the checkpoint. Off, because it can do anything.
        progress: gets one line before a download; by default it goes to stderr.

    Returns:
        (model in eval mode, tokenizer, plan or None)

    Raises:
        CheckpointError: names what is missing, damaged or of the wrong kind.
    """
    torch_dtype = _parse_dtype(dtype)
    device_map = _parse_device(device)
    name = builtin_adapter(name)
    if (base := adapter_base(name)) is not None:
        from depthkv.adapt.adapters import load_adapter

        model, tokenizer, _ = load(
            base, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress
        )
        plan = _adapter_plan(name, model.config)
        return load_adapter(model, name), tokenizer, plan
    location = locate(name, progress)
    config = _read_config(location, trust_remote_code)
    _require_causal(config, location.name)
    plan = _plan_of(config, location)
    kwargs = location.kwargs
    if location.gguf_file is None:
        kwargs["use_safetensors"] = True
        _require_safetensors(location)
        if device_map != "cpu":
            kwargs["device_map"] = device_map
    elif torch_dtype == "auto":
        torch_dtype = torch.float32
    if is_export(config):
        kwargs["variant"] = VARIANT
    with _reading(location.name), _quiet(lacks_follower_kv(config)):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            location.folder,
            config=config,
            dtype=torch_dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
        tokenizer = _read_tokenizer(location, trust_remote_code, config)
    removed = remove_follower_kv(model, plan) if plan is not None and lacks_follower_kv(config) else set()
    if missing := sorted(set(report["missing_keys"]) - removed):
        raise CheckpointError(f"expected weights for all parameters in {location.name}, got none for {missing[0]}")
    if location.gguf_file is not None:
        _repair_gguf(model, tokenizer)
        if device_map != "cpu":
            model.to("cuda" if device_map == "auto" else device_map)
        location.prepare(model.config, tokenizer)
    return model, tokenizer, plan


def load_config(
    name: str | os.PathLike[str], *, trust_remote_code: bool = False, progress: Progress | None = None
) -> PreTrainedConfig:
    """The configuration alone, without weights.

    Args:
        name: anything that `load` takes, a folder with only a config.json, or the path of a config file (.json).
        trust_remote_code: run Python code that comes with the checkpoint.
        progress: gets one line before a download; by default it goes to stderr.

    Raises:
        CheckpointError: there is no configuration, or it is not that of a decoder-only causal language model.
    """
    name = builtin_adapter(name)
    if (base := adapter_base(name)) is not None:
        config = load_config(base, trust_remote_code=trust_remote_code, progress=progress)
        plan = _adapter_plan(name, config)
        if plan is not None:
            setattr(config, _KEY, list(plan.kv_source_layers))
        return config
    location = locate(name, progress)
    config = _read_config(location, trust_remote_code)
    _require_causal(config, location.name)
    return config


def load_tokenizer(
    name: str | os.PathLike[str], *, trust_remote_code: bool = False, progress: Progress | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer alone.

    Args:
        name: anything that `load` takes.
        trust_remote_code: run Python code that comes with the checkpoint.
        progress: gets one line before a download; by default it goes to stderr.

    Raises:
        CheckpointError: there is none.
    """
    name = builtin_adapter(name)
    location = locate(adapter_base(name) or name, progress)
    config = _read_config(location, trust_remote_code)
    with _reading(location.name):
        tokenizer: PreTrainedTokenizerBase = _read_tokenizer(location, trust_remote_code, config)
    return tokenizer


def save(
    directory: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: SharingPlan | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder that `load` and transformers read: safetensors, config, tokenizer, plan.

    Everything is written into a folder beside `directory` and renamed at the end, so no half-written checkpoint is
    ever seen. An earlier checkpoint in `directory` is replaced; other files in that folder are kept.

    Args:
        directory: where to; a folder that exists must be empty or hold a checkpoint.
        model: weights as they are now; nothing about the model is changed.
        tokenizer: saved beside it.
        plan: goes into config.json as `kv_source_layers` and into plan.json. None writes neither.
        provenance: added to the plan's own provenance in plan.json.

    Raises:
        CheckpointError: `directory` holds something else, the plan is for another model, the disk is full.
    """
    require_replaceable(Path(directory))
    if hasattr(model, "merge_and_unload"):
        raise CheckpointError(
            "expected a model of transformers to save, got one with an adapter; merge_and_unload() folds it in, "
            "depthkv.adapt.adapters.save_adapter saves it alone"
        )
    if plan is not None:
        _require_layers(plan, model.config, str(directory))
    if lacks_follower_kv(model.config):
        raise CheckpointError("expected a model with all its weights to save, got an export without followers' K and V")
    with written_folder(directory) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        write_plan(work, model.config, plan, provenance)


# Reading


def _read_config(location: Location, trust_remote_code: bool) -> PreTrainedConfig:
    with _reading(location.name):
        if location.is_prepared:
            return transformers.AutoConfig.from_pretrained(location.prepared, local_files_only=True)
        if location.gguf_file is None:
            values, _ = transformers.PreTrainedConfig.get_config_dict(location.folder, **location.kwargs)
            if (config := exported_config(values)) is not None:
                return config
        config = transformers.AutoConfig.from_pretrained(
            location.folder, trust_remote_code=trust_remote_code, **location.kwargs
        )
        if is_export(config):  # what transformers saved of a model that was loaded from an export is none any more
            delattr(config, EXPORT_KEY)
        return config


def _read_tokenizer(location: Location, trust_remote_code: bool, config: PreTrainedConfig) -> Any:
    if location.is_prepared:
        return transformers.AutoTokenizer.from_pretrained(location.prepared, local_files_only=True)
    kwargs = location.kwargs | ({"config": config} if is_export(config) else {})  # its model type is depthkv's own
    return transformers.AutoTokenizer.from_pretrained(location.folder, trust_remote_code=trust_remote_code, **kwargs)


@contextlib.contextmanager
def _quiet(expected: bool) -> Iterator[None]:
    """No table of missing weights on stderr where they are known to be missing."""
    before = transformers.logging.get_verbosity()
    if expected:
        transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as problem:  # the installation, not the checkpoint
        raise CheckpointError(f"expected the packages that {name} needs, got: {one_line(problem)}") from problem
    except Exception as problem:  # damaged files make the libraries below raise almost anything
        reason = one_line(problem)
        if "trust_remote_code" in str(problem):
            reason = "it runs its own Python code, which needs trust_remote_code=True"
        raise CheckpointError(f"expected a readable checkpoint, got {name}: {reason}") from problem


def _require_causal(config: PreTrainedConfig, name: str) -> None:
    if not isinstance(stored := getattr(config, "dtype", None), torch.dtype | None):
        raise CheckpointError(f"expected a dtype such as bfloat16 in the config of {name}, got {stored!r}")
    names = getattr(config, "architectures", None) or [type(config).__name__]
    if not isinstance(names, list) or not isinstance(architecture := names[0], str):
        raise CheckpointError(f"expected architectures as a list of names in the config of {name}, got {names!r}")
    causal = not getattr(config, "is_encoder_decoder", False) and not architecture.endswith(_NOT_CAUSAL)
    custom = getattr(config, "auto_map", None)
    known = (isinstance(custom, dict) and "AutoModelForCausalLM" in custom) or type(
        config
    ) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not causal or not known:
        raise CheckpointError(f"expected a decoder-only causal language model, got {architecture} ({name})")


def _require_safetensors(location: Location) -> None:
    folder = Path(location.folder)
    if folder.is_file():
        raise CheckpointError(f"expected a checkpoint with weights, got the config file {location.name}")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        found = f"{pickled[0]}, which is pickled and could run code" if pickled else "none"
        raise CheckpointError(f"expected .safetensors weights in {location.name}, got {found}")


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    if dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype in _DTYPES.values()):
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise CheckpointError(f"expected a dtype among auto, {', '.join(_DTYPES)}, got {dtype!s}")


def _parse_device(device: str) -> str:
    """The device_map for from_pretrained."""
    if device == "auto":
        return "auto" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise CheckpointError(f"expected a device among cpu, cuda, cuda:N, auto, got {device!r}")
    gpus, wanted = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if device != "cpu" and wanted >= gpus:
        raise CheckpointError(f"expected a visible device, got {device!r} of {gpus} GPUs")
    return device


def _repair_gguf(model: Any, tokenizer: Any) -> None:
    """What transformers gets wrong about a GGUF model, which it has dequantized by now."""
    model.hf_quantizer = None  # it calls the model quantized, and refuses to save it
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for role in ("bos", "eos", "pad"):  # 5.17 gives the tokenizer another end-of-text token than the file says
        token_id = getattr(model.config, f"{role}_token_id", None)
        if isinstance(token_id, int):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False  # 5.17 would drop spaces from decoded text


# Adapters


def builtin_adapter(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder in the package that `name` means, if it is that of a built-in adapter; otherwise `name`."""
    text = os.fspath(name)
    return _ADAPTERS / text.removeprefix("builtin:") if text in BUILTIN_ADAPTERS else name


def adapter_base(name: str | os.PathLike[str]) -> str | None:
    """The model that the adapter in the folder `name` belongs to; None if there is no adapter there."""
    path = Path(name) / "adapter_config.json"
    if not path.is_file() or (Path(name) / "config.json").exists():
        return None
    with _reading(str(name)):
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"expected the name of a base model in {path}, got {base!r}")
    return str(path.parent / _BASE) if base == _BASE else base


def _adapter_plan(name: str | os.PathLike[str], config: PreTrainedConfig) -> SharingPlan | None:
    path = Path(name) / "plan.json"
    if not path.is_file():
        return None
    plan = SharingPlan.load(path)
    _require_layers(plan, config, str(name))
    return plan


# Plans in checkpoints


def _plan_of(config: PreTrainedConfig, location: Location) -> SharingPlan | None:
    sources = getattr(config, _KEY, None)
    if sources is None:
        sources = getattr(config.get_text_config(), _KEY, None)
    if sources is None:
        return None
    try:
        plan = SharingPlan(sources)
        beside = Path(location.folder) / "plan.json"
        if beside.is_file():
            described = SharingPlan.load(beside)
            if described != plan:
                raise CheckpointError(f"expected plan.json and config.json in {location.name} to agree, got two plans")
            plan = described
    except PlanError as problem:
        raise CheckpointError(f"expected a valid plan in {location.name}, got: {problem}") from problem
    _require_layers(plan, config, location.name)
    return plan


def _require_layers(plan: SharingPlan, config: PreTrainedConfig, name: str) -> None:
    num_layers = config.get_text_config().num_hidden_layers
    if plan.num_layers != num_layers:
        raise CheckpointError(f"expected a plan for the {num_layers} layers of {name}, got one for {plan.num_layers}")


def write_plan(
    work: Path, config: PreTrainedConfig, plan: SharingPlan | None, provenance: Mapping[str, Any] | None
) -> None:
    """Write plan.json, and the plan into config.json, not into the live config: saving must not change the model."""
    path = work / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if plan is not None:
        written[_KEY] = list(plan.kv_source_layers)
        merged = {**plan.provenance, **(provenance or {})}
        SharingPlan(plan.kv_source_layers, provenance=merged).save(work / "plan.json")
    elif _KEY not in getattr(type(config), "__annotations__", {}):  # there it is the architecture's own field
        written.pop(_KEY, None)
    if not is_exported(written):  # what was loaded from an export is none any more
        written.pop(EXPORT_KEY, None)
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
