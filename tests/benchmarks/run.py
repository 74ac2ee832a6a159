"""Time the project and its peers side by side: SVI steps and EM iterations. Takes minutes.

Ratios below 1 say that pyrovae is faster. ``pyrovae bench`` runs this file. Figures are written where --out says; with
--keep, to tests/benchmarks/results/DEVICE.json.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from peers import CASES, machine, run_cases

from pyrovae.checks import check_choice, check_positive, pick_device


def main() -> None:
    parser = argparse.ArgumentParser(prog="pyrovae bench", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases; by default all (see --list)")
    parser.add_argument("--list", action="store_true", help="show the names of the cases")
    parser.add_argument("--repeats", type=int, default=7, help="number of times that each contender is timed, in turn")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="number of torch threads; two by default, so that results of machines compare",
    )
    parser.add_argument("--device", default="auto", help="device: auto (CUDA where there is one), cpu or cuda")
    parser.add_argument("--out", "-o", type=Path, help="path of a .json file for the figures")
    parser.add_argument("--keep", action="store_true", help="write the figures to tests/benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(CASES))
        return
    out = arguments.out
    if out is not None and (out.suffix != ".json" or not out.absolute().parent.is_dir()):
        parser.error(f"--out: expected a .json file in a folder that exists; got {out}")
    try:
        for case in arguments.cases:
            check_choice("CASE", case, CASES)
        check_positive("--repeats", arguments.repeats, integer=True)
        check_positive("--threads", arguments.threads, integer=True)
        device = pick_device(arguments.device).type
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)
    if arguments.keep:
        found = machine(device)
        name = re.sub(r"\W+", "-", found.get("gpu", found["processor"])).strip("-").lower()
        out = Path(__file__).parent / "results" / f"{name}.json"
    for result in run_cases(arguments.cases or None, repeats=arguments.repeats, device=device, out=out):
        print(f"{result}\n", flush=True)
    if out is not None:
        print(f"In {out}")


if __name__ == "__main__":
    main()
