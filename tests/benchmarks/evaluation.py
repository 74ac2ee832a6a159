"""Time ``evaluate`` and the other measures, at the sizes of the results page.

python tests/benchmarks/evaluation.py [--device cuda]

A VAE with 50 latents on scikit-learn's digits. Beside ``evaluate`` runs the same estimate by hand in PyTorch, in
turn, with its ratio of medians; the other quantities have no peer, so theirs are seconds, medians of the repeats.
Writes tests/benchmarks/results/DEVICE-evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import machine
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import pyrovae as pv
from pyrovae.evaluation import ALSO

NUM_DATA, NUM_SAMPLES = 1000, 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    device = arguments.device
    x = pv.data.load("digits").train[:NUM_DATA]
    pair = pv.models.VAE(64)
    pv.fit(pair, x, epochs=100, device=device)

    def ours() -> float:
        return pv.evaluate(pair, x, num_samples=NUM_SAMPLES, device=device).log_evidence

    def by_hand() -> float:
        return evidence_by_hand(pair, x, NUM_SAMPLES, torch.device(device))

    assert abs(ours() - by_hand()) < 0.05  # nats: the same estimate
    taken: dict[str, list[float]] = {"pyrovae": [], "by hand": []}
    for _ in range(arguments.repeats):
        for name, run in (("pyrovae", ours), ("by hand", by_hand)):
            taken[name].append(seconds(run))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    ratio = medians["pyrovae"] / medians["by hand"]
    print(f"evaluate, {NUM_DATA:,} digits, {NUM_SAMPLES:,} samples: {medians['pyrovae']:.1f} s, {ratio:.2f} of by hand")

    others: dict[str, float] = {}
    for name, (function, most) in ALSO.items():
        if name == "mixture_scores":  # the pair is no mixture
            continue
        makes_data = name in ("bidirectional_evidence", "simulation_based_calibration")
        args: tuple[Any, ...] = (pair,) if makes_data else (pair, x[:most])
        others[name] = statistics.median(
            seconds(lambda f=function, a=args: f(*a, device=device)) for _ in range(arguments.repeats)
        )
        print(f"{name}, {'its own data' if makes_data else f'{len(args[1])} digits'}: {others[name]:.1f} s", flush=True)

    found = machine(device)
    name = re.sub(r"\W+", "-", found.get("gpu", found["processor"])).strip("-").lower()
    out = Path(__file__).parent / "results" / f"{name}-evaluation.json"
    record = {"machine": found, "evaluate": medians, "ratio": ratio, "seconds": others}
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"In {out}")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def evidence_by_hand(pair: Any, x: Tensor, num_samples: int, device: torch.device) -> float:
    """Return the estimate of ``evaluate``, written for this one model, with the same chunk sizes."""
    pair.to(device)
    total = 0.0
    for rows in x.to(device).split(100):
        q = pair.encoder(rows).base_dist
        found = []
        for _ in range(0, num_samples, 50):
            z = q.loc + q.scale * torch.randn(50, *q.loc.shape, device=device)
            logits = pair.decoder(z).base_dist.logits
            target = rows.expand_as(logits)
            log_p = -binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
            log_p = log_p - 0.5 * z.square().sum(-1)
            log_q = (-0.5 * ((z - q.loc) / q.scale).square() - q.scale.log()).sum(-1)
            found.append((log_p - log_q).double())
        log_w = torch.cat(found)
        total += float((log_w.logsumexp(0) - math.log(len(log_w))).sum())
    pair.to("cpu")
    return total / len(x)


if __name__ == "__main__":
    main()
