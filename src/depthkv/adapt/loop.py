"""The training loop: AdamW on the plain language-model loss, a fresh routing map for every forward."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthkv.adapt.config import AdaptConfig, trainable_parameters
from depthkv.adapt.cpu_attention import FasterCpuAttention
from depthkv.adapt.loss import LossFunction
from depthkv.adapt.objectives import LanguageModelLoss, Objective
from depthkv.adapt.state import Position, load_state, save_state
from depthkv.adapt.terminal import StepInfo, deferred_interrupt, training_bar
from depthkv.decoder import find_decoder
from depthkv.errors import DataError, DepthKVError
from depthkv.routing import RandomCrossLayer, Sampler
from depthkv.sharing import Routing, route


@dataclass(frozen=True, kw_only=True)
class AdaptResult:
    """What a training run did; a resumed run counts from its very start."""

    steps: int
    """Optimizer steps."""
    tokens: int
    """Training tokens."""
    seconds: float
    """Training time."""
    losses: tuple[float, ...]
    """One per optimizer step, nats per token, under that step's random maps."""
    num_trained: int
    """Parameters that trained."""
    first_step: int
    """Steps that were done already when this call took up the run; 0 for a fresh one."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def adapt(
    model: nn.Module,
    train_blocks: torch.Tensor,
    config: AdaptConfig,
    *,
    sampler: Sampler | None = None,
    objective: Objective | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    resume_dir: str | Path | None = None,
    progress: bool = True,
) -> AdaptResult:
    """Train `model` in place with stochastic KV routing. Its weights become fp32 and stay so.

    Routing maps and the order of the blocks are pure functions of the seed and the step. With a budget in tokens, a run
    that was interrupted and resumed gives the same weights, to the bit, as one that was not.

    Args:
        model: a causal language model of transformers, on one device.
        train_blocks: token ids, `[blocks, config.block_size]`, from `depthkv.data.token_blocks`.
        config: the recipe and the budget.
        sampler: draws the maps; None is `RandomCrossLayer` with the config's probability and seed.
        objective: what is minimised; None is the plain language-model loss.
        on_step: called after every optimizer step, while the model is routed; its time does not count.
        resume_dir: where the state is saved every few minutes, on Ctrl-C and at the end, and taken up from if there is
            one. Delete it with `discard_state` when the trained model is safe.
        progress: a progress bar on stderr.

    Raises:
        DepthKVError: a loss that is not finite (the error names the step), nothing to train, blocks of another size.
        CheckpointError: the state in `resume_dir` belongs to a run with other settings or cannot be written.
        KeyboardInterrupt: Ctrl-C; with a `resume_dir`, after the state was saved.
    """
    _check_blocks(model, train_blocks, config)
    sampler = sampler or RandomCrossLayer(cross_layer_prob=config.cross_layer_prob, seed=config.seed)
    trained = trainable_parameters(model, find_decoder(model), config.trainable)
    model.float()  # fp32 master weights: a bf16 weight would not move by less than 1/256 of itself
    device = next(iter(trained.values())).device
    optimizer = _optimizer(trained, config)
    run = _Run(model, train_blocks, config, optimizer, trained, device)
    settings = _settings(config, sampler, objective, train_blocks)
    position = load_state(resume_dir, model, optimizer, trained, settings) if resume_dir is not None else None
    if position is not None:
        run.step, run.seconds, run.losses = position.step, position.seconds, list(position.losses)
    first_step = run.step

    with ExitStack() as stack:
        stack.enter_context(_training_mode(model, trained))
        dtype = torch.bfloat16 if config.uses_bf16(device) else torch.float32
        loss_function = stack.enter_context((objective or LanguageModelLoss()).bound(model, dtype))
        stack.enter_context(FasterCpuAttention())
        routing = stack.enter_context(
            route(model, sampler, step=run.step * config.accumulate_steps, only_in_training=True)
        )
        interrupted = stack.enter_context(deferred_interrupt(enabled=resume_dir is not None))
        bar = stack.enter_context(training_bar(run.info(), enabled=progress))
        last_save = time.monotonic()
        while run.progress < 1:
            info = run.one_step(loss_function, routing)
            bar(info)
            if on_step is not None:
                on_step(info)
            if resume_dir is None:
                continue
            due = time.monotonic() - last_save >= config.save_every_minutes * 60
            if due or interrupted() or run.progress >= 1:
                started = time.perf_counter()
                save_state(resume_dir, model, optimizer, trained, run.position(), settings)
                run.seconds += time.perf_counter() - started
                last_save = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
    return AdaptResult(
        steps=run.step,
        tokens=run.tokens,
        seconds=run.seconds,
        losses=tuple(run.losses),
        num_trained=sum(parameter.numel() for parameter in trained.values()),
        first_step=first_step,
    )


class _Run:
    """The loop's state, and one step of it."""

    def __init__(
        self,
        model: nn.Module,
        blocks: torch.Tensor,
        config: AdaptConfig,
        optimizer: torch.optim.Optimizer,
        trained: dict[str, nn.Parameter],
        device: torch.device,
    ) -> None:
        self.model, self.blocks, self.config = model, blocks, config
        self.optimizer, self.trained, self.device = optimizer, trained, device
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.last_seconds = 0.0

    @property
    def tokens(self) -> int:
        return self.step * self.config.tokens_per_step

    @property
    def progress(self) -> float:
        """Used part of the budget, 0 to 1."""
        if self.config.max_tokens is not None:
            return min(1.0, self.tokens / self.config.max_tokens)
        assert self.config.max_minutes is not None
        return min(1.0, self.seconds / (60 * self.config.max_minutes))

    def position(self) -> Position:
        return Position(step=self.step, seconds=self.seconds, losses=self.losses)

    def next_learning_rate(self) -> float:
        config = self.config
        if config.max_tokens is not None:
            return config.learning_rate_at((self.tokens + config.tokens_per_step) / config.max_tokens)
        assert config.max_minutes is not None
        return config.learning_rate_at((self.seconds + self.last_seconds) / (60 * config.max_minutes))

    def one_step(self, loss_function: LossFunction, routing: Routing) -> StepInfo:
        started = time.perf_counter()
        config, count = self.config, self.config.accumulate_steps
        learning_rate = self.next_learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = 0.0
        for micro in range(self.step * count, (self.step + 1) * count):
            # on_step may have run forwards of its own: the map belongs to the step, not to the call
            routing.step = micro
            tokens = self.blocks[batch_rows(len(self.blocks), config.batch_size, micro, config.seed)].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.uses_bf16(self.device)):
                loss = loss_function({"input_ids": tokens})
            value = loss.item()
            if not math.isfinite(value):
                raise DepthKVError(
                    f"expected a finite loss, got {value} in step {self.step + 1} at learning rate "
                    f"{learning_rate:.3g}; try a lower one"
                )
            (loss / count).backward()  # type: ignore[no-untyped-call]
            total += value / count
        norm = nn.utils.clip_grad_norm_(self.trained.values(), config.grad_clip or math.inf).item()
        if not math.isfinite(norm):
            raise DepthKVError(
                f"expected finite gradients, got a norm of {norm} in step {self.step + 1} at learning rate "
                f"{learning_rate:.3g}; try a lower one"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(total)
        self.last_seconds = time.perf_counter() - started
        self.seconds += self.last_seconds
        return self.info(loss=total, learning_rate=learning_rate, grad_norm=norm)

    def info(self, loss: float = math.nan, learning_rate: float = 0.0, grad_norm: float = 0.0) -> StepInfo:
        return StepInfo(
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            progress=self.progress,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
        )


def batch_rows(num_blocks: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Blocks of forward number `step`: a piece of an endless row of permutations, one per epoch.

    Epoch `e`'s permutation is a pure function of `(seed, e)`.
    """
    rows: list[int] = []
    position = step * batch_size
    while len(rows) < batch_size:
        epoch, start = divmod(position, num_blocks)
        order = _permutation(num_blocks, epoch, seed)
        taken = order[start : start + batch_size - len(rows)]
        rows += taken
        position += len(taken)
    return rows


_last_permutation: tuple[tuple[int, int, int], list[int]] | None = None


def _permutation(num_blocks: int, epoch: int, seed: int) -> list[int]:
    global _last_permutation
    key = (num_blocks, epoch, seed)
    if _last_permutation is None or _last_permutation[0] != key:
        order = list(range(num_blocks))
        random.Random(f"depthkv-order:{seed}:{epoch}").shuffle(order)
        _last_permutation = key, order
    return _last_permutation[1]


def _optimizer(trained: dict[str, nn.Parameter], config: AdaptConfig) -> torch.optim.AdamW:
    matrices = [p for p in trained.values() if p.dim() >= 2]
    others = [p for p in trained.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in trained.values())
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=fused
    )


def _check_blocks(model: nn.Module, blocks: torch.Tensor, config: AdaptConfig) -> None:
    if blocks.dim() != 2 or blocks.shape[1] != config.block_size:
        raise DataError(f"expected blocks of {config.block_size} tokens, got a tensor of shape {list(blocks.shape)}")
    if len(blocks) == 0:
        raise DataError("expected at least one block of training text, got none")
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    lowest, highest = int(blocks.min()), int(blocks.max())
    if lowest < 0 or highest >= vocabulary:
        raise DataError(f"expected token ids from 0 to {vocabulary - 1}, got {lowest} to {highest}")


def _settings(
    config: AdaptConfig, sampler: Sampler, objective: Objective | None, blocks: torch.Tensor
) -> dict[str, Any]:
    """What has to be equal for a run to be taken up again."""
    settings = asdict(config)
    del settings["save_every_minutes"]
    settings["sampler"] = repr(sampler)
    settings["objective"] = repr(objective or LanguageModelLoss())
    settings["data"] = hashlib.sha256(blocks.contiguous().numpy().tobytes()).hexdigest()[:16]
    return settings


@contextmanager
def _training_mode(model: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Training mode, with gradients for the trained weights only; both as before on exit."""
    was_training = model.training
    frozen = {id(parameter) for parameter in trained.values()}
    switched = [p for p in model.parameters() if p.requires_grad and id(p) not in frozen]
    for parameter in switched:
        parameter.requires_grad_(False)
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
        for parameter in switched:
            parameter.requires_grad_(True)
