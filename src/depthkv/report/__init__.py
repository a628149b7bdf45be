"""Pictures of one run (`pictures`), and one HTML page of what several runs measured (`html`)."""

from depthkv.report.pictures import plot_loss, plot_plan, plot_retention

__all__ = ["plot_loss", "plot_plan", "plot_retention"]
