"""A tiny random llama with a word-level tokenizer, and text for it, on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from depthkv.checkpoint import save
from depthkv.plan import SharingPlan

LAYERS = 4
POSITIONS = 2048
WORDS = tuple(f"w{i}" for i in range(61))


def tiny_model(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """4 layers, 2 query heads on 1 KV head of 8: 64 bytes of KV per token and layer in fp32."""
    sizes: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,  # random weights of the usual size would predict every word equally well
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words parted by spaces, `w0` to `w60`."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: 3 + i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_checkpoint(folder: Path, plan: SharingPlan | None = None, **changes: Any) -> Path:
    """`tiny_model` saved with its tokenizer."""
    save(folder, tiny_model(**changes), tiny_tokenizer(), plan)
    return folder


def tiny_text(path: Path, num_words: int = 4000, seed: int = 0) -> Path:
    """A file of counting words with a random start every now and then: something to learn."""
    rng = random.Random(seed)
    word, words = 0, []
    for _ in range(num_words):
        word = rng.randrange(len(WORDS)) if rng.random() < 0.05 else (word + 1) % len(WORDS)
        words.append(WORDS[word])
    lines = [" ".join(words[i : i + 40]) for i in range(0, num_words, 40)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def figures(path: Path) -> dict[str, Any]:
    """What a command wrote with --json."""
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read
