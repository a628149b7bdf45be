"""Any task of EleutherAI's lm-evaluation-harness under a sharing plan: `python -m depthkv.lm_eval`, or from Python.

Importing this module registers the model "depthkv" in the harness, which knows no others than those registered in its
process. It needs `pip install "depthkv[eval]"`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch

from depthkv.architectures import LayerKind, layer_kinds
from depthkv.checkpoint import load, load_config
from depthkv.errors import DepthKVError
from depthkv.plan import SharingPlan
from depthkv.sharing import check_plan, share

__all__ = ["DepthKVLM"]

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    _MESSAGE = f"expected lm-evaluation-harness 0.4.10 or newer (pip install 'depthkv[eval]'), got: {error}"
    if __name__ == "__main__":
        print(f"depthkv: {_MESSAGE}", file=sys.stderr)
        sys.exit(2)
    raise DepthKVError(_MESSAGE) from error

_PASSED_ON = (
    "max_batch_size max_length truncation logits_cache add_bos_token prefix_token_id softmax_dtype "
    "mixed_precision_dtype think_end_token enable_thinking chat_template_args"
).split()
"""Arguments of HFLM that mean something for a model which is loaded already; it would drop the others silently."""

_OWN = "pretrained plan retention dtype device batch_size trust_remote_code".split()

_Self = TypeVar("_Self", bound="DepthKVLM")

_logger = logging.getLogger(__name__)


class DepthKVLM(HFLM):
    """A model of the harness that shares until it is closed; `model_args` of the harness are its arguments.

    Without `plan` and `retention`, the checkpoint's own plan holds, and the full cache if it has none. The results of
    `simple_evaluate` then name the model and the plan under "config".

    Args:
        pretrained: what `depthkv.load` takes: a hub id, a folder, a .gguf file or `builtin:NAME`.
        plan: a plan file, or a plan.
        retention: keep this share of the layers, evenly spaced, instead of `plan`.
        dtype: as in `depthkv.load`.
        device: as in `depthkv.load`. The harness asks for a GPU by default; without one, the CPU is taken.
        batch_size: sequences in one forward; "auto" (for GPUs) tries out how many of `max_length` tokens fit.
        trust_remote_code: run Python code that comes with the checkpoint.
        options: arguments of the harness's HFLM: max_batch_size, max_length (tokens), truncation, logits_cache,
            add_bos_token, prefix_token_id, softmax_dtype, mixed_precision_dtype, think_end_token, enable_thinking,
            chat_template_args.

    Raises:
        DepthKVError: an unknown argument, or a model or plan that cannot be used.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | None = None,
        plan: str | os.PathLike[str] | SharingPlan | None = None,
        retention: float | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = "auto",
        batch_size: int | str | None = 1,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        self._is_closed = False
        if unknown := sorted(options.keys() - set(_PASSED_ON)):
            raise DepthKVError(f"expected model_args among {', '.join(_OWN + _PASSED_ON)}, got {unknown[0]!r}")
        if pretrained is None:
            raise DepthKVError("expected pretrained=MODEL among the model_args, got none")
        if plan is not None and retention is not None:
            raise DepthKVError("expected plan or retention among the model_args, got both")
        if not re.fullmatch(r"auto(:\d+)?|[1-9]\d*", str(batch_size)):
            raise DepthKVError(f"expected a batch_size of at least 1, auto or auto:N, got {batch_size!r}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise DepthKVError(
                f"expected one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}: each would run every task; "
                "device=auto spreads a model over several GPUs"
            )
        name = os.fspath(pretrained)
        config = load_config(name, trust_remote_code=trust_remote_code)
        kinds = layer_kinds(config)
        chosen = _chosen_plan(plan, retention, kinds)
        model, tokenizer, own = load(
            name, dtype=dtype, device=_available(device or "auto"), trust_remote_code=trust_remote_code
        )
        if chosen is None:
            chosen = SharingPlan.full(len(kinds)) if own is None else own
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)
        self.pretrained = name  # HFLM looks it up on the hub for the results
        self.plan = chosen
        """The plan in force."""
        self._sharing = share(model, chosen)

    @property
    def model(self) -> Any:
        """The model, shared."""
        if self._is_closed:
            raise DepthKVError("expected a DepthKVLM that is in use, got one that was closed")
        return super().model

    def close(self) -> None:
        """Restore the model exactly; nothing can be evaluated after that. Calling it again does nothing."""
        self._sharing.remove()
        self._is_closed = True

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results about the model: HFLM's entries, the name and the plan."""
        return {
            **super().get_model_info(),
            "pretrained": self.pretrained,
            "retention": self.plan.retention,
            "kv_source_layers": list(self.plan.kv_source_layers),
            "kv_bytes_per_token": self.plan.kv_bytes_per_token(self.config, self._model.dtype),
        }


def main() -> int:
    """Run the harness's own command line, which then knows the model "depthkv"; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except DepthKVError as error:
        print(f"depthkv: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("depthkv: interrupted", file=sys.stderr)
        return 130
    return 0


def _chosen_plan(
    plan: str | os.PathLike[str] | SharingPlan | None, retention: float | None, kinds: Sequence[LayerKind]
) -> SharingPlan | None:
    """The plan that the arguments ask for, checked before any weights are read; None leaves the checkpoint's own."""
    if retention is not None:
        return SharingPlan.for_retention(retention, kinds)
    if plan is None or isinstance(plan, SharingPlan):
        found, named = plan, ""
    elif isinstance(plan, (str, os.PathLike)):
        found, named = SharingPlan.load(plan), f"{os.fspath(plan)}: "
    else:
        raise DepthKVError(f"expected plan as a file, got {plan!r}")
    if found is not None:
        try:
            check_plan(found, tuple(kinds))
        except DepthKVError as error:
            raise type(error)(f"{named}{error}") from error
    return found


def _available(device: str) -> str:
    """`device`, or the CPU where there is no GPU at all: the harness's command line says cuda:0 if nothing is given."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        _logger.warning("expected a GPU for device=%s, got none: running on the CPU", device)
        return "cpu"
    return device


if __name__ != "__main__":
    register_model("depthkv")(DepthKVLM)
else:
    # by its own name the class exists once, however often the module is imported from here on
    from depthkv.lm_eval import main as _main

    sys.exit(_main())
