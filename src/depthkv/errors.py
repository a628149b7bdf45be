"""Every error that depthkv raises on purpose. The command line prints these in one line and exits with 2."""

__all__ = [
    "CacheMismatchError",
    "CheckpointError",
    "DataError",
    "DepthKVError",
    "KVBudgetError",
    "PlanError",
    "RecipeError",
    "ServerBusyError",
    "ServerStoppedError",
    "UnsupportedModelError",
]


class DepthKVError(ValueError):
    """Base of depthkv's errors; the text has the form "expected X, got Y" and names what was wrong."""


class PlanError(DepthKVError):
    """A sharing plan, or the file that it was read from, is invalid or does not fit the model."""


class UnsupportedModelError(DepthKVError):
    """The model's layers cannot share keys and values, or it cannot be proven that they do so correctly."""


class CacheMismatchError(DepthKVError):
    """A KV cache was made under another plan than the one that now reads it."""


class CheckpointError(DepthKVError):
    """A model, tokenizer or checkpoint cannot be found, read or written."""


class DataError(DepthKVError):
    """Text or tokens are missing, unreadable or too short."""


class KVBudgetError(DepthKVError):
    """A cache that cannot be made small enough for its budget."""


class RecipeError(DepthKVError):
    """A cache recipe, or the file that it was read from, is invalid or cannot be used on the model."""


class ServerBusyError(DepthKVError):
    """A server that takes no further request now."""


class ServerStoppedError(DepthKVError):
    """A server that takes no request any more."""
