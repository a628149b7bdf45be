"""Runs the benchmarks that two CPU cores can run, one after another, and makes the pages' tables anew.

    make bench                              # or python benchmarks/all.py; goes on where it was stopped
    make bench ARGS=--list                  # what it runs, how long that takes, and what it does not run
    python benchmarks/all.py --adapter      # what depends on the adapter that comes with depthkv
    python benchmarks/all.py --only memory  # by name
    python benchmarks/all.py --quick        # all of them with tiny sizes, into a folder of their own

New rows replace those of the same run in docs/raw only when a benchmark has succeeded. What moved by more than a tenth
is written to docs/raw/moved.jsonl; a word of `why` that is added there stays.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moved
import tables
import torch
from steps import ELSEWHERE, STEPS, Row, Step

from depthkv.machine import environment

ROOT = Path(__file__).resolve().parent.parent
HERE = ("benchmarks/", "tests/")
"""Words of a command that mean a file of the repository: it runs in a folder of its own."""
LAST_LINES = 12
"""Of a failed benchmark's output that are shown."""


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Returns 1 if any benchmark failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[step.name for step in steps], help="only these")
    parser.add_argument("--adapter", action="store_true", help="only what depends on the built-in adapter")
    parser.add_argument("--long", action="store_true", help="those that train, too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; docs stay as they are")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier call has done")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out", help="for logs and the state")
    parser.add_argument("--raw", type=Path, default=ROOT / "docs" / "raw", help="folder of the rows")
    args = parser.parse_args(argv)
    chosen = [step for step in steps if wanted(step, args)]
    if args.list:
        listing(chosen, steps)
        return 0
    out = (args.out / "quick" if args.quick else args.out).resolve()
    raw = args.raw.resolve()
    if args.quick:
        shutil.rmtree(out, ignore_errors=True)
        raw = Path(shutil.copytree(raw, out / "raw"))
    part, again = bool(args.only or args.adapter), bool(args.only)
    run = Run(out, raw, chosen, fresh=args.fresh or args.quick, part=part, again=again, quick=args.quick)
    return run.all(pages=not args.quick and raw == tables.RAW)


def wanted(step: Step, args: argparse.Namespace) -> bool:
    if args.only:
        return step.name in args.only
    return (step.adapter or not args.adapter) and (args.long or args.quick or not step.long)


def listing(chosen: Sequence[Step], steps: Sequence[Step]) -> None:
    for step in chosen:
        print(f"{step.name}: {step.raw}, about {step.seconds / 60:.0f} minutes{', quiet machine' * step.quiet}")
        for command in step.commands:
            print(f"    {typed(command, step.raw)}")
    print(f"{sum(step.seconds for step in chosen) / 60:.0f} minutes in all, roughly\n\nnot run:")
    for step in steps:
        if step not in chosen:
            print(f"    {step.name}: {step.seconds / 60:.0f} minutes, with --only {shlex.quote(step.name)}")
    for name, words in ELSEWHERE.items():
        print(f"    {name}: {words}")


class Run:
    """A call, and what earlier ones have done."""

    def __init__(
        self, out: Path, raw: Path, steps: Sequence[Step], *, fresh: bool, part: bool, again: bool, quick: bool
    ) -> None:
        """`part`: a round that has ended is added to, not begun anew; `again`: whatever has been done."""
        self.out, self.raw, self.steps, self.quick = out, raw, list(steps), quick
        self.state_path, self.before = out / "state.json", out / "before"
        self.state: dict[str, Any] = {"done": {}}
        if self.state_path.exists() and not fresh:
            self.state = json.loads(self.state_path.read_text(encoding="utf-8"))
        self.left = [step for step in self.steps if step.name not in self.state["done"]]
        if fresh or not self.before.exists() or not (self.left or part):
            self.state = {"done": {}}
            shutil.rmtree(self.before, ignore_errors=True)
            shutil.copytree(raw, self.before.with_name("before.part"), dirs_exist_ok=True)
            self.before.with_name("before.part").rename(self.before)
        if again or not self.left:
            self.left = self.steps
            for step in self.steps:
                self.state["done"].pop(step.name, None)
        self.save()

    def save(self) -> None:
        replace(self.state_path, json.dumps(self.state, indent=2) + "\n")

    def all(self, pages: bool) -> int:
        """Runs what is left; `pages`: makes README and docs anew, too."""
        failed: dict[str, str] = {}
        skipped: dict[str, str] = {}
        started = time.perf_counter()
        for number, step in enumerate(self.left):
            missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
            if missing:
                skipped[step.name] = f"pip install {' '.join(missing)}"
                continue
            rest = sum(other.seconds for other in self.left[number:]) / 60
            say(
                f"[{number + 1}/{len(self.left)}] {step.name}: about {step.seconds / 60:.0f} of {rest:.0f} minutes left"
            )
            if step.quiet and not self.quick and (used := used_by_others()) > 0.2:
                say(f"    the machine is busy ({used:.0%} of the processor); times may be off")
            begun = time.perf_counter()
            try:
                self.one(step)
                num_moved = moved.write(self.before, self.raw)
            except Exception as problem:
                failed[step.name] = f"{type(problem).__name__}: {problem}"
                say(f"    failed: {failed[step.name]}")
                continue
            self.state["done"][step.name] = round(time.perf_counter() - begun, 1)
            self.save()
            say(f"    {self.state['done'][step.name]:.0f} s; {num_moved} figures moved so far")
        if pages:
            tables.main([])
        say(f"{len(self.left) - len(failed) - len(skipped)} done, {len(failed)} failed, {len(skipped)} skipped")
        say(f"{(time.perf_counter() - started) / 60:.1f} minutes; logs in {self.out.name}/")
        for words, found in (("skipped", skipped), ("failed", failed)):
            for name, why in found.items():
                say(f"    {words}: {name}: {why}")
        return 1 if failed else 0

    def one(self, step: Step) -> None:
        """Runs a benchmark and puts its rows in place of the earlier ones."""
        folder = self.out / "work" / step.name.replace(":", "").replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        out = folder / ("rows.jsonl" if any("--out {out}" in command for command in step.commands) else "figures.json")
        usage: Row = {}
        for command in step.quick if self.quick else step.commands:
            usage = call(command.replace("{out}", shlex.quote(str(out))), folder, 600 + 4 * step.seconds)
        if step.rows is not None:
            rows = step.rows(folder)
        elif out.suffix == ".jsonl":
            rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        else:
            rows = [json.loads(out.read_text(encoding="utf-8")) | usage]
        if not rows:
            raise ValueError("expected rows, got none")
        origin = {"date": datetime.date.today().isoformat(), "command": typed(step.commands[-1], step.raw)}
        where = {"environment": environment(torch.device("cpu"))}
        made = [where | row | origin | step.row for row in rows]
        merge(self.raw / step.raw, [{k: v for k, v in row.items() if k not in step.drop} for row in made], step.key)
        shutil.rmtree(folder)


def used_by_others(seconds: float = 2) -> float:
    """Share of the processor's time, while nothing runs here; 0 where Linux does not say it."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = []
    for wait_for in (0.0, seconds):
        time.sleep(wait_for)
        ticks.append([int(number) for number in stat.read_text().split("\n", 1)[0].split()[1:]])
    passed = [after - before for before, after in zip(*ticks, strict=True)]
    return 1 - (passed[3] + passed[4]) / max(1, sum(passed[:8]))  # idle and waiting for a disk


def merge(path: Path, rows: Sequence[Row], key: Sequence[str]) -> None:
    """New rows in place of those of the same key, but for a GPU's; the file stays if no table can be made of them."""

    def named(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in key)

    def of_gpu(row: Row) -> bool:
        return "NVIDIA" in row.get("environment", {}).get("device", "")

    old = path.read_text(encoding="utf-8") if path.exists() else ""
    new = {named(row): [other for other in rows if named(other) == named(row)] for row in rows}
    kept: list[Row] = []
    for row in map(json.loads, old.splitlines()):
        if of_gpu(row) or named(row) not in {named(other) for other in rows}:
            kept.append(row)
        else:
            kept += new.pop(named(row), [])
    kept += [row for group in new.values() for row in group]
    replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    try:
        moved.shown(path.parent)
    except Exception:
        replace(path, old)
        raise


def replace(path: Path, text: str) -> None:
    """Writes beside the file, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def call(command: str, folder: Path, limit: float) -> Row:
    """Runs one command in a folder; returns its time and the most memory that it had."""
    words = shlex.split(command)
    if words[0] == "python":
        words = [sys.executable, *(str(ROOT / word) if word.startswith(HERE) else word for word in words[1:])]
    elif words[0] == "depthkv":
        words = [sys.executable, "-m", "depthkv", *words[1:]]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    started = time.perf_counter()
    log = folder.parent.parent / f"{folder.name}.log"
    with log.open("a", encoding="utf-8") as stream:
        print(f"\n$ {command}", file=stream, flush=True)
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a server of its own ends with it
        )
        try:
            status, usage = wait(process.pid, started + limit)
            process.returncode = status  # it was waited for here, for the memory that it had
        finally:
            kill(process.pid)
    if status != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        raise RuntimeError(f"exit code {status} of {shlex.join(words[1:4])}\n" + "\n".join(lines))
    return {"wall_s": round(time.perf_counter() - started, 1), "max_rss_bytes": usage.ru_maxrss * 1024}


def wait(pid: int, until: float) -> tuple[int, Any]:
    """Exit code and resources of a child; one that takes too long is killed."""
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage
        if time.perf_counter() > until:
            kill(pid)
            os.wait4(pid, 0)
            raise TimeoutError("took four times as long as planned, and ten minutes more")
        time.sleep(0.2)


def kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def typed(command: str, raw: str) -> str:
    """As it stands in the rows: without the folder of this machine."""
    return command.replace("--json {out}", "--json figures.json").replace("{out}", f"docs/raw/{raw}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a benchmark that is running ends with this
        signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        sys.exit(130)
