"""A first stage without a language-model head: teach each follower alone to make its own output from another's KV.

Every layer is given the input that it has in the full-cache model, so layers do not depend on each other. Queries and
output projections of the followers are fitted so that attention over the source's keys and values gives what attention
over the layer's own would have given. Keys, values and MLPs stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depthkv.adapt.config import trainable_parameters
from depthkv.adapt.objectives import relative_error
from depthkv.decoder import Decoder, find_decoder
from depthkv.errors import DepthKVError
from depthkv.routing import Sampler
from depthkv.sharing import route


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Settings of `fit_followers`.

    Raises:
        DepthKVError: a value outside its range.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    """Peak; falls in a straight line to 0."""
    batch_size: int = 2
    """Blocks in one step."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DepthKVError(f"expected {name} of at least 1, got {value!r}")
        if not self.learning_rate > 0:
            raise DepthKVError(f"expected a learning rate above 0, got {self.learning_rate!r}")


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """What `fit_followers` did."""

    errors: tuple[float, ...]
    """One per step: mean relative error of the followers' attention outputs; 1 is as bad as no output at all."""
    tokens: int


def fit_followers(
    model: nn.Module, blocks: torch.Tensor, sampler: Sampler, config: LocalConfig, *, bf16: bool = False
) -> LocalResult:
    """Fit query and output projections of `model`, in place.

    Args:
        model: a causal language model whose attention has its own query projection; fp32 weights.
        blocks: token ids, `[blocks, tokens]`; taken in their order.
        sampler: who reads whom, for example `RandomCrossLayer`, or `PlanWeighted(plan=..., plan_prob=1)` for one plan.
        config: steps, learning rate, batch size.
        bf16: forwards under autocast.

    Raises:
        DepthKVError: a fused projection, or no blocks.
    """
    if len(blocks) == 0:
        raise DepthKVError("expected at least one block of text, got none")
    decoder = find_decoder(model)
    trained = trainable_parameters(model, decoder, "query-output")
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, weight_decay=0.0)
    frozen = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in trained.values())]
    device = next(iter(trained.values())).device
    errors: list[float] = []
    was_training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        stack.callback(lambda: [p.requires_grad_(True) for p in frozen])
        stack.callback(model.zero_grad, set_to_none=True)
        for parameter in frozen:
            parameter.requires_grad_(False)
        originals = {name: p.detach().clone() for name, p in trained.items()}
        routing = stack.enter_context(route(model, sampler, only_in_training=True))
        for step in range(config.steps):
            rows = [(step * config.batch_size + i) % len(blocks) for i in range(config.batch_size)]
            tokens = blocks[rows].to(device)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - step / config.steps)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                inputs, targets = _full_cache(model, decoder, tokens, trained, originals)
                model.train()
                routing.step = step
                outputs = _forced(decoder, tokens, inputs)
            followers = [i for i, source in enumerate(routing.last_plan.kv_source_layers) if source != i]
            if not followers:
                errors.append(0.0)
                continue
            loss = torch.stack([relative_error(outputs[i], targets[i]) for i in followers]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            errors.append(loss.item())
    return LocalResult(errors=tuple(errors), tokens=config.steps * config.batch_size * blocks.shape[1])


@torch.no_grad()
def _full_cache(
    model: nn.Module,
    decoder: Decoder,
    tokens: torch.Tensor,
    trained: dict[str, nn.Parameter],
    originals: dict[str, torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each layer's input to attention and attention's output, with the weights that the model came with."""
    inputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    with _swapped(trained, originals), _hooked(decoder, keep) as outputs:
        model.eval()
        decoder.module(input_ids=tokens, use_cache=False)
    return inputs, outputs


def _forced(decoder: Decoder, tokens: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The routed layers' attention outputs when each is given `inputs` instead of what the layer below made."""
    waiting = iter(inputs)

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (next(waiting), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": next(waiting)}

    with _hooked(decoder, replace) as outputs:
        decoder.module(input_ids=tokens, use_cache=False)
    return outputs


@contextmanager
def _hooked(decoder: Decoder, before: Any) -> Iterator[list[torch.Tensor]]:
    """Call `before` ahead of every attention module, and collect what they return."""
    outputs: list[torch.Tensor] = []

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = []
    for layer in range(decoder.num_layers):
        module = decoder.attention(layer)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _swapped(trained: dict[str, nn.Parameter], originals: dict[str, torch.Tensor]) -> Iterator[None]:
    """The original weights in the place of the trained ones."""
    now = {name: parameter.data for name, parameter in trained.items()}
    for name, parameter in trained.items():
        parameter.data = originals[name]
    try:
        yield
    finally:
        for name, parameter in trained.items():
            parameter.data = now[name]
