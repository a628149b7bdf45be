"""Quality under a sharing plan: perplexity, and the retention curve that it draws."""

from depthkv.evaluate.perplexity import CurveRow, Perplexity, perplexity, retention_curve, spread_blocks

__all__ = ["CurveRow", "Perplexity", "perplexity", "retention_curve", "spread_blocks"]
