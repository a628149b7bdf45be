"""How long `share()` and `remove()` take on a model.

python benchmarks/switching.py --out docs/raw/switching.jsonl
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from depthkv import SharingPlan, load, share
from serving import write_line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, _, _ = load(args.model)
    plan = SharingPlan.every(2, num_layers=model.config.num_hidden_layers)
    on, off = [], []
    for _ in range(args.repeats):
        started = time.perf_counter()
        handle = share(model, plan)
        shared = time.perf_counter()
        handle.remove()
        on.append(shared - started)
        off.append(time.perf_counter() - shared)
    print(f"share() {min(on) * 1000:.2f} ms, remove() {min(off) * 1000:.2f} ms, best of {args.repeats}")
    write_line(args.out, {"model": args.model, "repeats": args.repeats, "share_s": min(on), "remove_s": min(off)})


if __name__ == "__main__":
    main()
