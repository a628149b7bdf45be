"""The next token, and tokens to text and back: nothing is sent that a later token could still change."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from depthkv.errors import DepthKVError

_CONTEXT = 6
"""Tokens of the prompt that the first new ones are decoded with: some tokenizers drop the space in front of a text."""
_HALF = "\N{REPLACEMENT CHARACTER}"
_COLD = 1e-5
"""Logits divided by less could leave the numbers of float32."""


class Codec:
    """A tokenizer for two threads: `encode` may wait for another `encode`, `decode` belongs to the engine."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        # a fast tokenizer must not be changed by one thread, as encoding does, while another one reads it
        self._decoder = copy.deepcopy(tokenizer)

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text to be continued."""
        with self._lock:
            return list(self._tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation that the model answers.

        Raises:
            DepthKVError: the checkpoint has no chat template, or the template refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise DepthKVError("expected a checkpoint with a chat template for chat completions, got one without")
        with self._lock:
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as problem:  # whatever the template raises
                raise DepthKVError(f"expected messages that the chat template takes, got: {problem}") from problem
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text, without special tokens."""
        text: str = self._decoder.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Writer:
    """The text of one answer, token by token.

    tokenizers' own `DecodeStream` refuses some sequences of tokens ("Invalid prefix"), which a model can write.
    """

    def __init__(self, codec: Codec, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._codec = codec
        self._tokens = list(prompt[-_CONTEXT:])
        self._start, self._read = 0, len(self._tokens)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False
        """A stop text was written; it is no part of the answer."""

    def add(self, token: int) -> str:
        """The text that can be sent now."""
        self._tokens.append(token)
        new = self._new_text()
        if new.endswith(_HALF):  # the rest of a character is in the next token
            return ""
        return self._hold(new)

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        rest = self._hold(self._new_text())
        return rest if self.stopped else rest + self._held

    def _new_text(self) -> str:
        # a prompt of tokens can end within a character
        before = self._codec.decode(self._tokens[self._start : self._read]).rstrip(_HALF)
        return self._codec.decode(self._tokens[self._start :])[len(before) :]

    def _hold(self, new: str) -> str:
        if new:
            self._start, self._read = self._read, len(self._tokens)
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def choose(logits: torch.Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """The next token, given its logits `[vocabulary]`; temperature 0, or next to it, takes the likeliest."""
    if temperature < _COLD:
        return int(logits.argmax())
    ids: Any = None  # these two look at the scores alone
    scores = TemperatureLogitsWarper(float(temperature))(ids, logits[None])
    if top_p < 1:
        scores = TopPLogitsWarper(float(top_p))(ids, scores)
    return int(torch.multinomial(scores[0].softmax(dim=-1), 1, generator=random))


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Those of `generate()`, or the tokenizer's where there are none."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])
