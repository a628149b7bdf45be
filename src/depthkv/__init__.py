"""depthkv shrinks the KV cache of transformer language models along the depth axis."""

from depthkv.checkpoint import load
from depthkv.plan import SharingPlan
from depthkv.routing import RandomCrossLayer
from depthkv.sharing import route, share

__version__ = "0.1.0"
__all__ = ["RandomCrossLayer", "SharingPlan", "load", "route", "share"]
