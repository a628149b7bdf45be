"""Stochastic KV routing in Hugging Face's Trainer: a callback for any Trainer, and a Trainer with more.

trainer = SFTTrainer(...)                                    # yours
trainer.add_callback(RoutingCallback(RandomCrossLayer()))    # the two lines: this one, and its import
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from depthkv.adapt.checkpoints import STAGING, seal
from depthkv.adapt.loss import LossFunction, predicted
from depthkv.adapt.objectives import LanguageModelLoss, Objective
from depthkv.attention import Noise
from depthkv.errors import CheckpointError, DepthKVError
from depthkv.evaluate import retention_curve
from depthkv.head import undistributed
from depthkv.plan import SharingPlan
from depthkv.routing import Sampler
from depthkv.samplers import independent
from depthkv.sharing import Routing, route


class RoutingCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Routes the model while a Trainer trains it; in evaluation mode and after training it is as it was.

    The map of a forward is a pure function of the sampler and the number of the step, so a run that was resumed draws
    what it would have drawn, and all ranks draw the same.
    """

    def __init__(self, sampler: Sampler, *, independent_maps: bool = False, noise: Noise | None = None) -> None:
        """
        Args:
            sampler: draws the maps.
            independent_maps: each rank of a distributed run draws maps of its own.
            noise: as for `route`.
        """
        self.sampler = sampler
        self.independent_maps = independent_maps
        self.noise = noise
        self.routing: Routing | None = None

    def attach(self, model: nn.Module, rank: int = 0, world_size: int = 1) -> Routing:
        """Route `model`; `on_train_begin` does it where nobody has."""
        sampler = independent(self.sampler, rank) if self.independent_maps else self.sampler
        # a rank waits for gradients of every weight: none may be left out in a step
        self.routing = route(model, sampler, only_in_training=True, skip_unread=world_size == 1, noise=self.noise)
        return self.routing

    def detach(self) -> None:
        """Put the model back; `on_train_end` does it, and after an exception the caller can."""
        if self.routing is not None:
            self.routing.remove()
            self.routing = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if self.routing is None:
            self.attach(undistributed(model), args.process_index, args.world_size)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if self.routing is not None:
            self.routing.step = state.global_step * args.gradient_accumulation_steps

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self.detach()


class RoutingTrainer(Trainer):
    """A Trainer that routes, minimises any objective, measures retention curves and writes checkpoints safely.

    `evaluate()` gives `eval_loss_100`, `eval_loss_50` and so on, one for each plan, and their mean `eval_mix`, for
    `metric_for_best_model` and `EarlyStoppingCallback`. Without `curve_blocks` it is the Trainer's own.
    """

    # the Trainer sets these without saying of what type they are
    control: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        sampler: Sampler,
        objective: Objective | None = None,
        independent_maps: bool = False,
        noise: Noise | None = None,
        curve_blocks: torch.Tensor | None = None,
        curve_plans: Sequence[SharingPlan] = (),
        curve_weights: Sequence[float] | None = None,
        autocast_dtype: torch.dtype | None = None,
        extra_state: Callable[[], dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: a causal language model.
            args: `TrainingArguments`; with gradient checkpointing, of the non-reentrant kind.
            sampler: draws the routing maps.
            objective: what is minimised; None is the language-model loss.
            independent_maps: each rank draws maps of its own.
            noise: as for `route`.
            curve_blocks: held-out token ids, `[blocks, tokens]`.
            curve_plans: where on the retention curve to measure.
            curve_weights: one for each plan, of `eval_mix`; None weighs them equally.
            autocast_dtype: of forward and loss; None is what `args` says (`bf16`, `fp16`).
            extra_state: goes into each checkpoint's `depthkv.json`.
            **kwargs: the Trainer's own.

        Raises:
            DepthKVError: as many weights as plans were expected.
        """
        if curve_blocks is not None:
            kwargs.setdefault("eval_dataset", curve_blocks)  # the Trainer wants one; `evaluate` knows better
        if args is not None and args.ddp_find_unused_parameters is None:
            # every weight gets a gradient, and the head's is used after the forward that would be searched
            args.ddp_find_unused_parameters = False
        super().__init__(model=model, args=args, **kwargs)
        # labels are counted over the whole step: a mean over tokens, not over batches of different lengths
        self.model_accepts_loss_kwargs = True
        if curve_weights is not None and len(curve_weights) != len(curve_plans):
            raise DepthKVError(f"expected {len(curve_plans)} curve_weights, got {len(curve_weights)}")
        self.objective: Objective = objective or LanguageModelLoss()
        self.curve_blocks, self.curve_plans = curve_blocks, list(curve_plans)
        self.curve_weights = list(curve_weights) if curve_weights is not None else [1.0] * len(self.curve_plans)
        args = self.args
        self._dtype = autocast_dtype or (torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None)
        self._extra_state = extra_state
        self._staging: Path | None = None
        self._bound = ExitStack()
        self._loss_function: LossFunction | None = None
        self.step_losses: list[float] = []
        """Of the forwards of the current optimizer step, on this rank."""
        self.last_grad_norm = math.nan
        self.routing_callback = RoutingCallback(sampler, independent_maps=independent_maps, noise=noise)
        self.add_callback(self.routing_callback)

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.train`; however it ends, the model is as before but for its weights."""
        # before DistributedDataParallel looks which weights train: LoRA's do only while the model is routed
        self.routing_callback.attach(self.model, self.args.process_index, self.args.world_size)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._unbind()
            self.routing_callback.detach()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See `Trainer.compute_loss`."""
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._loss_function is None:
            dtype = self._dtype or torch.float32
            self._loss_function = self._bound.enter_context(self.objective.bound(model, dtype))
        loss = self._loss_function(inputs)
        value = loss.item()
        if not math.isfinite(value):
            raise DepthKVError(self._failure(f"expected a finite loss, got {value}", inputs))
        self.step_losses.append(value)
        if num_items_in_batch is not None:
            ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
            loss = loss * (len(predicted(inputs)[0]) * ranks / num_items_in_batch)
        return loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """See `Trainer.autocast_smart_context_manager`."""
        kind = self.args.device.type
        return torch.autocast(kind, self._dtype or torch.bfloat16, enabled=self._dtype is not None)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.last_grad_norm = math.nan if norm is None else float(norm)
        # fp16's scaler makes infinite gradients on purpose, and skips the step
        if norm is not None and not math.isfinite(self.last_grad_norm) and not self.args.fp16:
            raise DepthKVError(self._failure(f"expected finite gradients, got a norm of {self.last_grad_norm}", {}))
        return norm

    def _failure(self, what: str, inputs: Any) -> str:
        """Save the batch and the map of a step that failed; returns the error's message."""
        step, routing = self.state.global_step + 1, self.routing_callback.routing
        rate = self._get_learning_rate()
        message = f"{what} in step {step} at learning rate {rate:.3g}; try a lower one"
        if not os.path.isdir(self.args.output_dir):
            return message
        maps = [list(plan.kv_source_layers) for plan in routing.last_maps] if routing is not None else []
        folder = Path(self.args.output_dir) / f"failed-step-{step}"
        try:
            folder.mkdir(exist_ok=True)
            record = {"step": step, "learning_rate": rate, "kv_source_layers": maps, "rank": self.args.process_index}
            (folder / "step.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
            tensors = {n: t.detach().cpu().contiguous() for n, t in inputs.items() if isinstance(t, torch.Tensor)}
            save_file(tensors, folder / "batch.safetensors")
        except (OSError, SafetensorError):
            return message  # the loss is what matters
        return f"{message}; its batch and map are in {folder}"

    # Evaluation

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The model unrouted and with its own head, so that it can be shared and measured between two steps."""
        self._unbind()
        with ExitStack() as stack:
            if self.routing_callback.routing is not None:
                stack.enter_context(self.routing_callback.routing.suspended())
            yield

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """See `Trainer.evaluate`."""
        with self.measuring():
            if self.curve_blocks is None or eval_dataset is not None:
                result: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
                return result
            with self.autocast_smart_context_manager():
                rows = retention_curve(
                    undistributed(self.model),
                    self.curve_blocks,
                    self.curve_plans,
                    batch_size=self.args.per_device_eval_batch_size,
                )
        metrics = {f"{metric_key_prefix}_loss_{100 * row.retention:.0f}": row.loss for row in rows}
        total = sum(weight * row.loss for weight, row in zip(self.curve_weights, rows, strict=True))
        metrics[f"{metric_key_prefix}_mix"] = total / sum(self.curve_weights)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, written beside its place, sealed, and renamed."""
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = run / STAGING
        self._unbind()  # with the head's own forward
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._staging = staging
            super()._save_checkpoint(model, trial)
            self._staging = None
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(run / f"checkpoint-{self.state.best_global_step}")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish_checkpoint(staging / name, run / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            full = "No space left" in str(error) or "file write failed" in str(error)
            reason = "no space left on the disk" if full else " ".join(str(error).split())
            raise CheckpointError(f"expected to write the training state to {run}, got {reason}") from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _finish_checkpoint(self, work: Path, target: Path) -> None:
        (work / "training_args.bin").unlink(missing_ok=True)  # pickled, and never read
        self.state.save_to_json(str(work / "trainer_state.json"))  # again: it names the best checkpoint's real place
        seal(work, self._extra_state() if self._extra_state is not None else {})
        if target.exists():  # a damaged one, which was passed over
            shutil.rmtree(target)
        work.replace(target)
        best = self.state.best_model_checkpoint
        rotate_checkpoints(str(target.parent), self.args.save_total_limit, best, use_mtime=False)

    def _unbind(self) -> None:
        self._bound.close()
        self._loss_function = None
