"""Training in stages: ordinary fine-tuning, a layer-local start, then the routed stage, each resumable.

With an adapter, what is fine-tuned first stays the full-cache model to the bit, and the adapter is for sharing alone.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthkv.adapt.adapters import LoraSettings, add_adapter
from depthkv.adapt.checkpoints import discard_state, has_state, newest_step
from depthkv.adapt.config import AdaptConfig, trainable_parameters
from depthkv.adapt.examples import Examples
from depthkv.adapt.local import LocalConfig, fit_followers
from depthkv.adapt.objectives import AttentionMatching, Distillation, LanguageModelLoss, Objective
from depthkv.adapt.run import AdaptResult, adapt
from depthkv.adapt.teacher import FrozenTeacher, SelfTeacher, StoredTeacher, Teacher
from depthkv.decoder import find_decoder
from depthkv.errors import DepthKVError
from depthkv.routing import Sampler
from depthkv.samplers import FullCache, default_sampler
from depthkv.sharing import route

__all__ = ["Stages", "StagesResult", "train_in_stages"]

OBJECTIVES = ("lm", "distill", "attention")
ADAPTER_LEARNING_RATE = 3e-3
"""Peak for LoRA, whose weights start at zero."""


_FINETUNE, _ROUTED = _STAGES = ("finetune", "routed")
"""Folders of the stages' checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What `train_in_stages` does beside the routed stage.

    Raises:
        DepthKVError: a value outside its range.
    """

    finetune: float = 0.0
    """Part of the budget for ordinary fine-tuning first."""
    local_steps: int = 0
    """Steps of the layer-local stage (`depthkv.adapt.local`)."""
    lora: LoraSettings | None = None
    """Train an adapter in the routed stage instead of the model's own weights."""
    objective: str = "lm"
    """"lm", "distill" (half the weight on the full-cache model's likeliest tokens) or "attention"."""
    teacher_file: str | None = None
    """For "distill": what `write_teacher` stored, instead of a live teacher."""

    def __post_init__(self) -> None:
        if not 0 <= self.finetune < 1:
            raise DepthKVError(f"expected finetune from 0 to below 1, got {self.finetune!r}")
        if isinstance(self.local_steps, bool) or not isinstance(self.local_steps, int) or self.local_steps < 0:
            raise DepthKVError(f"expected local_steps of at least 0, got {self.local_steps!r}")
        if self.objective not in OBJECTIVES:
            raise DepthKVError(f"expected objective to be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.teacher_file is not None and self.objective != "distill":
            raise DepthKVError(f'expected a stored teacher with objective "distill" only, got {self.objective!r}')
        if self.lora is not None and self.local_steps:
            raise DepthKVError(
                "expected local_steps or an adapter, got both: the local stage changes the base's weights"
            )


@dataclass(frozen=True, kw_only=True)
class StagesResult:
    """What `train_in_stages` did."""

    model: Any
    """The model given, or that with its adapter."""
    routed: AdaptResult
    finetuned: AdaptResult | None
    local_errors: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Of fine-tuning and the routed stage."""
        return self.routed.tokens + (self.finetuned.tokens if self.finetuned is not None else 0)

    @property
    def seconds(self) -> float:
        """Of fine-tuning and the routed stage."""
        return self.routed.seconds + (self.finetuned.seconds if self.finetuned is not None else 0.0)


def train_in_stages(
    model: Any,
    examples: Examples,
    config: AdaptConfig,
    stages: Stages,
    *,
    sampler: Sampler | None = None,
    resume_dir: str | Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
    **arguments: Any,
) -> StagesResult:
    """Run the stages in turn; a run that was stopped goes on in the stage that it was in.

    Args:
        model: a causal language model, trained in place.
        examples: see `adapt`.
        config: of the routed stage, with the budget of fine-tuning and routed stage together.
        stages: what else to do.
        sampler: of the routed stage; None is `default_sampler`.
        resume_dir: a folder for the stages' checkpoints.
        tell: is told what begins.
        **arguments: for `adapt`.

    Raises:
        DepthKVError: as `adapt` and `fit_followers` do.
    """
    folder = None if resume_dir is None else Path(resume_dir)
    sampler = sampler or default_sampler(config.seed, for_adapter=stages.lora is not None)
    finetuned, errors = None, tuple[float, ...]()
    if stages.finetune:
        tell("Fine-tuning with the full cache")
        ordinary = replace(
            _share(config, stages.finetune),
            learning_rate=AdaptConfig(max_tokens=1).learning_rate,
            eval_every=None,
            early_stop=None,
            cache_recipe=None,  # the full cache is as exact as it was
        )
        place = None if folder is None else folder / _FINETUNE
        given = {name: value for name, value in arguments.items() if name != "eval_blocks"}
        finetuned = adapt(model, examples, ordinary, sampler=FullCache(), resume_dir=place, **given)
        config = _share(config, 1 - stages.finetune)
    begun = folder is not None and has_state(folder / _ROUTED)
    if stages.local_steps and not (begun and stages.objective == "lm"):  # a teacher may be a copy of what it leaves
        if not isinstance(examples, torch.Tensor):
            raise DepthKVError("expected packed text for the layer-local stage, got examples")
        tell(f"Layer-local stage of {stages.local_steps} steps")
        device = next(model.parameters()).device
        local = LocalConfig(steps=stages.local_steps)
        errors = fit_followers(model, examples, sampler, local, bf16=config.uses_bf16(device)).errors
    if stages.lora is not None:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = add_adapter(model, stages.lora)
    place = None if folder is None else folder / _ROUTED
    objective = _objective(stages, model)
    tell("Training with stochastic KV routing")
    routed = adapt(model, examples, config, sampler=sampler, objective=objective, resume_dir=place, **arguments)
    return StagesResult(model=model, routed=routed, finetuned=finetuned, local_errors=errors)


def done_steps(resume_dir: Path) -> int | None:
    """Steps of all stages that are in checkpoints of `resume_dir`; None if it holds none."""
    found = [step for stage in _STAGES if (step := newest_step(resume_dir / stage)) is not None]
    return sum(found) if found else None


def discard_stages(resume_dir: Path) -> None:
    """Delete the checkpoints in `resume_dir`, and the folders that are empty then."""
    for stage in _STAGES:
        discard_state(resume_dir / stage)
    for folder in (*(resume_dir / stage for stage in _STAGES), resume_dir):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _objective(stages: Stages, model: nn.Module) -> Objective:
    if stages.objective == "lm":
        return LanguageModelLoss()
    teacher: Teacher
    if stages.teacher_file is not None:
        teacher = StoredTeacher(stages.teacher_file)
    else:
        teacher = SelfTeacher() if stages.lora is not None else FrozenTeacher(model)
    return Distillation(teacher=teacher) if stages.objective == "distill" else AttentionMatching(teacher=teacher)


def _share(config: AdaptConfig, share: float) -> AdaptConfig:
    if config.max_tokens is not None:
        return replace(config, max_tokens=max(1, round(share * config.max_tokens)))
    assert config.max_minutes is not None
    return replace(config, max_minutes=share * config.max_minutes)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will need, from its weights and two forwards and backwards that changed nothing."""

    num_trained: int
    """In the routed stage."""
    num_finetuned: int
    """In the stage before it; 0 if there is none."""
    weight_bytes: int
    gradient_bytes: int
    """Of the stage that trains most, as are the optimizer's."""
    optimizer_bytes: int
    """AdamW's two moments, fp32."""
    activation_bytes: int | None
    """Peak of a forward and backward above the weights; measured on GPUs only."""
    seconds_per_step: float
    num_finetune_steps: int
    """Of a budget in minutes, as many as it should allow; so are the routed stage's."""
    num_routed_steps: int

    @property
    def num_steps(self) -> int:
        return self.num_finetune_steps + self.num_routed_steps

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + (self.activation_bytes or 0)


def estimate(model: Any, blocks: torch.Tensor, config: AdaptConfig, stages: Stages) -> Estimate:
    """Measure one step's time, and count bytes. The model is as before.

    Args:
        model: as for `train_in_stages`, without an adapter; one is added and taken away again.
        blocks: `[blocks, tokens]`.
        config: the settings.
        stages: with `lora`, the routed stage of the adapter is measured.
    """
    finetuned = trainable_parameters(model, find_decoder(model), config.trainable) if stages.finetune else {}
    num_finetuned = sum(p.numel() for p in finetuned.values())
    adapted = add_adapter(model, stages.lora) if stages.lora is not None else model
    try:
        trained = trainable_parameters(adapted, find_decoder(adapted), config.trainable)
        device = next(model.parameters()).device
        bf16 = config.uses_bf16(device)
        cast: AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        sampler = default_sampler(config.seed, for_adapter=stages.lora is not None)
        batch = {"input_ids": blocks[[i % len(blocks) for i in range(config.batch_size)]].to(device)}
        weights = sum(p.numel() * p.element_size() for p in adapted.parameters())
        training, peak = adapted.training, None
        adapted.train()
        with (
            route(adapted, sampler, only_in_training=True, noise=config.noise(find_decoder(adapted).kinds)),
            _objective(stages, adapted).bound(adapted, torch.bfloat16 if bf16 else torch.float32) as loss,
        ):
            for _ in range(2):  # the first one warms up
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                started = time.perf_counter()
                with cast:
                    value = loss(batch)
                value.backward()  # type: ignore[no-untyped-call]
                value.item()
                seconds = time.perf_counter() - started
                if device.type == "cuda":
                    peak = max(0, torch.cuda.max_memory_allocated(device) - weights)
                adapted.zero_grad(set_to_none=True)
        adapted.train(training)
    finally:
        if stages.lora is not None:
            adapted.unload()
    count = sum(p.numel() for p in trained.values())
    most = max(count, num_finetuned)
    seconds *= config.accumulate_steps
    routed = _share(config, 1 - stages.finetune)
    finetune_steps = _steps_within(_share(config, stages.finetune), seconds) if stages.finetune else 0
    return Estimate(
        num_trained=count,
        num_finetuned=num_finetuned,
        weight_bytes=weights,
        gradient_bytes=4 * most,
        optimizer_bytes=8 * most,
        activation_bytes=None if peak is None else max(0, peak - 4 * count),
        seconds_per_step=seconds,
        num_finetune_steps=finetune_steps,
        num_routed_steps=_steps_within(routed, seconds),
    )


def _steps_within(config: AdaptConfig, seconds_per_step: float) -> int:
    """Optimizer steps of the budget of one stage."""
    if config.max_minutes is None:
        return config.num_steps(int(os.environ.get("WORLD_SIZE", "1")))  # of torchrun, before its group exists
    return math.ceil(60 * config.max_minutes / seconds_per_step)  # the step that the clock ends in is finished
