"""Time `pyrovae fit vae` beside other work, with one thread for each core and with the number that fit chooses.

    python tests/benchmarks/threads.py [--loops 4] [--epochs 20]

Starts so many busy loops for each core, as other jobs on a shared machine would be, and prints seconds of training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pyrovae.machine import allowed_threads


def seconds_of_training(epochs: int, *options: str) -> tuple[float, int]:
    """Return the seconds that a run trains, and its number of threads."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "pyrovae", "fit", "vae", "--epochs", str(epochs), "--num-samples", "10"]
        subprocess.run([*command, "--out", str(run), *options], check=True, capture_output=True, env=environment)
        scores = json.loads((run / "scores.json").read_text())
        return scores["training_seconds"], json.loads((run / "config.json").read_text())["fit"]["threads"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loops", type=int, default=4, help="busy loops for each core")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    cores = allowed_threads()
    for loops in (0, arguments.loops * cores):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
        try:
            for name, options in ((f"{cores} threads", ["--threads", str(cores)]), ("chosen", [])):
                seconds, threads = seconds_of_training(arguments.epochs, *options)
                print(f"{loops} busy loops, {name} ({threads}): {seconds:.1f} s", flush=True)
        finally:
            for process in busy:
                process.kill()


if __name__ == "__main__":
    main()
