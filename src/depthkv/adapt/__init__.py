"""Training with stochastic KV routing: after it, one model serves every sharing plan (arXiv:2604.22782, section 3)."""

from depthkv.adapt.checkpoints import discard_state, has_state
from depthkv.adapt.config import AdaptConfig
from depthkv.adapt.run import AdaptResult, adapt
from depthkv.adapt.terminal import StepInfo
from depthkv.adapt.trainer import RoutingCallback, RoutingTrainer

__all__ = [
    "AdaptConfig",
    "AdaptResult",
    "RoutingCallback",
    "RoutingTrainer",
    "StepInfo",
    "adapt",
    "discard_state",
    "has_state",
]
