"""Router files: safetensors with a header that says what the router is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from depthkv.adaptive.learned import LearnedRouter
from depthkv.adaptive.portfolio import PortfolioRouter
from depthkv.adaptive.similarity import SimilarityRouter
from depthkv.architectures import LayerKind
from depthkv.calibrate.store import kind_names
from depthkv.errors import DepthKVError
from depthkv.files import replacing
from depthkv.plan import SharingPlan
from depthkv.sharing import check_plan

__all__ = ["load_router", "save_router"]

FORMAT, VERSION = "depthkv-router", 1

AnyRouter = SimilarityRouter | LearnedRouter | PortfolioRouter


def save_router(path: str | os.PathLike[str], router: AnyRouter, provenance: dict[str, Any] | None = None) -> None:
    """Write a router file: beside the target first, then renamed.

    Raises:
        DepthKVError: a router of another sort, or a file that cannot be written.
    """
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kinds": kind_names(router.kinds),
        "order": list(router.ladder.order) if router.ladder is not None else [],
        "provenance": provenance or {},
    }
    if isinstance(router, SimilarityRouter):
        # infinite weights stand for pairs that cannot share; JSON is only the header
        header |= {"method": "similarity", "threshold": router.threshold}
        tensors = {"weights": router.weights}
    elif isinstance(router, LearnedRouter):
        header |= {"method": "learned", "threshold": router.threshold}
        tensors = {"weights": router.weights, "bias": router.bias}
    elif isinstance(router, PortfolioRouter):
        header |= {
            "method": "portfolio",
            "price": router.price,
            "plans": [list(plan.kv_source_layers) for plan in router.plans],
        }
        tensors = {"weights": router.weights, "center": router.center, "scale": router.scale}
    else:
        raise DepthKVError(f"expected a router that can be saved, got {type(router).__name__}")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = save(tensors, {"depthkv": json.dumps(header, allow_nan=False)})
    with replacing(path, "the router") as temporary:
        temporary.write_bytes(data)


def load_router(path: str | os.PathLike[str], kinds: Sequence[LayerKind]) -> AnyRouter:
    """Read a router file for a model with layers of these kinds; the error names the file.

    Raises:
        DepthKVError: no such file, another format or version, unknown keys, or a router for other layers.
    """
    if os.path.isdir(path):
        raise DepthKVError(f"expected a router file at {path}, got a folder")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DepthKVError(f"expected a router file at {path}, got {reason}") from error
    try:
        header = json.loads(metadata.get("depthkv", "null"), parse_constant=_no_constant)
        return _router(header, tensors, kinds)
    except DepthKVError as error:
        raise DepthKVError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, IndexError, RuntimeError) as error:
        raise DepthKVError(f"{path}: expected a router, got a damaged one ({type(error).__name__}: {error})") from error


def _no_constant(name: str) -> float:
    raise DepthKVError(f"expected numbers, got {name}")


def _similarity(header: dict[str, Any], tensors: dict[str, torch.Tensor], kinds: Sequence[LayerKind]) -> AnyRouter:
    return SimilarityRouter(tensors["weights"], float(header["threshold"]), kinds, header["order"])


def _learned(header: dict[str, Any], tensors: dict[str, torch.Tensor], kinds: Sequence[LayerKind]) -> AnyRouter:
    return LearnedRouter(tensors["weights"], tensors["bias"], kinds, float(header["threshold"]), header["order"])


def _portfolio(header: dict[str, Any], tensors: dict[str, torch.Tensor], kinds: Sequence[LayerKind]) -> AnyRouter:
    plans = [SharingPlan(sources) for sources in header["plans"]]
    parts = (tensors["weights"], tensors["center"], tensors["scale"])
    return PortfolioRouter(plans, *parts, float(header["price"]), kinds, header["order"])


_Make = Callable[[dict[str, Any], dict[str, torch.Tensor], Sequence[LayerKind]], AnyRouter]

_METHODS: dict[str, tuple[_Make, frozenset[str], frozenset[str]]] = {
    "similarity": (_similarity, frozenset({"threshold"}), frozenset({"weights"})),
    "learned": (_learned, frozenset({"threshold"}), frozenset({"weights", "bias"})),
    "portfolio": (_portfolio, frozenset({"price", "plans"}), frozenset({"weights", "center", "scale"})),
}


def _router(header: Any, tensors: dict[str, torch.Tensor], kinds: Sequence[LayerKind]) -> AnyRouter:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DepthKVError(f"expected a file of the format {FORMAT}, got another one")
    if type(header.get("version")) is not int or header["version"] != VERSION:
        raise DepthKVError(f"expected version {VERSION}, got {header.get('version')!r}")
    method = header.get("method")
    if method not in _METHODS:
        raise DepthKVError(f"expected a method among {', '.join(_METHODS)}, got {method!r}")
    make, keys, names = _METHODS[method]
    known = {"format", "version", "kinds", "order", "provenance", "method"} | keys
    if set(header) != known or set(tensors) != names:
        wrong = sorted((set(header) ^ known) | (set(tensors) ^ names))
        raise DepthKVError(f"expected just the keys of a {method} router, got a difference in {wrong[0]!r}")
    if header["kinds"] != kind_names(kinds):
        raise DepthKVError(
            f"expected a router for the {len(kinds)} layers of this model, got one for {len(header['kinds'])} layers"
            + (" of other kinds" if len(header["kinds"]) == len(kinds) else "")
        )
    for name in keys & {"threshold", "price"}:
        if isinstance(header[name], bool) or not isinstance(header[name], (int, float)):
            raise DepthKVError(f"expected a number as {name}, got {header[name]!r}")
    if not isinstance(header["order"], list) or not isinstance(header["provenance"], dict):
        raise DepthKVError("expected a list as order and an object as provenance, got something else")
    for name, tensor in tensors.items():
        # pairs that cannot share have an infinite weight
        valid = tensor.dtype in (torch.float32, torch.float64) and not bool(tensor.isnan().any())
        if not valid or (method != "similarity" and not bool(tensor.isfinite().all())):
            raise DepthKVError(f"expected finite numbers as {name}, got others")
    if method == "portfolio" and not bool((tensors["scale"] > 0).all()):
        raise DepthKVError("expected a scale above 0, got another")
    router = make(header, tensors, kinds)
    for plan in router.plans if isinstance(router, PortfolioRouter) else ():
        check_plan(plan, tuple(kinds))
    return router
