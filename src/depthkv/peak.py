"""The most memory in use during a run."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


def start_peak(device: torch.device) -> int | None:
    """Start to measure the peak anew; the bytes in use now, None where the peak cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count())
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        return sum(torch.cuda.memory_allocated(gpu) for gpu in gpus)
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    # memory that the other arm freed would stay resident, and this arm's use of it would not show
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the highest resident size so far
    except OSError:
        return None
    return _status_bytes("VmRSS")


def read_peak(device: torch.device) -> int | None:
    """The most bytes in use since `start_peak`: allocated by torch on GPUs, resident memory of the process on Linux."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
    return _status_bytes("VmHWM") if device.type == "cpu" else None


def _status_bytes(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
