"""What figures were measured with: versions and hardware, for JSON files and reports."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, the device and the number of threads.

    Args:
        device: where the model is.
    """
    import transformers

    import depthkv

    return {
        "depthkv": depthkv.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """What a report of a bug has to name: packages, Python, the system, the devices."""
    import depthkv

    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    packages = ("transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")
    return {
        "depthkv": depthkv.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: metadata.version(name) for name in packages},
        "system": platform.platform(),
        "devices": ", ".join(device_name(device) for device in devices),
    }


def device_name(device: torch.device) -> str:
    """As its maker calls it, where that can be found out."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if device.type == "cpu" and names else f"{platform.machine()} {device.type.upper()}"
