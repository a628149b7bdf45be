"""Options that commands share, and checks that run before anything slow does."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedConfig

from depthkv.architectures import LayerKind, layer_kinds, max_positions
from depthkv.checkpoint import adapter_base, builtin_adapter, load_config
from depthkv.cli.output import show
from depthkv.compress.recipe import CacheRecipe
from depthkv.data import BUILTIN_TEXTS, Document, resolve_data, split_documents
from depthkv.errors import DepthKVError
from depthkv.export import lacks_follower_kv
from depthkv.folders import require_replaceable
from depthkv.plan import SharingPlan
from depthkv.sharing import check_plan

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

CURVE_RETENTIONS = (1.0, 0.5, 0.33, 0.25)
"""Retentions of the curve where none are asked for."""


# Values


def count(text: str | int) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def count_or_none(text: str | int) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def seed_value(text: str | int) -> int:
    """A whole number that every generator of random numbers takes, NumPy's old one, too."""
    return _whole(text, 0, 2**32 - 1)


def _whole(text: str | int, least: int, most: int | None = None) -> int:
    try:
        value = int(text)
        if value < least or (most is not None and value > most):
            raise ValueError
    except ValueError:
        of = f" of at least {least}" if most is None else f" from {least} to {most}"
        raise typer.BadParameter(f"expected a whole number{of}, got {text!r}") from None
    return value


def positive(text: str | float) -> float:
    """A number above 0."""
    return _real(text, "a number above 0", lambda value: value > 0)


def not_negative(text: str | float) -> float:
    """A number of at least 0."""
    return _real(text, "a number of at least 0", lambda value: value >= 0)


def probability(text: str | float) -> float:
    """A number from 0 to 1."""
    return _real(text, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def retention_value(text: str | float) -> float:
    """A number above 0 and at most 1."""
    return _real(text, "a number above 0 and at most 1", lambda value: 0 < value <= 1)


def _real(text: str | float, what: str, valid: Callable[[float], bool]) -> float:
    try:
        value = float(text)
        if not math.isfinite(value) or not valid(value):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"expected {what}, got {str(text)!r}") from None
    return value


def dtype_name(text: str) -> str:
    """ "auto" or a name that torch knows."""
    if text != "auto" and text not in DTYPES:
        raise typer.BadParameter(f"expected a dtype among auto, {', '.join(DTYPES)}, got {text!r}")
    return text if text == "auto" else str(DTYPES[text]).removeprefix("torch.")


def json_path(text: str | Path) -> Path:
    """A file that can be written, checked before the work and not after it."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise typer.BadParameter(f"expected a file, got the folder {path}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"expected a file in an existing folder, got {path}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"expected a file that can be written, got {path}")
    return path


def figures_path(text: str | Path) -> Path:
    """As `json_path`, and no file is replaced that holds something else: a text or weights, by a slip."""
    path = json_path(text)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(1) not in (b"", b"{"):
                raise typer.BadParameter(f"expected a new file or one of JSON, got {path}")
    return path


# Options


def option(name: str, parser: Callable[[Any], Any], metavar: str, text: str) -> Any:
    """An option whose value goes through `parser`."""
    return typer.Option(name, parser=parser, metavar=metavar, help=text)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Hub id, folder, .gguf file, builtin:smollm2-135m or builtin:smollm2-135m-depthkv."
    ),
]
Texts = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="DATA",
        help="Text: a file, a folder (its .txt, .md and .jsonl, plain or .gz) or "
        f"{', '.join(f'builtin:{text}' for text in BUILTIN_TEXTS)}. "
        "Repeat it for several.",
    ),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="A plan.json.")]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="A recipe.json: a plan, bits and tokens of its caches."),
]
RecipeFiles = Annotated[
    list[Path] | None, typer.Option("--recipe", metavar="FILE", help="A recipe.json. Repeat it for several.")
]
Retention = Annotated[
    float | None, option("--retention", retention_value, "R", "Keep this share of the layers, evenly spaced.")
]
Retentions = Annotated[
    list[float] | None,
    option("--retention", retention_value, "R...", "Shares of layers to keep, such as 1 .5 .33 .25."),
]
Json = Annotated[Path | None, option("--json", figures_path, "FILE", "Write the figures to this file, too.")]
Dtype = Annotated[str, option("--dtype", dtype_name, "DTYPE", "auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
BatchSize = Annotated[int, option("--batch-size", count, "N", "Blocks in one forward.")]
BlockSize = Annotated[int, option("--block-size", count, "N", "Tokens in one block.")]
Seed = Annotated[int, option("--seed", seed_value, "N", "Of everything random.")]


# Processes


def is_main_process() -> bool:
    """Whether this process is the one that writes, among those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def process_device() -> str:
    """The device of this process."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


# Models, plans and text


@contextmanager
def naming(what: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file or option in question in front of errors that do not name it."""
    try:
        yield
    except DepthKVError as error:
        if os.fspath(what) in str(error):
            raise
        raise type(error)(f"{os.fspath(what)}: {error}") from error


def read_config(model: str) -> tuple[PreTrainedConfig, tuple[LayerKind, ...]]:
    """The config and its layers' kinds; refuses models that cannot share before their weights are read."""
    with naming(model):
        config = load_config(model, progress=show)
        return config, layer_kinds(config)


def read_plan(path: Path, kinds: tuple[LayerKind, ...]) -> SharingPlan:
    """A plan file that fits layers of these kinds."""
    with naming(path):
        plan = SharingPlan.load(path)
        check_plan(plan, kinds)
    return plan


def read_recipe(path: Path, kinds: tuple[LayerKind, ...]) -> CacheRecipe:
    """A recipe file whose plan fits layers of these kinds."""
    with naming(path):
        recipe = CacheRecipe.load(path)
        recipe.check(kinds)
        check_plan(recipe.plan, kinds)
    return recipe


def own_plan(config: PreTrainedConfig) -> SharingPlan | None:
    """The plan that a checkpoint's config carries."""
    sources = getattr(config, "kv_source_layers", None)
    return None if sources is None else SharingPlan(sources)


def refuse_both(plan: object, retention: object) -> None:
    """`--plan` and `--retention` say the same thing in two ways."""
    if plan and retention is not None:
        raise DepthKVError("expected --plan or --retention, got both")


def refuse_beside_recipe(recipe: object, **others: object) -> None:
    """A recipe has a plan of its own; `others` are options by their names, with underscores."""
    for name, value in others.items():
        if recipe and value:
            raise DepthKVError(f"expected --recipe or --{name.replace('_', '-')}, got both")


def choose_plan(
    path: Path | None,
    retention: float | None,
    config: PreTrainedConfig,
    kinds: tuple[LayerKind, ...],
    default: float,
) -> SharingPlan:
    """One plan: the file's, the retention's, the checkpoint's own, or that of `default`, in this order."""
    refuse_both(path, retention)
    if path is not None:
        return require_leaders(read_plan(path, kinds), config, str(path))
    if retention is None and (own := own_plan(config)) is not None:
        return own
    chosen = SharingPlan.for_retention(default if retention is None else retention, kinds)
    return require_leaders(chosen, config, f"--retention {retention}")


def require_leaders(plan: SharingPlan, config: PreTrainedConfig, name: str) -> SharingPlan:
    """The plan, unless an export left out what its leaders need."""
    own = own_plan(config)
    if lacks_follower_kv(config) and own is not None and (lacking := sorted(set(plan.leaders) - set(own.leaders))):
        raise DepthKVError(
            f"{name}: expected leaders among those of this export, {list(own.leaders)}, got layer {lacking[0]}, whose "
            "K and V weights it left out (depthkv export --keep-kv keeps them)"
        )
    return plan


def require_all_weights(config: PreTrainedConfig) -> None:
    """Refuse an export whose followers have no K and V weights."""
    if lacks_follower_kv(config):
        raise DepthKVError("expected a model with all its weights, got an export without followers' K and V")


def require_other_folder(out: Path, model: str) -> None:
    """Refuse an `--out` that cannot be replaced, or that holds MODEL or the base of the adapter that MODEL is."""
    with naming("--out"):
        require_replaceable(out)
        for what, name in (("MODEL", model), ("MODEL's base", adapter_base(builtin_adapter(model)))):
            if name is not None and Path(name).exists() and Path(name).resolve() == out.resolve():
                raise DepthKVError(f"expected another folder than that of {what}, got {out}")


def choose_plans(
    path: Path | None,
    retentions: Sequence[float] | None,
    config: PreTrainedConfig,
    kinds: tuple[LayerKind, ...],
) -> list[SharingPlan]:
    """The plans of a retention curve: the file's, or one per retention, or the usual ones and the checkpoint's own.

    An export without followers' K and V runs under its own only.
    """
    refuse_both(path, retentions)
    if path is not None:
        return [require_leaders(read_plan(path, kinds), config, str(path))]
    if retentions is None and lacks_follower_kv(config):
        return [choose_plan(None, None, config, kinds, default=1.0)]
    plans = [
        require_leaders(SharingPlan.for_retention(r, kinds), config, f"--retention {r:g}")
        for r in (retentions or CURVE_RETENTIONS)
    ]
    own = own_plan(config)
    if retentions is None and own is not None and own not in plans:
        plans.append(own)
    return plans


def require_positions(config: PreTrainedConfig, tokens: int, what: str) -> None:
    """Refuse sequences longer than the model has positions for: many models then fail or write nonsense."""
    most = max_positions(config)
    if most is not None and tokens > most:
        raise DepthKVError(f"expected {what} of at most the {most} positions of the model, got {tokens}")


def split_texts(names: Sequence[str]) -> dict[str, tuple[list[Document], list[Document]]]:
    """Training and held-out documents of each text."""
    found = {}
    for name in dict.fromkeys(names):
        with naming(name):
            found[name] = split_documents(resolve_data(name, progress=show))
    return found


def held_out_documents(name: str, all_text: bool = False) -> list[Document]:
    """The held-out documents of `name`, or all of them."""
    with naming(name):
        documents = resolve_data(name, progress=show)
        return documents if all_text else split_documents(documents)[1]


_READ_OF_A_FOLDER = ("config", "generation_config", "plan", "adapter_config", "tokenizer", "tokenizer_config")
"""JSON files of a checkpoint."""


def keep_inputs(json_file: Path | None, *read: str | Path | Sequence[str | Path] | None) -> None:
    """Refuse to write figures over a file that is read: of those named, and of checkpoints in folders."""
    if json_file is None:
        return
    for given in read:
        for name in [given] if isinstance(given, str | Path) else given or ():
            folder = Path(name).expanduser()
            for file in (folder, *(folder / f"{part}.json" for part in _READ_OF_A_FOLDER)):
                if os.path.realpath(json_file) == os.path.realpath(file):
                    raise DepthKVError(f"--json: expected another file than those that are read, got {json_file}")


def require_different(paths: dict[str, Path | None]) -> None:
    """Refuse options that name the same file."""
    seen: dict[str, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        real = os.path.realpath(path)
        if real in seen:
            raise DepthKVError(f"{name}: expected another file than {seen[real]}, got {path}")
        seen[real] = name
