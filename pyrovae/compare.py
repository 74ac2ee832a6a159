"""One model, every method that fits it, from one start."""

from __future__ import annotations

import copy
import csv
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import pyrovae
from pyrovae.checks import check_positive
from pyrovae.checks_pair import check_pair
from pyrovae.data import DataSet
from pyrovae.infer.log_weights import Structure
from pyrovae.pair import Pair
from pyrovae.train import pick_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "MethodResult", "compare_methods"]


COLORS = ("#33658a", "#d1495b", "#3c9d63", "#8a5fb4")
FILES = ("comparison.json", "comparison.csv", "comparison.png", "densities.png")
Ran = tuple[float, int, list[float], list[float]]  # seconds, iterations, and the trace: seconds and objectives


@dataclass(frozen=True)
class MethodResult:
    """How far one method came. Totals over the data, in nats."""

    method: str
    log_likelihood: float
    """Exact where the pair has ``log_prob``; otherwise estimated by importance sampling."""
    elbo: float | None
    """Of the guide that the method trained; None where it trains none and no exact posterior stands in for it."""
    seconds: float
    iterations: int
    trace_seconds: list[float] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    """The objective as it went: EM's log likelihood, SVI's bound; totals, against ``trace_seconds``."""

    @property
    def gap(self) -> float | None:
        """log likelihood − ELBO = Σ_n KL(q(z_n | x_n) ‖ p(z_n | x_n))."""
        return None if self.elbo is None else self.log_likelihood - self.elbo


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_methods` found."""

    title: str
    num_data: int
    exact: bool
    results: list[MethodResult]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(r.method) for r in self.results) + 2
        kind = "log likelihood" if self.exact else "log evidence (IS)"
        lines = [
            f"{self.title}: {self.num_data} data; totals in nats",
            f"{'method':<{width}}{kind:>18}{'ELBO':>16}{'gap':>12}{'iterations':>12}{'seconds':>10}",
        ]
        for r in self.results:
            elbo, gap = ("–" if v is None else f"{round(v, 4) + 0.0:.4f}" for v in (r.elbo, r.gap))  # no −0
            lines.append(
                f"{r.method:<{width}}{r.log_likelihood:>18.4f}{elbo:>16}{gap:>12}{r.iterations:>12d}{r.seconds:>10.2f}"
            )
        return "\n".join(lines + self.notes)


def compare_methods(
    make: Callable[..., Pair],
    data: DataSet,
    *,
    title: str,
    epochs: int,
    batch_size: int,
    lr: float,
    num_samples: int,
    binarize: bool,
    device: str,
    seed: int,
    folder: Path,
    overwrite: bool,
) -> Comparison:
    """Fit by every method that the pair has, print as it goes, and write tables and pictures into ``folder``.

    The methods: the closed form (``fit_closed_form``); exact EM (``expected_statistics`` and ``maximize``); SVI with
    exact enumeration, where the model enumerates its latents; SVI with an amortized guide (``make(amortized=True)``, or
    the pair's own guide). All start at the same parameters of the model.
    """
    for name, value, integer in (
        ("--epochs", epochs, True),
        ("--batch-size", batch_size, True),
        ("--lr", lr, False),
        ("--num-samples", num_samples, True),
    ):
        check_positive(name, value, integer=integer)
    pick_device(device)
    _check_folder(folder, overwrite)
    x = data.train
    start = make()
    amortizes = "amortized" in inspect.signature(type(start)).parameters
    if amortizes:
        start = make(amortized=False)
    check_pair(start, x, binarize=binarize)
    if start.initialize is not None:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            start.initialize(torch.bernoulli(x) if binarize else x)
    few = x[:2].round() if binarize else x[:2]
    enumerated = Structure.of(start.model, start.guide, (few,), {}).enumerated
    # Without a guide to train, only a pair that can set its guide to the exact posterior has an ELBO.
    exact_guide = enumerated or hasattr(start, "match_guide")

    results: list[MethodResult] = []
    fitted: dict[str, Pair] = {}
    notes: list[str] = []

    def add(method: str, pair: Pair, run: Callable[[Pair], Ran], *, trains_guide: bool = False) -> None:
        _copy_shared(start, pair)
        print(f"{method} ...", flush=True)
        seconds, iterations, trace_seconds, trace = run(pair)
        scored, rows = pair, x
        if pair.log_prob is not None:  # totals to four decimals need more than float32
            scored, rows = copy.deepcopy(pair).double(), x.double()
        scores = pyrovae.evaluate(scored, rows, num_samples=num_samples, binarize=binarize, device=device, seed=seed)
        exact = scores.log_likelihood
        log_likelihood = (scores.log_evidence if exact is None else exact) * len(x)
        elbo = scores.elbo * len(x) if trains_guide or exact_guide else None
        results.append(MethodResult(method, log_likelihood, elbo, seconds, iterations, trace_seconds, trace))
        fitted[method] = pair

    def svi(pair: Pair) -> Ran:
        result = pyrovae.fit(
            pair,
            x,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            binarize=binarize,
            initialize=False,
            device=device,
            seed=seed,
        )
        times = [row["seconds"] for row in result.history]
        return result.seconds, result.steps, times, [row["train_bound"] * len(x) for row in result.history]

    def em(pair: Pair) -> Ran:
        result = pyrovae.fit_em(pair, x, initialize=False, device=device, max_iter=10_000)
        if not result.converged:
            notes.append(f"EM: NOT converged after {result.iterations} iterations")
        times = [result.seconds * i / max(1, len(result.trace) - 1) for i in range(len(result.trace))]
        return result.seconds, result.iterations, times, list(result.trace)

    def closed_form(pair: Pair) -> Ran:
        began = time.perf_counter()
        pair.fit_closed_form(x)  # type: ignore[operator]
        return time.perf_counter() - began, 1, [], []

    plain = {"amortized": False} if amortizes else {}
    if hasattr(start, "fit_closed_form"):
        add("closed form", make(**plain), closed_form)
    if start.maximize is not None:
        add("EM", make(**plain), em)
    if enumerated:
        add("SVI, enumeration", make(**plain), svi)
    if amortizes or not enumerated:
        add("SVI, amortized guide", make(amortized=True) if amortizes else make(), svi, trains_guide=True)

    if enumerated:
        notes.append("Enumeration and EM sum the latents out exactly: their ELBO is the log likelihood.")
    if len(results) == 1:
        notes.append("This pair has no closed form, EM or enumeration to compare with.")
    comparison = Comparison(title, len(x), start.log_prob is not None, results, notes)
    _write(folder, comparison)
    print(comparison, flush=True)
    _draw(folder, comparison, fitted, data)
    return comparison


def _copy_shared(source: Pair, target: Pair) -> None:
    """Give ``target`` every parameter and buffer that it has in common with ``source``."""
    state = target.state_dict()
    state.update({k: v for k, v in source.state_dict().items() if k in state and state[k].shape == v.shape})
    target.load_state_dict(state)


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise FileExistsError(f"--out: expected a folder for the comparison; {folder} is a file. Pass another name.")
    if not overwrite:
        raise FileExistsError(
            f"--out: {folder} exists. Pass --overwrite to replace the comparison in it, or another folder."
        )
    if not (folder / "comparison.json").is_file():
        raise FileExistsError(f"--out: {folder} exists and holds no comparison, so --overwrite leaves it alone.")


def _write(folder: Path, comparison: Comparison) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    rows: list[dict[str, Any]] = [asdict(r) | {"gap": r.gap} for r in comparison.results]
    record = {"title": comparison.title, "num_data": comparison.num_data, "exact": comparison.exact, "results": rows}
    (folder / "comparison.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    columns = ["method", "log_likelihood", "elbo", "gap", "iterations", "seconds"]
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _draw(folder: Path, comparison: Comparison, fitted: dict[str, Pair], data: DataSet) -> None:
    from pyrovae.evaluate import plots

    figures: dict[str, Callable[[], Figure]] = {"comparison": lambda: plot_comparison(comparison)}
    if data.data_dim == 2 and all(plots.has_density(pair, data.train) for pair in fitted.values()):
        figures["densities"] = lambda: plots.plot_densities(fitted, data.train, feature_names=data.feature_names)
    plots.save_figures(figures, folder)


def plot_comparison(comparison: Comparison) -> Figure:
    """Bars of what each method misses, split into likelihood and gap; and the objectives against seconds."""
    from matplotlib.figure import Figure

    results = comparison.results
    best = max(r.log_likelihood for r in results)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [r.method for r in results]
    lost = [best - r.log_likelihood for r in results]
    gaps = [max(r.gap or 0.0, 0.0) for r in results]  # below 0 by rounding or Monte Carlo error
    left.barh(names, lost, height=0.6, color=COLORS[0], label="log likelihood below the best")
    left.barh(names, gaps, height=0.6, left=lost, color=COLORS[1], label="ELBO below the log likelihood (gap)")
    for y, total in enumerate(a + b for a, b in zip(lost, gaps, strict=True)):
        text = "0" if total < 5e-5 else f"{total:.3g}" if total < 1000 else f"{total:,.0f}"
        left.annotate(text, (total, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set_xlim(left=0)
    left.set(xlabel=f"nats, total over {comparison.num_data} data", title="What each method misses")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)

    for result, color in zip(results, COLORS, strict=False):
        if result.trace:
            right.plot(result.trace_seconds, result.trace, label=result.method, color=color, linewidth=1.2)
        else:
            right.axhline(result.log_likelihood, label=result.method, color=color, linestyle="--", linewidth=1)
    values = torch.tensor([v for r in results for v in r.trace[len(r.trace) // 10 :]])
    if len(values):  # the first steps are far below the rest: show what happens after them
        low, high = float(values.quantile(0.05)), max(best, float(values.max()))
        margin = 0.1 * (high - low) or 1.0
        right.set_ylim(low - margin, high + margin)
    right.set_xscale("log")
    right.set(xlabel="seconds", ylabel="objective (nats, total)", title="On the way (SVI: bound on shuffled batches)")
    right.grid(alpha=0.3)
    right.legend(fontsize=8, loc="lower left")
    return figure
