"""Time every case, or those named, and keep the figures: python tests/benchmarks/run.py [--device cuda] [CASE ...]

Writes tests/benchmarks/results/DEVICE.json. Two threads on a CPU, so that figures of different machines compare. The
cases and contenders are those of ``pyrovae bench``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from pyrovae.bench import CASES, machine, run_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="by default all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"unknown cases {sorted(unknown)}; known: {', '.join(CASES)}")
    torch.set_num_threads(2)
    found = machine(arguments.device)
    name = re.sub(r"\W+", "-", found.get("gpu", found["processor"])).strip("-").lower()
    out = Path(__file__).parent / "results" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    for result in run_cases(arguments.cases or None, repeats=arguments.repeats, device=arguments.device, out=out):
        print(f"{result}\n", flush=True)
    print(f"In {out}")


if __name__ == "__main__":
    main()
