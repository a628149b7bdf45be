"""The settings of a training run: its budget, its learning rates, what trains."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from depthkv.architectures import LayerKind
from depthkv.attention import Noise
from depthkv.compress.noise import recipe_noise
from depthkv.compress.recipe import CacheRecipe
from depthkv.decoder import Decoder
from depthkv.errors import DepthKVError
from depthkv.patches import ADAPTER_SWITCH
from depthkv.plan import SharingPlan

TRAINABLE = ("all", "layers", "attention", "query-output")
DECAYS = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
REPORTERS = ("tensorboard", "trackio", "wandb", "mlflow")


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Settings of `adapt`; exactly one of `max_tokens` and `max_minutes` is the budget.

    The defaults recovered most per training token of all settings that were tried on SmolLM2-135M (docs/results.md).

    Raises:
        DepthKVError: a value outside its range; the error names it.
    """

    max_tokens: int | None = None
    """Training tokens; reproducible to the bit on the same machine."""
    max_minutes: float | None = None
    """Wall-clock minutes of training, without the time that `on_step` takes. The schedule follows the clock, so the
    learning rate always completes its decay."""
    learning_rate: float = 7e-4
    """Peak of the schedule. Found with 135M parameters; larger models want less."""
    cross_layer_prob: float = 0.45
    """Probability that a layer leaves its own KV in a step; used when no sampler is given."""
    seed: int = 0
    """Of the routing maps and of the order of the data."""
    batch_size: int = 1
    """Blocks in one forward; every forward draws a routing map."""
    accumulate_steps: int = 1
    """Forwards in one optimizer step."""
    block_size: int = 512
    """Tokens in one block."""
    warmup_fraction: float = 0.03
    """Part of the budget in which the learning rate rises linearly."""
    decay: str = "linear"
    """Shape of the fall after warm-up: "cosine", "linear", or "constant" for none."""
    final_lr_fraction: float = 0.0
    """Learning rate at the end, as a fraction of `learning_rate`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; None does not clip."""
    trainable: str = "layers"
    """Which weights train: "all", "layers" (all but embeddings, head and final norm), "attention" or "query-output"
    (attention without what makes K and V)."""
    precision: str = "auto"
    """"bf16": autocast over fp32 weights, "fp16": the same with a loss scale (GPUs only), "fp32", or "auto": bf16 where
    the processor has instructions for it."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the layers' norms and MLPs with `torch.compile`: a slow start, then faster steps on a GPU."""
    independent_maps: bool = False
    """In a distributed run each process draws routing maps of its own instead of the same ones."""
    save_every_minutes: float = 10.0
    """Minutes between two saves of the state, where `adapt` has a `resume_dir`."""
    eval_every: int | None = None
    """Optimizer steps between two measurements of the held-out retention curve; the best state is kept at the end."""
    best_mix: tuple[tuple[float, float], ...] = ((1.0, 1.0), (0.5, 1.0), (0.25, 1.0))
    """Pairs (retention, weight): the curve's points, and the mean by which a state is the best."""
    early_stop: int | None = None
    """Stop after so many measurements without a better one."""
    report_to: tuple[str, ...] = ()
    """Where losses go: "tensorboard", "trackio", "wandb" or "mlflow", if they are installed."""
    cache_recipe: CacheRecipe | None = None
    """Train with the noise of its few bits (`depthkv.compress.recipe_noise`)."""

    def __post_init__(self) -> None:
        if (self.max_tokens is None) == (self.max_minutes is None):
            got = "neither" if self.max_tokens is None else "both"
            raise DepthKVError(f"expected one budget, max_tokens or max_minutes, got {got}")
        for name in ("batch_size", "accumulate_steps"):
            _integer(name, getattr(self, name), 1)
        _integer("seed", self.seed, None)
        _integer("block_size", self.block_size, 2)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        for name in ("learning_rate", "max_minutes", "save_every_minutes", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise DepthKVError(f"expected {name} above 0, got {value!r}")
        if not _is_number(self.weight_decay) or self.weight_decay < 0:
            raise DepthKVError(f"expected weight_decay of at least 0, got {self.weight_decay!r}")
        for name in ("warmup_fraction", "final_lr_fraction", "cross_layer_prob"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise DepthKVError(f"expected {name} between 0 and 1, got {value!r}")
        if len(self.betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas):
            raise DepthKVError(f"expected two betas between 0 and 1, got {self.betas!r}")
        for name in ("eval_every", "early_stop"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1)
        if self.early_stop is not None and self.eval_every is None:
            raise DepthKVError("expected eval_every with early_stop, got none")
        if not self.best_mix or not all(0 < r <= 1 and w >= 0 for r, w in self.best_mix):
            raise DepthKVError(f"expected best_mix in pairs of a retention and a weight, got {self.best_mix!r}")
        if not sum(weight for _, weight in self.best_mix) > 0:
            raise DepthKVError("expected a weight above 0 in best_mix, got none")
        for name in self.report_to:
            if name not in REPORTERS:
                raise DepthKVError(f"expected report_to among {', '.join(REPORTERS)}, got {name!r}")
            names = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
            if not any(_is_installed(package) for package in names):
                needed = "depthkv[train]" if name == "tensorboard" else name
                raise DepthKVError(f"expected {name} to be installed (pip install '{needed}'), got none")
        for name, choices in (("trainable", TRAINABLE), ("decay", DECAYS), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise DepthKVError(f"expected {name} to be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.accumulate_steps * self.block_size

    def num_steps(self, world_size: int) -> int:
        """Optimizer steps of so many processes together; without end where the clock ends the run."""
        return 2**40 if self.max_tokens is None else -(-self.max_tokens // (self.tokens_per_step * world_size))

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate when `progress` (0 to 1) of the budget will be used after the step."""
        if progress < self.warmup_fraction:
            # by the clock, the first step's length is unknown: it gets a tenth of the peak rather than nothing
            return self.learning_rate * max(progress / self.warmup_fraction, 0.1)
        rest = (min(progress, 1.0) - self.warmup_fraction) / max(1e-9, 1 - self.warmup_fraction)
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * rest)), "linear": 1 - rest, "constant": 1.0}[self.decay]
        return self.learning_rate * (self.final_lr_fraction + (1 - self.final_lr_fraction) * shape)

    def curve(self, kinds: Sequence[Hashable]) -> tuple[list[SharingPlan], list[float]]:
        """Plans and weights of `best_mix`."""
        plans = [SharingPlan.for_retention(retention, kinds) for retention, _ in self.best_mix]
        return plans, [weight for _, weight in self.best_mix]

    def noise(self, kinds: tuple[LayerKind, ...]) -> Noise | None:
        """Of `cache_recipe`, for `route`."""
        return None if self.cache_recipe is None else recipe_noise(self.cache_recipe, kinds)

    def uses_bf16(self, device: torch.device) -> bool:
        """Whether forward and backward run under bf16 autocast on this device."""
        return self.precision == "bf16" or (self.precision == "auto" and has_fast_bf16(device))


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32: recent GPUs, and CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and bool(check()) for check in checks)


def trainable_parameters(model: nn.Module, decoder: Decoder, trainable: str) -> dict[str, nn.Parameter]:
    """The weights that `AdaptConfig.trainable` selects, by name; those that the caller froze stay out.

    Of a model with an adapter (`depthkv.adapt.adapters`) the adapter trains, whatever `trainable` says.

    Raises:
        DepthKVError: nothing is left to train, or "query-output" on a family with one projection for Q, K and V.
    """
    family = decoder.family
    if hasattr(model, ADAPTER_SWITCH):  # its weights ask for gradients only while it is on
        return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    if trainable == "all":
        modules: list[nn.Module] = [model]
    elif trainable == "layers":
        modules = list(decoder.layers)
    else:
        modules = [decoder.attention(layer) for layer in range(decoder.num_layers)]
    chosen = {id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad}
    if trainable == "query-output":
        if family.fused is not None:
            raise DepthKVError(
                f'expected a model with its own query projection for trainable "query-output", got {family.fused}'
            )
        for module in modules:
            for name in (family.k_proj, family.v_proj, family.k_norm):
                if name is not None:
                    chosen -= {id(parameter) for parameter in getattr(module, name).parameters()}
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    if not parameters:
        raise DepthKVError(f"expected weights to train ({trainable}), got none that require gradients")
    return parameters


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(name: str, value: object, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        at_least = "" if least is None else f" of at least {least}"
        raise DepthKVError(f"expected {name} as an integer{at_least}, got {value!r}")


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # none: a folder of that name, such as runs leave behind
