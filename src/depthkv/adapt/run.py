"""`adapt`: one call from a model and blocks of text to a trained model, on Hugging Face's Trainer."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from depthkv.adapt.checkpoints import check_settings, newest_whole
from depthkv.adapt.config import AdaptConfig, trainable_parameters
from depthkv.adapt.cpu_attention import FasterCpuAttention
from depthkv.adapt.examples import EndlessExamples, Examples, check_blocks
from depthkv.adapt.modes import checkpointed, compiled, training_mode
from depthkv.adapt.objectives import LanguageModelLoss, Objective
from depthkv.adapt.terminal import StepInfo, deferred_interrupt, training_bar
from depthkv.adapt.trainer import RoutingTrainer
from depthkv.decoder import find_decoder
from depthkv.errors import DataError, DepthKVError
from depthkv.patches import ADAPTER_SWITCH
from depthkv.routing import RandomCrossLayer, Sampler


@dataclass(frozen=True, kw_only=True)
class AdaptResult:
    """What a training run did; a resumed run counts from its very start."""

    steps: int
    """Optimizer steps."""
    tokens: int
    """Training tokens, of all processes."""
    seconds: float
    """Training time."""
    losses: tuple[float, ...]
    """One per optimizer step, nats per token, under that step's random maps; of this process."""
    num_trained: int
    """Parameters that trained."""
    first_step: int
    """Steps that were done already when this call took up the run; 0 for a fresh one."""
    curves: tuple[dict[str, float], ...] = ()
    """What was measured during training: `step`, `eval_loss_100` ... `eval_mix`."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def adapt(
    model: nn.Module,
    train_examples: Examples,
    config: AdaptConfig,
    *,
    sampler: Sampler | None = None,
    objective: Objective | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    resume_dir: str | Path | None = None,
    eval_blocks: torch.Tensor | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    progress: bool = True,
    warn: Callable[[str], None] = lambda line: None,
) -> AdaptResult:
    """Train `model` in place with stochastic KV routing. Weights that train become fp32 and stay so.

    Routing maps and the order of the data are pure functions of the seed and the step. With a budget in tokens, a run
    that was interrupted or killed and then resumed gives the same weights, to the bit, as one that was not.
    Under `torchrun` or `accelerate launch` each process calls this; batches are split among them.

    Args:
        model: a causal language model of transformers, or one with an adapter from `depthkv.adapt.adapters`.
        train_examples: token ids, `[blocks, config.block_size]`, from `depthkv.data.token_blocks`, or examples for
            `collate`.
        config: the settings and the budget.
        sampler: draws the maps; None is `RandomCrossLayer` with the config's probability and seed.
        objective: what is minimised; None is the plain language-model loss.
        on_step: called after every optimizer step, while the model is routed; its time does not count.
        resume_dir: where checkpoints are written every few minutes, on Ctrl-C and at the end, and taken up from if
            there is one. Delete them with `discard_state` when the trained model is safe.
        eval_blocks: held-out blocks that `config.eval_every` measures.
        collate: makes a batch of a list of examples.
        progress: a progress bar on stderr, or a line every 30 seconds where that is no terminal.
        warn: is told of damaged checkpoints that are passed over.

    Raises:
        DepthKVError: a loss that is not finite (the error names the step), nothing to train, blocks of another size.
        CheckpointError: the state in `resume_dir` belongs to a run with other settings or cannot be written.
        KeyboardInterrupt: Ctrl-C; with a `resume_dir`, after the state was saved.
    """
    if isinstance(train_examples, torch.Tensor):
        check_blocks(model, train_examples, config)
    elif not train_examples:
        raise DataError("expected at least one training example, got none")
    if config.eval_every is not None and eval_blocks is None:
        raise DepthKVError("expected eval_blocks for eval_every, got none")
    sampler = sampler or RandomCrossLayer(cross_layer_prob=config.cross_layer_prob, seed=config.seed)
    decoder = find_decoder(model)
    trained = trainable_parameters(model, decoder, config.trainable)
    if not hasattr(model, ADAPTER_SWITCH):
        model.float()  # fp32 master weights: a bf16 weight would not move by less than 1/256 of itself
    settings = _settings(model, config, sampler, objective, train_examples)
    found = newest_whole(resume_dir, warn) if resume_dir is not None else None
    if found is not None:
        check_settings(found[0], found[1].get("settings"), settings)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # PEFT looks for the base's config at each checkpoint; a built-in model or a .gguf file has none
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        directory = resume_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="depthkv-"))
        arguments = _arguments(config, str(directory), next(iter(trained.values())).device)
        stack.enter_context(training_mode(model, trained))
        stack.enter_context(checkpointed(model, config.gradient_checkpointing))
        stack.enter_context(compiled(decoder, config.compile))
        if not config.gradient_checkpointing:  # a layer that is recomputed in backward would not find the mode again
            stack.enter_context(FasterCpuAttention())
        gpus = [arguments.device] if arguments.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=gpus))  # the Trainer seeds the generators
        run = _Run(config, arguments.world_size, on_step, keeps_state=resume_dir is not None)
        plans, weights = config.curve(decoder.kinds)
        trainer = _Trainer(
            model=model,
            args=arguments,
            sampler=sampler,
            objective=objective,
            independent_maps=config.independent_maps,
            noise=config.noise(decoder.kinds),
            curve_blocks=eval_blocks,
            curve_plans=plans,
            curve_weights=weights,
            autocast_dtype=torch.bfloat16 if config.uses_bf16(arguments.device) else None,
            extra_state=lambda: {"settings": settings, **run.state()},
            train_dataset=EndlessExamples(train_examples, config, arguments.world_size),
            data_collator=collate,
            callbacks=[run],
        )
        trainer.run, run.trainer, trainer.trained = run, trainer, list(trained)
        trainer.remove_callback(PrinterCallback)
        if config.early_stop is not None:
            run.stopper = EarlyStoppingCallback(early_stopping_patience=config.early_stop)
            trainer.add_callback(run.stopper)
        if found is not None:
            run.resume(found[1])
        run.interrupted = stack.enter_context(deferred_interrupt(enabled=resume_dir is not None))
        run.bar = stack.enter_context(training_bar(run.info(), enabled=progress and arguments.process_index == 0))
        first_step = run.step
        if run.progress < 1 or found is None:
            trainer.train(resume_from_checkpoint=str(found[0]) if found is not None else None)
        else:  # a finished run, whose model was not saved elsewhere
            trainer._load_from_checkpoint(_best_of(found[0]))
        if run.interrupted():
            raise KeyboardInterrupt
    return AdaptResult(
        steps=run.step,
        tokens=run.tokens,
        seconds=run.seconds,
        losses=tuple(run.losses),
        num_trained=sum(parameter.numel() for parameter in trained.values()),
        first_step=first_step,
        curves=tuple(run.curves),
    )


def _best_of(checkpoint: Path) -> str:
    """Where the weights are that a finished run ended with."""
    best = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).best_model_checkpoint
    return best if best is not None and Path(best).is_dir() else str(checkpoint)


def _arguments(config: AdaptConfig, directory: str, device: torch.device) -> TrainingArguments:
    measured: dict[str, Any] = {}
    if config.eval_every is not None:
        measured = {
            "eval_strategy": "steps",
            "eval_steps": config.eval_every,
            "save_strategy": "steps",
            "save_steps": config.eval_every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_mix",
            "greater_is_better": False,
        }
    arguments = TrainingArguments(
        output_dir=directory,
        max_steps=config.num_steps(1),  # until the number of processes is known
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=max(config.batch_size, 4),
        gradient_accumulation_steps=config.accumulate_steps,
        max_grad_norm=config.grad_clip or math.inf,
        fp16=config.precision == "fp16",
        use_cpu=device.type == "cpu",
        seed=config.seed % 2**32,
        train_sampling_strategy="sequential",  # the data set knows the order
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(config.report_to) or "none",
        logging_strategy="steps" if config.report_to else "no",
        logging_steps=10,
        save_total_limit=2,
        **{"save_strategy": "no", **measured},
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would be torch's DataParallel
    if arguments.world_size == 1:
        require_trainers_device(device, arguments.device)
    arguments.max_steps = config.num_steps(arguments.world_size)
    return arguments


def require_trainers_device(device: torch.device, trainers: torch.device) -> None:
    """Refuse a model that the Trainer would move to another GPU."""
    if device.type == "cuda" and device != trainers:
        raise DepthKVError(
            f"expected the model on {trainers}, where the Trainer trains, got {device}; "
            f"CUDA_VISIBLE_DEVICES={device.index} makes it the only GPU"
        )


class _Run(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Where a run stands: its clock, its losses, what it shows, and when it saves and ends."""

    trainer: _Trainer
    bar: Callable[[StepInfo], None]
    interrupted: Callable[[], bool]
    stopper: EarlyStoppingCallback | None = None

    def __init__(
        self, config: AdaptConfig, world_size: int, on_step: Callable[[StepInfo], None] | None, keeps_state: bool
    ) -> None:
        self.config, self.on_step, self.keeps_state = config, on_step, keeps_state
        self.tokens_per_step = config.tokens_per_step * world_size
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.curves: list[dict[str, float]] = []
        self._started = 0.0
        self._last_save = time.monotonic()

    def state(self) -> dict[str, Any]:
        state = {"step": self.step, "seconds": self.seconds, "losses": self.losses, "curves": self.curves}
        return state | {"patience": self.stopper.early_stopping_patience_counter if self.stopper is not None else 0}

    def resume(self, header: dict[str, Any]) -> None:
        self.step, self.seconds = header["step"], header["seconds"]
        self.losses, self.curves = list(header["losses"]), list(header["curves"])
        if self.stopper is not None:
            self.stopper.early_stopping_patience_counter = header["patience"]

    @property
    def tokens(self) -> int:
        return self.step * self.tokens_per_step

    @property
    def progress(self) -> float:
        """Used part of the budget, 0 to 1."""
        if self.config.max_tokens is not None:
            return min(1.0, self.tokens / self.config.max_tokens)
        assert self.config.max_minutes is not None
        return min(1.0, self.seconds / (60 * self.config.max_minutes))

    def learning_rate_factor(self, step: int) -> float:
        """Learning rate of step number `step`, from 0, as a fraction of the peak."""
        config = self.config
        if config.max_tokens is not None:
            used = (step + 1) * self.tokens_per_step / config.max_tokens
        else:
            assert config.max_minutes is not None
            # the step that ends now is not in `seconds` yet, and the next one will take as long
            last = time.perf_counter() - self._started if self._started else 0.0
            used = (self.seconds + 2 * last) / (60 * config.max_minutes)
        return config.learning_rate_at(used) / config.learning_rate

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

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        self._rate = self.trainer.optimizer.param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = self.trainer.step_losses
        self.step = state.global_step
        self.losses.append(sum(losses) / len(losses))
        losses.clear()
        self.seconds += time.perf_counter() - self._started
        info = self.info(self.losses[-1], self._rate, self.trainer.last_grad_norm)
        self.bar(info)
        if self.on_step is not None:
            self.on_step(info)
        ends = self._agreed(self.progress >= 1 or self.interrupted(), args)
        if ends:
            control.should_training_stop = True
        due = time.monotonic() - self._last_save >= self.config.save_every_minutes * 60
        if self.keeps_state and (ends or self._agreed(due, args)):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_save = time.monotonic()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.curves.append({"step": state.global_step, **(metrics or {})})

    def _agreed(self, mine: bool, args: Any) -> bool:
        """What any rank says: a rank that stops or saves alone would leave the others waiting."""
        if args.world_size == 1:
            return mine
        flag = torch.tensor(int(mine), device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


class _Trainer(RoutingTrainer):
    """With `AdaptConfig`'s optimizer and learning rates."""

    run: _Run
    trained: list[str]

    def create_optimizer(self, model: Any = None) -> Any:
        """See `Trainer.create_optimizer`."""
        if self.optimizer is None:
            config = self.run.config
            parameters = dict((self.model if model is None else model).named_parameters())
            trained = [parameters[name] for name in self.trained]
            matrices, others = ([p for p in trained if (p.dim() >= 2) == wanted] for wanted in (True, False))
            groups = [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=config.learning_rate,
                betas=config.betas,
                fused=not self.is_fsdp_enabled and all(p.device.type in ("cpu", "cuda", "mps") for p in trained),
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """See `Trainer.create_scheduler`."""
        if self.lr_scheduler is None:
            self._created_lr_scheduler = True
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer, self.run.learning_rate_factor
            )
        return self.lr_scheduler


def _settings(
    model: nn.Module, config: AdaptConfig, sampler: Sampler, objective: Objective | None, examples: Examples
) -> dict[str, Any]:
    """What has to be equal for a run to be taken up again."""
    settings = asdict(replace(config, cache_recipe=None))
    for name in ("save_every_minutes", "report_to"):
        del settings[name]
    if config.cache_recipe is not None:
        settings["cache_recipe"] = config.cache_recipe.figures()
    settings["model"] = f"{type(model).__name__} of {sum(p.numel() for p in model.parameters()):,} parameters"
    settings["sampler"] = repr(sampler)
    settings["objective"] = repr(objective or LanguageModelLoss())
    digest = hashlib.sha256()
    for tensor in [examples] if isinstance(examples, torch.Tensor) else [x["input_ids"] for x in examples]:
        digest.update(tensor.contiguous().numpy().tobytes())
    settings["data"] = digest.hexdigest()[:16]
    return settings
