"""An engine and a server for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from depthkv import SharingPlan, share
from depthkv.serve.engine import Engine
from depthkv.serve.request import Failure, Progress, Request
from depthkv.serve.run import bind, server
from tiny import tiny_tokenizer


class Answer:
    """Everything that a request's listener got."""

    def __init__(self) -> None:
        self.events: list[Progress] = []
        self.failure: Failure | None = None
        self.begun, self.done = threading.Event(), threading.Event()

    def __call__(self, event: Progress | Failure) -> None:
        if isinstance(event, Failure):
            self.failure = event
        else:
            self.events.append(event)
        self.begun.set()
        if isinstance(event, Failure) or event.finish_reason is not None:
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        assert self.done.wait(60), "expected an answer, got none"
        assert self.failure is None, self.failure
        return [event.token for event in self.events]

    @property
    def text(self) -> str:
        assert self.tokens
        return "".join(event.text for event in self.events)

    @property
    def layers(self) -> list[int]:
        return [event.num_leaders for event in self.events]


def ask(engine: Engine, prompt: Sequence[int], max_tokens: int = 12, **options: Any) -> tuple[Request, Answer]:
    """Submit a greedy request."""
    answer = Answer()
    options.setdefault("temperature", 0)
    request = Request(prompt=prompt, max_tokens=max_tokens, listener=answer, **options)
    engine.submit(request)
    return request, answer


def generated(
    model: PreTrainedModel, how: Any, prompt: Sequence[int], max_tokens: int = 12, **options: Any
) -> list[int]:
    """What `generate()` writes after the prompt."""
    ids = torch.tensor([list(prompt)])
    with share(model, how):
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, **options
        )
    return output[0, len(prompt) :].tolist()


@contextmanager
def running(model: Any, tokenizer: Any, *args: Any, **options: Any) -> Iterator[Engine]:
    """An engine that is stopped at the end."""
    engine = Engine(model, tokenizer, *args, **options)
    try:
        yield engine
    finally:
        engine.stop()


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """A real server on a free port; gives its address."""
    socket = bind("127.0.0.1", 0)
    made = server(app, drain_s=20)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        made.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def endless_tokenizer() -> Any:
    """Without an end token: every answer is as long as was asked for."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def prompts(count: int, vocabulary: int = 60) -> list[list[int]]:
    """Of unlike lengths."""
    random = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocabulary, (3 + 7 * i % 23,), generator=random).tolist() for i in range(count)]


PLAN = SharingPlan.every(2, 4)
"""Of the tiny checkpoint."""
