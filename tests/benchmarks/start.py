"""Time processes that take one compiled step, from start to exit: python tests/benchmarks/start.py [--device cuda]

The first process finds nothing in torch's disk cache; later ones find the program there. Others take an eager step, for
comparison. Writes tests/benchmarks/results/DEVICE-start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import machine

ONE_STEP = """
import pyrovae as pv
x = pv.data.load("digits").train[:128]
pv.fit(pv.models.VAE(64), x, epochs=1, batch_size=128, backend={backend!r}, device={device!r}, progress=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    eager = [process("eager", arguments.device, "") for _ in range(arguments.repeats)]
    with tempfile.TemporaryDirectory() as cache:
        first = process("compiled", arguments.device, cache)
        later = [process("compiled", arguments.device, cache) for _ in range(arguments.repeats)]
    found = machine(arguments.device)
    record = {
        "machine": found,
        "seconds": {
            "eager": statistics.median(eager),
            "compiled, first process": first,
            "compiled, later processes": statistics.median(later),
        },
    }
    for name, seconds in record["seconds"].items():
        print(f"{name}: {seconds:.1f} s")
    name = re.sub(r"\W+", "-", found.get("gpu", found["processor"])).strip("-").lower()
    out = Path(__file__).parent / "results" / f"{name}-start.json"
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"In {out}")


def process(backend: str, device: str, cache: str) -> float:
    """Return the seconds that a process takes, from its start to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"} | ({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {})
    program = ONE_STEP.format(backend=backend, device=device)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
