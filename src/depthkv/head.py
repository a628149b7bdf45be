"""The language-model head: its input instead of its output, so that the logits of a whole batch never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def headless(model: nn.Module, head: nn.Linear) -> Iterator[Callable[[Mapping[str, Any]], torch.Tensor]]:
    """A function from a batch (`input_ids` `[batch, tokens]`) to the head's input, `[batch, tokens, hidden_size]`.

    The forward makes no cache unless the batch says so (`use_cache`, `past_key_values`).

    Args:
        model: a causal language model of transformers, also one wrapped by PEFT or DistributedDataParallel.
        head: its head, from `plain_head`; its forward is replaced meanwhile.
    """
    seen: list[torch.Tensor] = []

    def keep_input(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden[..., :1]  # stands in for logits that nobody reads

    def last_hidden(batch: Mapping[str, Any]) -> torch.Tensor:
        seen.clear()
        model(**{"use_cache": False} | {name: value for name, value in batch.items() if name != "labels"})
        (hidden,) = seen
        seen.clear()
        return hidden

    head.forward = keep_input  # type: ignore[method-assign, assignment]
    try:
        yield last_hidden
    finally:
        del head.forward


def undistributed(model: nn.Module) -> nn.Module:
    """The model below DistributedDataParallel, which hides its attributes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The model's head, if it is a plain linear layer whose result the model returns as it is."""
    get_head = getattr(undistributed(model), "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if type(head) is not nn.Linear or "forward" in head.__dict__ or head._forward_pre_hooks or head._forward_hooks:
        return None
    if hasattr(head.weight, "full_tensor"):  # a DTensor: FSDP2 gathers it within the model's forward only
        return None
    # hand the model logits over a wide range: a cap, a scale or a cast to another type would change them
    probe = torch.linspace(-997.0, 991.0, head.out_features, device=head.weight.device)
    calls = []

    def give_probe(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(hidden)
        return probe.expand(*hidden.shape[:-1], -1)

    tokens = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    training = model.training
    model.eval()  # dropout would use up random numbers, and a resumed run would see others
    head.forward = give_probe  # type: ignore[method-assign, assignment]
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        del head.forward
        model.train(training)
    same = len(calls) == 1 and calls[0].shape[:-1] == logits.shape[:-1] and logits.shape[-1] == head.out_features
    return head if same and torch.equal(logits.float(), probe.expand_as(logits)) else None
