"""Settings that every test runs under: one thread, no network, a cache folder of its own, a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

# huggingface_hub reads this once, when it is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of the tests; DEPTHKV_TEST_CACHE names a folder to use again, with its downloads."""
    folder = os.environ.get("DEPTHKV_TEST_CACHE") or str(tmp_path_factory.mktemp("depthkv-cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPTHKV_CACHE", folder)
        yield


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whichever worker runs it and in whatever order."""
    torch.manual_seed(0)
    return 0
