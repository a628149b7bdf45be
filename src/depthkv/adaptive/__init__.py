"""The map of each sequence chosen from its prompt, and memory given back while it is written."""

from depthkv.adaptive.budget import KVBudget
from depthkv.adaptive.ladder import Ladder
from depthkv.adaptive.model import AdaptiveModel, StepReport
from depthkv.adaptive.router import Prompt, Router

__all__ = ["AdaptiveModel", "KVBudget", "Ladder", "Prompt", "Router", "StepReport"]
