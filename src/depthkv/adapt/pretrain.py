"""Training from scratch: a random model from a config, the shallower one of equal cache, a tokenizer for it.

arXiv:2604.22782 compares a deep model whose layers share KV with a shallower one that caches as much. Both are made
here, and trained by `depthkv.adapt.adapt` with `trainable="all"`; `depthkv.samplers.FullCache` is ordinary training.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from depthkv.architectures import text_config
from depthkv.checkpoint import load_config
from depthkv.data import Document
from depthkv.errors import CheckpointError, DataError, DepthKVError
from depthkv.plan import SharingPlan

__all__ = ["equal_cache_layers", "from_config", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
"""The only special token of `train_tokenizer`."""

_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists in configs with one entry per layer."""
_LAYER_NUMBERS = ("mlp_only_layers",)
"""Lists in configs of the numbers of some layers."""
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_BYTES = 256


def from_config(
    name: str | os.PathLike[str], *, num_layers: int | None = None, seed: int = 0, vocab_size: int | None = None
) -> PreTrainedModel:
    """A model with random fp32 weights on the CPU, in eval mode; its weights depend on the config and `seed` alone.

    The global random state stays as it is. A sharing plan in the config is dropped: these weights know nothing of it.

    Args:
        name: what `depthkv.checkpoint.load_config` takes: a config.json, a folder, `builtin:NAME`, a hub id.
        num_layers: keep the first so many layers only; None keeps all.
        seed: of the weights.
        vocab_size: another vocabulary; ids of special tokens outside it become None.

    Raises:
        CheckpointError: no such config, more layers than it has, or one that no model can be made from.
    """
    config = load_config(name)
    shown = os.fspath(name)
    text: Any = text_config(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for part in (config, text):
        # where an architecture has such a field of its own, it is no plan of ours
        if "kv_source_layers" in vars(part) and not hasattr(type(part), "kv_source_layers"):
            del part.kv_source_layers
    if num_layers is not None:
        _cut_layers(text, num_layers, shown)
    if vocab_size is not None:
        if not _is_whole(vocab_size) or vocab_size < 1:
            raise CheckpointError(f"expected vocab_size of at least 1, got {vocab_size!r}")
        text.vocab_size = vocab_size
    for part in (config, text):
        _drop_outside_ids(part, text.vocab_size)
    # not torch.manual_seed(), which would seed the GPUs as well
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as problem:  # sizes that do not fit each other make the library raise almost anything
            reason = " ".join(str(problem).split()) or type(problem).__name__
            raise CheckpointError(f"expected a config that makes a model, got {shown}: {reason}") from problem
    return model.eval()


def equal_cache_layers(num_layers: int, retention: float) -> int:
    """How many layers a model without sharing has whose cache is as large as the deep one's at `retention`.

    It is the number of layers that `SharingPlan.for_retention` keeps of `num_layers` of one kind.

    Raises:
        PlanError: no layers, or a retention outside (0, 1].
    """
    return len(SharingPlan.for_retention(retention, [None] * SharingPlan.full(num_layers).num_layers).leaders)


def train_tokenizer(
    documents: Iterable[Document], vocab_size: int, *, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it knows every text, and decodes to exactly what it encoded.

    The same documents give the same tokenizer. `END_OF_TEXT` is its end-of-text token, with id 0, and never added by
    the tokenizer itself.

    Args:
        documents: what to count pairs in; the training text alone, not the held-out one.
        vocab_size: entries, `END_OF_TEXT` and the 256 bytes included; fewer where the text has too few pairs.
        min_frequency: how often a pair has to occur to become a token.

    Raises:
        DepthKVError: a vocabulary too small for the bytes.
        DataError: no text.
    """
    if not _is_whole(vocab_size) or vocab_size <= _BYTES:
        raise DepthKVError(f"expected vocab_size of at least {_BYTES + 1}, got {vocab_size!r}")
    texts = [document.text for document in documents]
    if not any(text.strip() for text in texts):
        raise DataError("expected text to train a tokenizer on, got none")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def _cut_layers(config: Any, num_layers: int, name: str) -> None:
    """Keep the first `num_layers` layers in `config`."""
    available = config.num_hidden_layers
    if not _is_whole(num_layers) or not 1 <= num_layers <= available:
        raise CheckpointError(f"expected num_layers from 1 to {available}, the layers of {name}, got {num_layers!r}")
    if num_layers == available:
        return
    if getattr(config, "is_heterogeneous", False):
        raise CheckpointError(f"expected a config without per_layer_config to make shallower, got {name}")
    config.num_hidden_layers = num_layers
    for key in _PER_LAYER:
        if getattr(config, key, None):
            setattr(config, key, list(getattr(config, key))[:num_layers])
    for key in _LAYER_NUMBERS:
        if getattr(config, key, None):
            setattr(config, key, [layer for layer in getattr(config, key) if layer < num_layers])


def _drop_outside_ids(config: Any, vocab_size: int) -> None:
    for key in _TOKEN_IDS:
        value = getattr(config, key, None)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        inside = [token for token in ids if 0 <= token < vocab_size]
        if len(inside) < len(ids):
            setattr(config, key, (inside or None) if isinstance(value, list) else None)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
