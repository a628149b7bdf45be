"""How long the ways into depthkv take, as its pages show them, and how many lines their examples have.

    python benchmarks/journeys.py memory trainer research --out docs/raw/product.jsonl
    python benchmarks/journeys.py vllm --vllm .venv-vllm/bin/python --out docs/raw/product.jsonl  # make vllm-env

`memory`: a checkpoint and too little memory. `trainer`: a script of one's own, killed and run again. `vllm`: an export
and a server. `research`: a sampler, a planner rule, an eviction rule, a router, each compared. Times are the clock's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from serving import write_line

ROOT = Path(__file__).resolve().parent.parent
MODEL, TEXT = "builtin:smollm2-135m", "builtin:anarchism"
Steps = list[dict[str, Any]]

TRAINER = """
import sys
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from depthkv import RandomCrossLayer, load
from depthkv.adapt import RoutingCallback
from depthkv.data import resolve_data, split_documents, token_blocks

model, tokenizer, _ = load("builtin:smollm2-135m", dtype="float32")
training, _ = split_documents(resolve_data("builtin:anarchism"))
blocks = token_blocks(training, tokenizer, 256)[:80]
tokenizer.pad_token = tokenizer.eos_token
trainer = Trainer(
    model,
    TrainingArguments(
        "run", max_steps=20, save_steps=5, per_device_train_batch_size=2, bf16=True, report_to="none", use_cpu=True
    ),
    DataCollatorForLanguageModeling(tokenizer, mlm=False),
    [{"input_ids": block} for block in blocks],
    processing_class=tokenizer,
)
trainer.add_callback(RoutingCallback(RandomCrossLayer(cross_layer_prob=0.45)))
trainer.train(resume_from_checkpoint="resume" in sys.argv)
trainer.save_model("trained")
"""


class Journey:
    """Steps in a folder of their own, each with its seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: Steps = []

    @contextlib.contextmanager
    def step(self, name: str, **facts: Any) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.steps.append({"step": name, "seconds": round(time.perf_counter() - started, 1), **facts})
        print(json.dumps(self.steps[-1]), file=sys.stderr, flush=True)

    def depthkv(self, *arguments: str) -> None:
        """A command of the command line; its name and the options that a page would show are the step's name."""
        with self.step(f"depthkv {' '.join(arguments)}"):
            self.python("-m", "depthkv", *arguments)

    def python(self, *arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    @contextlib.contextmanager
    def server(self, name: str, command: list[str], port: int) -> Iterator[None]:
        """Started, and asked for its first answer; the body sees it running."""
        with self.step(f"{name}, until its first answer"):
            with (self.folder / "server.log").open("w", encoding="utf-8") as log:
                server = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
            try:
                _ask(port, server)
            except BaseException:
                os.killpg(server.pid, signal.SIGKILL)
                raise
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(120)


def _ask(port: int, server: subprocess.Popen[bytes], patience: float = 600) -> None:
    """A completion of 16 tokens, as soon as one is to be had."""
    started = time.perf_counter()
    while True:
        if server.poll() is not None or time.perf_counter() - started > patience:
            raise SystemExit(f"the server did not answer; it ended with {server.poll()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as answer:
                model = json.load(answer)["data"][0]["id"]
            body = json.dumps({"model": model, "prompt": "The cache of a layer is", "max_tokens": 16}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=patience) as answer:
                assert json.load(answer)["choices"][0]["text"]
            return
        except OSError:
            time.sleep(0.2)


def memory(journey: Journey, _: argparse.Namespace) -> None:
    journey.depthkv("inspect", MODEL, "--context", "8192", "--memory", "1GiB")
    journey.depthkv("adapt", MODEL, "--data", TEXT, "--out", "adapted", "--minutes", "5")
    options = ["--kv-budget", "12KiB", "--dtype", "bfloat16", "--cost-blocks", "2", "--evaluations", "16"]
    journey.depthkv("plan", "adapted", "--data", TEXT, *options, "--out", "plan.json")
    journey.depthkv("evaluate", "adapted", "--data", TEXT, "--suite", "perplexity", "--plan", "plan.json")
    command = [sys.executable, "-m", "depthkv", "serve", "adapted", "--engine", "embedded", "--port", "8123"]
    with journey.server("depthkv serve adapted", command, 8123):
        pass


def trainer(journey: Journey, _: argparse.Namespace) -> None:
    script = journey.folder / "train.py"
    script.write_text(TRAINER, encoding="utf-8")
    with journey.step("a Trainer and RoutingCallback, killed after its first checkpoint"):
        run = subprocess.Popen([sys.executable, script.name], cwd=journey.folder, stdout=subprocess.DEVNULL)
        while not (journey.folder / "run" / "checkpoint-5" / "trainer_state.json").exists():
            if run.poll() is not None:
                raise SystemExit("the run ended before its first checkpoint")
            time.sleep(0.1)
        run.kill()
        run.wait()
    with journey.step("the same, resumed to its end"):
        journey.python(script.name, "resume")
    journey.depthkv("evaluate", "trained", "--data", TEXT, "--suite", "perplexity", "--retention", "1", ".5")


def vllm(journey: Journey, args: argparse.Namespace) -> None:
    interpreter = args.vllm.absolute()  # resolved it would leave its environment
    journey.depthkv("export", f"{MODEL}-depthkv", "--dtype", "bfloat16", "--out", "half")
    library = interpreter.parent.parent / "lib" / "libiomp5.so"
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = ["env", *([f"LD_PRELOAD={library}"] if library.exists() else []), str(interpreter), "-m"]
    command += ["vllm.entrypoints.openai.api_server", "--model", "half", "--port", "8124"]
    with journey.server("vLLM's server on the export", command, 8124):
        with journey.step("blocks of the cache"), urllib.request.urlopen("http://127.0.0.1:8124/metrics") as answer:
            (blocks,) = set(re.findall(r'num_gpu_blocks="(\d+)"', answer.read().decode()))
        journey.steps[-1]["blocks"] = int(blocks)


EXAMPLES = {
    "a sampler": ("samplers.md", "# Write a sampler", "class NearbyLayer"),
    "a planner rule": ("choose-a-plan.md", "## A rule of your own", "leaders = set(problem.required)"),
    "an eviction rule": ("compose.md", "## Write an eviction rule", "class ValueNorm"),
    "a router": ("adaptive.md", "## Write a router", "class LongPromptsKeepMore"),
}
"""Page, heading, and what is in the block that shows how to write one."""
BEFORE = """
from depthkv import SharingPlan, load, share
from depthkv.architectures import layer_kinds
from depthkv.compress import CacheRecipe
from depthkv.data import named_blocks, resolve_data, split_documents, token_blocks

model, tokenizer, plan = load("builtin:smollm2-135m-depthkv")
kinds = layer_kinds(model.config)
batch = tokenizer("The cache of a layer is", return_tensors="pt")
training, held_out = split_documents(resolve_data("builtin:anarchism"))
"""
"""What the pages have said before."""


def blocks_below(page: str, heading: str) -> list[str]:
    """Python of a section, until the next heading of any level."""
    section = page.partition(f"\n{heading}\n" if page[: len(heading)] != heading else heading)[2]
    return re.findall(r"```python\n(.*?)```", re.split(r"\n#+ ", section)[0], re.DOTALL)


def research(journey: Journey, _: argparse.Namespace) -> None:
    for name, (file, heading, mark) in EXAMPLES.items():
        found = blocks_below((ROOT / "docs" / "how-to" / file).read_text(encoding="utf-8"), heading)
        (example,) = (block for block in found if mark in block)
        lines = sum(bool(line.strip()) for line in example.splitlines())
        names: dict[str, Any] = {"__name__": "__main__"}  # dataclasses look their module up
        exec(BEFORE, names)
        with journey.step(f"{name}, written and compared", lines=lines), contextlib.redirect_stdout(io.StringIO()):
            for block in found:
                exec(block, names)


JOURNEYS: dict[str, Callable[[Journey, argparse.Namespace], None]] = {
    "memory": memory,
    "trainer": trainer,
    "vllm": vllm,
    "research": research,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("journeys", nargs="+", choices=JOURNEYS)
    parser.add_argument(
        "--vllm", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python", help="interpreter with vLLM"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name in args.journeys:
        with tempfile.TemporaryDirectory() as folder:
            journey = Journey(Path(folder))
            JOURNEYS[name](journey, args)
        row = {"run": f"journey {name}", "date": date.today().isoformat(), "steps": journey.steps}
        print(json.dumps(row), flush=True)
        write_line(args.out, row)


if __name__ == "__main__":
    main()
