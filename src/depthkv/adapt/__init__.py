"""Training with stochastic KV routing: after it, one model serves every sharing plan (arXiv:2604.22782, section 3)."""

from depthkv.adapt.config import AdaptConfig
from depthkv.adapt.loop import AdaptResult, adapt
from depthkv.adapt.state import discard_state, has_state
from depthkv.adapt.terminal import StepInfo

__all__ = ["AdaptConfig", "AdaptResult", "StepInfo", "adapt", "discard_state", "has_state"]
