"""What the training loop shows in the terminal, and what Ctrl-C does there."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_SECONDS_BETWEEN_LINES = 30.0
"""In a log file."""


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What `on_step` is told after each optimizer step."""

    step: int
    """Optimizer steps done, from 1."""
    tokens: int
    """Training tokens so far."""
    seconds: float
    """Time so far, without that spent in `on_step`."""
    progress: float
    """Used part of the budget, 0 to 1."""
    loss: float
    """Of this step, nats per token, under the step's random maps."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""


@contextmanager
def deferred_interrupt(*, enabled: bool) -> Iterator[Callable[[], bool]]:
    """Let the current step finish when Ctrl-C comes, so that a whole state can be saved; a second one is immediate."""
    pressed = False

    def handler(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def training_bar(start: StepInfo, *, enabled: bool) -> Iterator[Callable[[StepInfo], None]]:
    """A function that shows a step on stderr: in a progress bar, or where that is no terminal in a line now and then.

    `start` is where the run stands now.
    """
    if not enabled:
        yield lambda info: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    recent: deque[float] = deque(maxlen=10)
    console = Console(stderr=True, highlight=False)

    def state(info: StepInfo) -> str:
        elapsed = max(1e-9, info.seconds - start.seconds)
        left = elapsed * (1 - info.progress) / max(1e-9, info.progress - start.progress)
        speed = (info.tokens - start.tokens) / elapsed
        return (
            f"{info.tokens:,} tokens  loss {sum(recent) / len(recent):.3f}  {speed:,.0f} tok/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )

    if not (console.is_terminal or console.is_jupyter):
        last_line = time.monotonic()

        def show_line(info: StepInfo) -> None:
            nonlocal last_line
            recent.append(info.loss)
            if info.progress >= 1 or time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                console.print(f"training  step {info.step:,}  {state(info)}", markup=False, soft_wrap=True)

        yield show_line
        return
    # in thousandths: rich's type stubs want whole numbers
    columns = (TextColumn("training"), BarColumn(24), TaskProgressColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=1000, completed=int(1000 * start.progress), state="starting")

        def show(info: StepInfo) -> None:
            recent.append(info.loss)
            bar.update(task, completed=int(1000 * info.progress), state=state(info))

        yield show
