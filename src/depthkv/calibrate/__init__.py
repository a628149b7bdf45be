"""Measurements on a model and text of the user's, from which the planner decides who shares with whom."""

from depthkv.calibrate.run import Calibrator
from depthkv.calibrate.store import Calibration

__all__ = ["Calibration", "Calibrator"]
