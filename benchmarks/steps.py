"""What benchmarks/all.py runs on a CPU, in this order, and what has to be measured elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One benchmark: commands, and the rows of docs/raw that it replaces."""

    name: str
    commands: tuple[str, ...]
    """As one would type them; `{out}` is where the rows go, or the JSON of a command of depthkv."""
    quick: tuple[str, ...]
    """The same with tiny sizes, to try whether all of it works."""
    raw: str
    """File of docs/raw."""
    key: tuple[str, ...]
    """Fields that say which earlier row a new one replaces."""
    seconds: float
    """That it takes on two quiet cores, roughly."""
    row: Row = field(default_factory=dict)
    """What is added to each row."""
    drop: tuple[str, ...] = ()
    """Large parts of the JSON that no table needs."""
    needs: tuple[str, ...] = ()
    """Modules that depthkv does not need."""
    quiet: bool = False
    """Times are measured: nothing else may run."""
    adapter: bool = False
    """To be run again when the adapter that comes with depthkv has changed."""
    long: bool = False
    """Trains, and gives the same figures on any machine but for rounding: left out without --long."""
    rows: Callable[[Path], list[Row]] | None = None
    """Makes the rows from the files in the working folder, where `{out}` is not enough."""


BASE, ADAPTER = "builtin:smollm2-135m", "builtin:smollm2-135m-depthkv"
FRONT = (
    'python -c "from depthkv import SharingPlan; '
    "SharingPlan.from_leaders(range(15), num_layers=30).save('front.json')\""
)
TINY = "--prompt-tokens 16 --new-tokens 2 --repeats 1"
EVALUATE = f"depthkv evaluate {ADAPTER} --data builtin:anarchism --data builtin:brown --suite perplexity"
FRONT_LOSS = f"depthkv evaluate {ADAPTER} --data builtin:anarchism --suite perplexity --plan front.json"
BLOCKS = "--blocks 1 --block-size 64"
LOAD_QUICK = "--requests 4 --concurrent 2 --prompt-tokens 16 --max-tokens 4 --alone 1"


def bench(name: str, options: str, seconds: float, model: str = BASE, quick: str = "", first: str = "") -> Step:
    before = (first,) if first else ()
    quick = quick or f"{options} {TINY}"
    command = f"depthkv bench {model} --dtype bfloat16 {options}"
    return Step(
        name=f"bench: {name}",
        commands=(*before, f"{command} --json {{out}}"),
        quick=(*before, f"depthkv bench {model} --dtype bfloat16 {quick} --json {{out}}"),
        raw="bench.jsonl",
        key=("run",),
        row={"run": name},
        seconds=seconds,
        quiet=True,
        adapter=model == ADAPTER,
    )


def evaluation(name: str, command: str, seconds: float, first: str = "") -> Step:
    before = (first,) if first else ()
    return Step(
        name=f"evaluate: {name}",
        commands=(*before, f"{command} --json {{out}}"),
        quick=(*before, f"{command} {BLOCKS} --json {{out}}"),
        raw="evaluate.jsonl",
        key=("run",),
        row={"run": name},
        seconds=seconds,
        adapter=True,
    )


def script(name: str, command: str, quick: str, raw: str, seconds: float, key: tuple[str, ...], **more: Any) -> Step:
    commands = tuple((f"python benchmarks/{command} {extra}".rstrip() + " --out {out}",) for extra in ("", quick))
    return Step(
        name=name, commands=commands[0], quick=commands[1], raw=raw, key=key, seconds=seconds, **{"quiet": True} | more
    )


def demo(name: str, options: str, quick: str, seconds: float, **more: Any) -> Step:
    command = f"depthkv demo --out demo {options}".rstrip()
    return Step(
        name=f"demo: {name}",
        commands=(f"{command} --json {{out}}",),
        quick=(f"{command} {quick} --blocks 1 --json {{out}}",),
        raw="demo.jsonl",
        key=("run",),
        row={"run": name},
        drop=("samples",),
        seconds=seconds,
        **more,
    )


def noise(folder: Path) -> list[Row]:
    """Of the two evaluations with a recipe: the loss of the recipe and of its plan."""
    found = []
    for trained, name in (("with noise", "with.json"), ("without", "without.json")):
        figures = json.loads((folder / name).read_text(encoding="utf-8"))
        (recipe,) = (row for row in figures["rows"] if row.get("cache_recipe"))
        layers = recipe["kv_source_layers"]
        plan = next(row for row in figures["rows"] if row is not recipe and row["kv_source_layers"] == layers)
        losses = {"plan_loss": plan["loss"], "recipe_loss": recipe["loss"]}
        tokens = figures.get("provenance", {}).get("tokens")
        found.append({"trained": trained, "tokens": tokens, "recipe_fraction": recipe["cache_fraction"], **losses})
    return found


def noise_commands(tokens: str, blocks: str) -> tuple[str, ...]:
    adapt = f"depthkv adapt {BASE} --data builtin:anarchism --finetune 0 {tokens}"
    evaluate = f"--data builtin:anarchism --recipe r2.json {blocks}"
    return (
        f"depthkv recipe {BASE} --retention .5 --bits 2 --out r2.json",
        f"{adapt} --recipe r2.json --out with",
        f"{adapt} --retention .5 --out without",
        f"depthkv evaluate with {evaluate} --json with.json",
        f"depthkv evaluate without {evaluate} --json without.json",
    )


LM_EVAL = {
    "SmolLM2-135M": f"pretrained={BASE}",
    "SmolLM2-135M, as it is": f"pretrained={BASE},retention=0.5",
    "with the built-in adapter": f"pretrained={ADAPTER},retention=0.5",
}
"""Models of the table in docs/how-to/lm-eval.md, and how the harness is told."""
LM_EVAL_TASKS = (
    "--include_path tests/lm_eval_tasks --tasks depthkv_colours,depthkv_counting,depthkv_passages --batch_size 4"
)


def lm_eval(folder: Path) -> list[Row]:
    """The harness's results, as far as the table shows them."""
    found = []
    for number, name in enumerate(LM_EVAL):
        (path,) = folder.glob(f"{number}_*.json")
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        colours, counting, passages = (results[f"depthkv_{task}"] for task in ("colours", "counting", "passages"))
        row: Row = {"model": name, "leaders": 30 if number == 0 else 15}
        row |= {"colours": [round(colours["acc,none"] * colours["sample_len"]), colours["sample_len"]]}
        right = round(counting["exact_match,first word"] * counting["sample_len"])
        row |= {"counting": [right, counting["sample_len"]], "bits_per_byte": passages["bits_per_byte,none"]}
        found.append(row)
    return found


LM_EVAL_COMMANDS = tuple(
    f"python -m depthkv.lm_eval --model depthkv --model_args {model} {LM_EVAL_TASKS} --output_path {number}.json"
    for number, model in enumerate(LM_EVAL.values())
)

PLAN = f"depthkv plan {BASE} --data builtin:anarchism --retention .5 --dtype bfloat16 --out half.json"
PLAN_QUICK = "--blocks 2 --block-size 16 --cost-blocks 1 --held-out-blocks 2 --evaluations 1 --json {out}"

STEPS = (
    # speed first, while the machine is as cool and as quiet as it will be
    bench("every 2nd", "--retention .5 --repeats 15", 160),
    bench("front half", "--plan front.json --repeats 9", 90, first=FRONT),
    bench("every 4th", "--retention .25 --repeats 9", 100),
    bench("unmerged adapter", "--retention .5 --repeats 7", 90, model=ADAPTER),
    bench(
        "grid",
        "--prompt-tokens 512 2048 --batch-size 1 4 --retention .5 .25 --new-tokens 24 --repeats 3",
        430,
        quick="--prompt-tokens 16 32 --batch-size 1 4 --retention .5 .25 --new-tokens 2 --repeats 1",
    ),
    script(
        "recipes: speed",
        "recipes_speed.py --tokens 512 --new-tokens 32 --repeats 3",
        "--tokens 100 --prompt-tokens 128 --new-tokens 2 --repeats 1",
        "recipes_speed.jsonl",
        130,
        ("prompt_tokens", "batch_size"),
    ),
    script(
        "routers: cost",
        f'router_cost.py {BASE} --label "SmolLM2-135M" --repeats 7',
        "--repeats 1 --prompt-tokens 272 --new-tokens 2",
        "router_cost.jsonl",
        420,
        (),
    ),
    script(
        "training step",
        "train_step.py --steps 7 --batch-size 4",
        "--steps 1 --block-size 16",
        "train_step.jsonl",
        210,
        ("batch_size", "block_size"),
    ),
    script(
        "training step, one block",
        "train_step.py --steps 7 --batch-size 1",
        "--steps 1 --block-size 16",
        "train_step.jsonl",
        80,
        ("batch_size", "block_size"),
    ),
    script("switching", "switching.py", "--repeats 2", "switching.jsonl", 10, ()),
    script("server: load", "serve.py load", LOAD_QUICK, "serve.jsonl", 700, ("run",), adapter=True, needs=("openai",)),
    Step(
        name="plan: time",
        commands=(f"{PLAN} --json {{out}}",),
        quick=(f"{PLAN} {PLAN_QUICK}",),
        raw="plan_time.jsonl",
        key=(),
        drop=("similarity", "cost", "nested", "order", "certainty"),
        seconds=900,
        quiet=True,
    ),
    demo("adapter", "", "", 130, adapter=True, quiet=True),
    demo("train", "--train", "--minutes 0.01", 800, quiet=True),  # what 11 minutes are worth depends on the speed
    # from here on what counts are losses and bytes, and the machine may be busy
    script(
        "server: clients",
        "serve.py client",
        "",
        "serve.jsonl",
        60,
        ("run",),
        adapter=True,
        needs=("openai",),
        quiet=False,
    ),
    script(
        "server: faults",
        "serve_faults.py",
        "--disconnects 2 --malformed 2 --in-flight 2",
        "serve.jsonl",
        160,
        ("run",),
        adapter=True,
        needs=("openai", "schemathesis"),
        quiet=False,
    ),
    script("memory", "memory.py", "--context 64 --batch-size 1", "memory.jsonl", 70, (), quiet=False),
    evaluation("first", f"{EVALUATE} --retention 1 .5 .33 .25", 200),
    evaluation("second", f"{EVALUATE} --retention 1 .5 .33 .25", 200),
    evaluation("front half", FRONT_LOSS, 60, first=FRONT),
    Step(
        name="lm-eval",
        commands=LM_EVAL_COMMANDS,
        quick=LM_EVAL_COMMANDS,
        raw="lm_eval.jsonl",
        key=("model",),
        rows=lm_eval,
        needs=("lm_eval",),
        seconds=120,
        adapter=True,
    ),
    Step(
        name="recipes: trained with noise",
        commands=noise_commands("--tokens 102400", "--blocks 16"),
        quick=noise_commands("--tokens 64 --block-size 64", BLOCKS),
        raw="noise.jsonl",
        key=("trained",),
        rows=noise,
        seconds=800,
        long=True,
    ),
    script(
        "heads: from scratch",
        "heads.py scratch --heads 6 2 1 --tokens 400000",
        "--tokens 4096 --blocks 1",
        "heads.jsonl",
        300,
        ("run",),
        long=True,
        quiet=False,
    ),
    script(
        "heads: SmolLM2",
        "heads.py adapt --kv-heads 1 --tokens 153600 --device cpu --blocks 16",
        "--tokens 512 --blocks 1",
        "heads.jsonl",
        1100,
        ("run",),
        long=True,
        quiet=False,
    ),
)

ELSEWHERE = {
    "gpu.jsonl": "a GPU of 80 GB: the commands stand in docs/results.md, on a GPU",
    "scale.jsonl": "a GPU: benchmarks/scale.py",
    "methods.jsonl": "a GPU, or days: python benchmarks/methods.py --seeds 0 1 2 --out docs/raw/methods.jsonl",
    "scratch.jsonl": "a GPU, or hours: python benchmarks/from_scratch.py --tokens 6000000 --out docs/raw/scratch.jsonl",
    "qa.jsonl": "a GPU and SQuAD's questions: python benchmarks/qa.py",
    "compare.jsonl": "a GPU, SQuAD's questions and python-doc: python benchmarks/compare.py",
    "planner.jsonl": "a GPU and models that were adapted on one: python benchmarks/planner.py",
    "joint.jsonl": "the same models: python benchmarks/joint.py",
    "adaptive.jsonl": "the same models, an hour each: python benchmarks/adaptive.py",
    "elastic.jsonl": "the same models: python benchmarks/elastic.py",
    "vllm.jsonl": "vLLM, in an environment of its own: python benchmarks/vllm_blocks.py",
    "product.jsonl": "half an hour: python benchmarks/product.py import wheel clean coverage",
    "reliability.jsonl": "make fuzz, which checks and times nothing",
    "recipes.jsonl": "a search whose script was not kept",
    "paper.jsonl": "copied from the paper",
}
"""Files of docs/raw that keep their rows, and what measuring them again takes."""
