"""Files of every format that is read, and what can be wrong with them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from transformers import GenerationConfig

from depthkv import SharingPlan
from depthkv.adaptive.files import load_router, save_router
from depthkv.adaptive.similarity import SimilarityRouter
from depthkv.architectures import layer_kinds
from depthkv.calibrate.store import SIMILARITIES, Calibration, kind_names
from depthkv.checkpoint import load, load_config
from depthkv.cli import main
from depthkv.compress import CacheRecipe
from depthkv.data import read_texts
from depthkv.kept_losses import load_losses
from depthkv.qa import read_squad
from depthkv.serve.schema import ChatBody, CompletionBody
from figures import bench, evaluation
from generation_figures import generation_file
from plan_figures import plan_file
from tiny import LAYERS, tiny_checkpoint

DEEP = "[" * 900 + "]" * 900
"""As deep as the JSON parser goes; what walks the value afterwards may not."""

_RAW = {
    "@deep": DEEP,
    "@deeper": "[" * 100_000 + "]" * 100_000,
    "@huge": "9" * 400,
    "@too many digits": "9" * 5000,
    "@float": "1e999",
    "@nan": "NaN",
    "@minus": "-Infinity",
}
"""What json.dumps does not write, by the string that stands for it."""

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308),
    *("", "x", "16", "\ud800", "\0", "a\nb", "[red]", "[/]", "../..", "a" * 5000, [], {}, [[]], [0], [None]),
    *([0] * 4, {"": 0}, {"a": {"b": []}}, ["x", 1], *_RAW),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values below `value`."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


@st.composite
def broken_json(draw: st.DrawFn, valid: Any) -> bytes:
    """`valid` with up to three of its parts changed, as a file may hold it; at times no JSON any more."""
    value = copy.deepcopy(valid)
    twice = False
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(value))
        if not found:
            break
        *above, key = found[draw(st.integers(0, len(found) - 1))]
        holder = value
        for step in above:
            holder = holder[step]
        change = draw(st.sampled_from(("replace", "replace", "replace", "drop", "add", "nest", "double", "twice")))
        if change == "drop":
            del holder[key]
        elif change == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(("x", "", "format", "\ud800", str(key) + "s")))] = copy.deepcopy(
                draw(st.sampled_from(_ODD))
            )
        elif change == "nest":
            holder[key] = draw(st.sampled_from(([holder[key]], {"x": holder[key]})))
        elif change == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif change == "twice":
            twice = True
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(_ODD)))
    if draw(st.integers(0, 19)) == 0:
        value = draw(st.sampled_from(_ODD))
    text = json.dumps(value)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    if twice and text.startswith("{") and len(text) > 2:  # every key twice
        text = text[:-1] + ", " + text[1:]
    return draw(_damaged_bytes(text.encode()))


@st.composite
def _damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    how = draw(st.sampled_from(("not",) * 8 + ("cut", "empty", "bom", "utf-16", "latin", "nul", "noise", "flip")))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "noise":
        return draw(st.binary(max_size=200))
    return {
        "not": data,
        "cut": data[:at],
        "empty": b"",
        "bom": b"\xef\xbb\xbf" + data,
        "utf-16": data.decode().encode("utf-16"),
        "latin": data[:at] + b"\xe9\xff" + data[at:],
        "nul": data[:at] + b"\0" + data[at:],
        "flip": data[:at] + bytes([(data[at] if data else 0) ^ 4]) + data[at + 1 :],
    }[how]


KINDS_OF_FILE = ("file",) * 12 + ("link", "loop", "dangling", "folder", "unnamed")


def put(path: Path, data: bytes, kind: str) -> None:
    """The damaged file, or what is there in its place."""
    if kind == "file":
        path.write_bytes(data)
    elif kind == "link":
        path.with_name("elsewhere").write_bytes(data)
        path.symlink_to("elsewhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file format and what reads it."""

    valid: Any
    """What a valid file holds."""
    name: str
    """Of the file."""
    read: Callable[[Path], object]
    """Given the file's path; may raise `DepthKVError`. What a command does is an exit code."""
    encode: Callable[[bytes], bytes] = lambda data: data
    """JSON to what the file holds."""


def command(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def targets(folder: Path) -> dict[str, Target]:
    """All of them; `folder` takes what the files belong to."""
    checkpoint = tiny_checkpoint(folder / "model")
    shared = tiny_checkpoint(folder / "shared", SharingPlan.every(2, LAYERS))
    config_file = checkpoint / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    kinds = layer_kinds(load_config(checkpoint))
    plan = SharingPlan.every(2, LAYERS, kinds)
    recipe = CacheRecipe(plan=plan, key_bits=(8, 4), tokens=128, group_size=16)

    router_file = folder / "router.safetensors"
    router = SimilarityRouter(torch.ones(LAYERS, LAYERS), 0.5, kinds, [3, 2])
    save_router(router_file, router)
    with safe_open(str(router_file), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = json.loads(file.metadata()["depthkv"])

    def with_header(data: bytes) -> bytes:
        return to_safetensors(tensors, {"depthkv": data.decode(errors="replace")})

    losses = {"format": "depthkv-x", "version": 1, "fingerprint": "f", "losses": {"a": [1.0, 2.0]}}
    answers = [{"text": "w3", "answer_start": 6}]
    paragraph = {"context": "w1 w2 w3", "qas": [{"id": "1", "question": "w4", "answers": answers}]}
    squad = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}
    adapter = {
        "base_model_name_or_path": str(checkpoint),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    body = {"model": "m", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "stop": ["x"], "kv_retention": 0.5}

    def beside(name: str, at: Path) -> Callable[[Path], Any]:
        """A checkpoint in which one file is the damaged one."""

        def read(path: Path) -> Any:
            for file in at.iterdir():
                if file.name != name:
                    (path.parent / file.name).symlink_to(file)
            return load(path.parent)

        return read

    def request(kind: Any) -> Callable[[Path], object]:
        def read(path: Path) -> object:
            try:
                return kind.model_validate_json(path.read_bytes())
            except (OSError, pydantic.ValidationError):
                return None

        return read

    def report(path: Path) -> object:
        return command("report", path, "--out", path.parent / "out.html")

    def figures_of(value: Any) -> Target:
        return Target(valid=value, name="figures.json", read=report)

    out = "out.json"
    return {
        "plan": Target(valid=plan.to_dict(), name="plan.json", read=SharingPlan.load),
        "recipe": Target(valid=recipe.to_dict(), name="recipe.json", read=CacheRecipe.load),
        "calibration": Target(valid=_calibration(folder, kinds), name="calibration.json", read=Calibration.load),
        "losses": Target(valid=losses, name="l.json", read=lambda p: load_losses(p, "x", "depthkv-x", "f", 2)),
        "router": Target(valid=header, name="r.safetensors", read=lambda p: load_router(p, kinds), encode=with_header),
        "questions": Target(valid=squad, name="squad.json", read=read_squad),
        "text": Target(valid={"text": "w1 w2 w3"}, name="text.jsonl", read=read_texts),
        "completion request": Target(
            valid={**body, "prompt": "w1", "stream": False}, name="b.json", read=request(CompletionBody)
        ),
        "chat request": Target(
            valid={**body, "messages": [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]},
            name="b.json",
            read=request(ChatBody),
        ),
        "inspect: config": Target(
            valid=config,
            name="config.json",
            read=lambda p: command("inspect", p, "--memory", "1GiB", "--json", p.parent / out),
        ),
        "inspect: plan": Target(
            valid=plan.to_dict(),
            name="plan.json",
            read=lambda p: command("inspect", config_file, "--plan", p, "--json", p.parent / out),
        ),
        "inspect: recipe": Target(
            valid=recipe.to_dict(),
            name="recipe.json",
            read=lambda p: command("inspect", config_file, "--recipe", p, "--json", p.parent / out),
        ),
        "inspect: adapter": Target(
            valid=adapter,
            name="adapter_config.json",
            read=lambda p: command("inspect", p.parent, "--json", p.parent / out),
        ),
        "recipe: plan": Target(
            valid=plan.to_dict(),
            name="plan.json",
            read=lambda p: command("recipe", config_file, "--plan", p, "--bits", 8, "--out", p.parent / out),
        ),
        "load: config": Target(
            valid=json.loads((shared / "config.json").read_text(encoding="utf-8")),
            name="config.json",
            read=beside("config.json", shared),
        ),
        "load: plan": Target(
            valid=json.loads((shared / "plan.json").read_text(encoding="utf-8")),
            name="plan.json",
            read=beside("plan.json", shared),
        ),
        "load: generation config": Target(
            valid=GenerationConfig(eos_token_id=2).to_diff_dict(),
            name="generation_config.json",
            read=beside("generation_config.json", shared),
        ),
        "report: evaluation": figures_of(evaluation()),
        "report: bench": figures_of(bench()),
        "report: plan": figures_of(plan_file(6)),
        "report: generation": figures_of(generation_file(2, 6, 12)),
    }


def _calibration(folder: Path, kinds: Any) -> dict[str, Any]:
    """As a run writes it: two layers can read the first of their kind."""
    matrix: list[list[float | None]] = [[0.5 if j < i else None for j in range(LAYERS)] for i in range(LAYERS)]
    found = Calibration(
        fingerprint="f",
        kinds=kind_names(kinds),
        block_documents=["a", "b"],
        block_size=32,
        similarity=dict.fromkeys(SIMILARITIES, matrix),
        similarity_heads={"key_cka": [matrix]},
        full_losses=[3.0, 3.5],
        cost_losses={1: {0: [3.0, 3.5]}, 2: {0: [3.0, 3.5], 1: [3.0, 3.5]}},
        plan_losses={(0, 0, 2, 2): [3.1, 3.6]},
        searches={"x": 1},
        seconds={"costs": 1.5},
    )
    found.save(folder / "calibration.json")
    read: dict[str, Any] = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    return read
