"""Annealed importance sampling: the log evidence from the model alone, without trust in the guide.

A guide that misses a mode, or whose tails are too light, makes the importance-sampled evidence too low, and the stated
error does not show it. Here chains start at the model's own prior and move to the posterior. On data simulated from the
model the same chains also run backwards, from an exact posterior sample, and bound the evidence from above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

from pyrovae.checks import check_positive, not_a_pair
from pyrovae.evaluation import measurement
from pyrovae.evaluation.importance_sampling import MeanWeight, stderr_over_data
from pyrovae.evaluation.measurement import NotApplicable, Result, not_applicable, prepared, progress_bar, seeded
from pyrovae.evaluation.scores import errors_in_words, importance_scores
from pyrovae.evaluation.sites import blank_data, drawn_data, per_datum, unobserve
from pyrovae.infer.record import recorded_or_itself
from pyrovae.infer.weights import PARTICLES, LogWeightTerms, log_weights_of_traces, same_random_state, sample_sites
from pyrovae.pair import Pair

__all__ = ["AnnealedEvidence", "BidirectionalEvidence", "annealed_evidence", "bidirectional_evidence"]

TARGET_ACCEPTANCE = 0.65  # Wu et al. 2017
PILOT_SHARE, PILOT_LEAST = 4, 50  # the pilot runs through a quarter of the temperatures, or 50
PILOT_GAIN = 0.25  # change of log step size for a unit of acceptance; times the root of the number of chains, at most 1
STEP_JITTER = 0.5
SCHEDULE_STEEPNESS = 4.0
CALLS_WORTH_RECORDING, CALLS_WORTH_COMPILING = 500, 3000
UNEVEN_SHARE = 4  # notes say so where fewer than a quarter of the chains count


@dataclass(frozen=True, repr=False, eq=False)
class _Annealing(Result):
    num_data: int
    num_chains: int
    num_temperatures: int
    num_leapfrog: int
    acceptance: float
    """Share of Hamiltonian proposals accepted."""
    effective_sample_size: float
    """(Σ_k w)² / Σ_k w² of the K forward chains: its mean over data."""
    notes: list[str]
    """Reasons why these numbers do not mean what they usually do."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, for JSON; the values of each datum are among them."""
        return {**super().to_dict(), **{n: v.tolist() for n, v in vars(self).items() if isinstance(v, Tensor)}}

    def _lines(self, data: str, rows: list[tuple[str, float, str]]) -> list[str]:
        counts = {"chain": self.num_chains, "temperature": self.num_temperatures, "step": self.num_leapfrog}
        settings = ", ".join(f"{count} {unit}{'s' * (count > 1)}" for unit, count in counts.items())
        lines = [f"{name:<24}{value:>12.3f}  {note}".rstrip() for name, value, note in rows]
        lines.append(f"{'acceptance':<24}{self.acceptance:>12.2f}")
        lines.append(f"{'effective chains':<24}{self.effective_sample_size:>12.1f}  of {self.num_chains}")
        head = f"{self.num_data} {data}, {settings}; nats per datum"
        return [head, *lines]


@dataclass(frozen=True, repr=False, eq=False)
class AnnealedEvidence(_Annealing):
    """Evidence that :func:`annealed_evidence` measured. Nats per datum, unless said otherwise."""

    log_evidence: float
    """mean_n log 1/K Σ_k w_kn: in expectation a lower bound of the log evidence."""
    log_evidence_stderr: float | None
    """Monte Carlo standard error for these very data, by the delta method over chains; None with one chain."""
    log_evidence_stderr_data: float | None
    """Standard error of ``log_evidence`` as an estimate for the population that the data were drawn from."""
    log_evidence_per_datum: Tensor
    """(N,), float64."""
    by_importance: float | None = None
    """Log evidence of the same data by importance sampling from the guide, where :func:`evaluate` measured both."""

    def _table(self) -> list[str]:
        errors = errors_in_words(self.log_evidence_stderr, self.log_evidence_stderr_data)
        rows = [("log evidence, annealed", self.log_evidence, f"{errors}; in expectation a lower bound".lstrip("; "))]
        if self.by_importance is not None:
            rows.append(("log evidence, guide", self.by_importance, "by importance sampling, of the same data"))
        return self._lines("data", rows)


@dataclass(frozen=True, repr=False, eq=False)
class BidirectionalEvidence(_Annealing):
    """Bounds that :func:`bidirectional_evidence` measured on data drawn from the model. Nats per datum."""

    lower: float
    """Mean over data of the forward chains' bound: in expectation below the log evidence."""
    lower_stderr: float | None
    """Its Monte Carlo standard error for these data, by the delta method over chains; None with one chain."""
    upper: float
    """Mean over data of the reverse chains' bound: in expectation above the log evidence. The chains of a datum share
    their start, so ``gap_stderr`` is the only measure of its error."""
    gap: float
    """upper − lower: in expectation it bounds how far either is from the truth."""
    gap_stderr: float | None
    """Standard error of ``gap``, over data; None with one datum."""
    lower_per_datum: Tensor
    """(N,), float64."""
    upper_per_datum: Tensor
    """(N,), float64. By chance it lies below ``lower_per_datum`` for some data."""
    guide: float
    """The same data's log evidence by importance sampling from the guide. If it lies below ``lower``, the guide misses
    mass."""
    guide_stderr: float | None
    """Its Monte Carlo standard error; None with one sample. It does not show mass that the guide misses."""
    num_guide_samples: int
    log_likelihood: float | None
    """Exact log p(x), where the pair has ``log_prob``."""

    def _table(self) -> list[str]:
        rows = [("log evidence, upper", self.upper, "in expectation; its error is that of the gap")]
        if self.log_likelihood is not None:
            rows.append(("log likelihood, exact", self.log_likelihood, ""))
        samples = f"{self.num_guide_samples} sample{'s' * (self.num_guide_samples > 1)} each"
        rows += [
            ("log evidence, lower", self.lower, f"{errors_in_words(self.lower_stderr)}; in expectation".lstrip("; ")),
            ("gap", self.gap, errors_in_words(None, self.gap_stderr)),
            ("log evidence, guide", self.guide, f"{errors_in_words(self.guide_stderr)}, {samples}".lstrip(", ")),
        ]
        return self._lines("simulated data", rows)


def annealed_evidence(
    pair: Pair,
    x: Tensor,
    *,
    num_temperatures: int = 500,
    num_chains: int = 16,
    num_leapfrog: int = 10,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> AnnealedEvidence:
    """Estimate the log evidence by annealed importance sampling from the prior (Neal 2001), without the guide.

    Chains move through f_β(z) = p(z) p(x | z)^β, from β_0 = 0 to β_T = 1. With z_0 ~ p(z), and z_t from a transition
    that leaves f_{β_t} invariant,

        log w = Σ_{t=1..T} (β_t − β_{t−1}) log p(x | z_{t−1}),    E[w] = p(x),

    so log 1/K Σ_k w_k is in expectation a lower bound, which tightens as T and K grow. Transitions are Hamiltonian, on
    all continuous latents of a datum jointly, unconstrained (``biject_to``); discrete latents that the model marks
    ``infer={"enumerate": "parallel"}`` are summed out. Temperatures are sigmoidal (Wu et al. 2017).

    Step sizes, one for each datum and temperature, come from a pilot run that adapts them towards an acceptance of
    0.65; units of length are the prior's standard deviations. Both are then fixed, because E[w] = p(x) fails where
    they are adapted to the chains that are weighed. Each transition draws its own share of the step size, 0.5 to 1.5,
    so that no orbit returns to where it began (Neal 2011).

    Time grows with T · K · N · ``num_leapfrog``; memory does not grow with N.

    Args:
        pair: the model; its guide is not used.
        x: data, shape (N, D).
        num_temperatures: T, steps from prior to posterior.
        num_chains: K, independent chains a datum.
        num_leapfrog: gradients a transition.
        binarize, device, seed, progress: as in :func:`pyrovae.evaluate`.

    Raises:
        NotApplicable: the pair has no continuous latent (its evidence is then exact), a latent outside the ``data``
            plate, or a discrete one that is not marked for enumeration.
        TypeError, ValueError: bad data or options, before work starts.

    References:
        Neal (2001), Annealed importance sampling.
        Neal (2011), MCMC using Hamiltonian dynamics, section 3.2.
        Wu, Burda, Salakhutdinov and Grosse (2017), On the quantitative analysis of decoder-based generative models.
    """
    settings = _Settings(num_chains, num_temperatures, num_leapfrog)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        with same_random_state():
            latents = Latents(pair, poutine.trace(pair.model).get_trace(x[:2]))
        forward = _anneal(latents, x, None, settings, progress)[0]
    return AnnealedEvidence(
        **_common_fields(settings, forward),
        log_evidence=float(forward.log_mean.mean()),
        log_evidence_stderr=forward.stderr,
        log_evidence_stderr_data=stderr_over_data(forward.log_mean),
        log_evidence_per_datum=forward.log_mean,
    )


def bidirectional_evidence(
    pair: Pair,
    num_data: int = 100,
    *,
    num_temperatures: int = 500,
    num_chains: int = 16,
    num_leapfrog: int = 10,
    num_guide_samples: int = 1000,
    data_dim: int | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> BidirectionalEvidence:
    """Bound the log evidence from both sides, on data drawn from the model (Grosse, Ghahramani and Adams 2015).

    Draw z*, x ~ p(z) p(x | z): then z* is an exact sample of p(z | x). Forward chains are those of
    :func:`annealed_evidence`. Reverse chains start at z* and go from β = 1 to 0 with the same step sizes; their weights
    have E[w] = 1 / p(x), so −log 1/K Σ_k w_k is in expectation an upper bound. A small ``gap`` shows that these
    settings are enough for data such as the model's own; for real data that is a good sign, and no proof.

    Args:
        pair: the model; its guide is used for ``guide`` only.
        num_data: N, data to draw.
        num_temperatures, num_chains, num_leapfrog, device, seed, progress: as in :func:`annealed_evidence`.
        num_guide_samples: importance samples from the guide a datum.
        data_dim: features of a datum, for a pair that does not say.

    Raises:
        NotApplicable: as in :func:`annealed_evidence`; or the model does not observe ``x`` as one site.
        TypeError, ValueError: bad options, before work starts.

    References:
        Grosse, Ghahramani and Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.
    """
    settings = _Settings(num_chains, num_temperatures, num_leapfrog)
    check_positive("num_data", num_data, integer=True)
    check_positive("num_guide_samples", num_guide_samples, integer=True)
    if not isinstance(pair, Pair):
        raise TypeError(not_a_pair(pair))
    latents, x, exact, seed = _simulate(pair, num_data, data_dim, seed)
    with prepared(pair, x, device=device, seed=seed) as x, torch.no_grad():
        forward, reverse = _anneal(latents, x, exact.to(x.device), settings, progress)
    scores = importance_scores(pair, x, num_samples=num_guide_samples, device=device, seed=seed + 1, progress=progress)
    lower, upper = forward.log_mean, -reverse.log_mean
    return BidirectionalEvidence(
        **_common_fields(settings, forward) | {"acceptance": (forward.acceptance + reverse.acceptance) / 2},
        lower=float(lower.mean()),
        lower_stderr=forward.stderr,
        upper=float(upper.mean()),
        gap=float((upper - lower).mean()),
        gap_stderr=stderr_over_data(upper - lower),
        lower_per_datum=lower,
        upper_per_datum=upper,
        guide=scores.log_evidence,
        guide_stderr=scores.log_evidence_stderr,
        num_guide_samples=scores.num_samples,
        log_likelihood=scores.log_likelihood,
    )


@dataclass(frozen=True)
class _Settings:
    num_chains: int
    num_temperatures: int
    num_leapfrog: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_positive(name, value, integer=True)
        if self.num_temperatures == 1:
            raise ValueError("num_temperatures: expected 2 or more; got 1, with no step between prior and posterior.")


class _Weights(MeanWeight):
    """Weights of chains, from log w of shape (K, N)."""

    def __init__(self, log_w: Tensor, acceptance: float) -> None:
        super().__init__(log_w)
        self.acceptance = acceptance
        self.stderr = float(self.variance.sum().sqrt()) / log_w.shape[1] if len(log_w) > 1 else None


def _common_fields(settings: _Settings, forward: _Weights) -> dict[str, Any]:
    """Return the fields that both results have."""
    effective, count = float(forward.effective.mean()), settings.num_chains
    note = f"of {count} chains effectively {effective:.1f} count: the bound is loose, and its Monte Carlo error too "
    notes = [f"{note}small; raise num_temperatures"] if count > 1 and effective < count / UNEVEN_SHARE else []
    found = {"num_data": len(forward.log_mean), "acceptance": forward.acceptance, "notes": notes}
    return {**asdict(settings), **found, "effective_sample_size": effective}


@torch.no_grad()
def _simulate(pair: Pair, num_data: int, data_dim: int | None, seed: int) -> tuple[Latents, Tensor, Tensor, int]:
    """Draw x and its latents from the model; return the layout of the latents, x, u, and a seed for the chains."""
    blank = blank_data(pair, num_data, data_dim)
    with seeded(seed):
        trace = poutine.trace(unobserve(pair.model)).get_trace(blank)
        seed = int(torch.randint(2**31, ()))  # chains must not start from the noise that made x
    latents = Latents(pair, trace)
    observed = {name: site["value"] for name, site in drawn_data(trace).items()}
    shapes = {name: tuple(value.shape) for name, value in observed.items()}
    if list(shapes.values()) != [tuple(blank.shape)]:
        reason = f"to draw data it needs one observed site, of shape {tuple(blank.shape)}; it observes {shapes}."
        raise not_applicable("bidirectional_evidence", pair, reason)
    return latents, *observed.values(), latents.pack(trace), seed


# Annealing ---------------------------------------------------------------------------------------------------------


def _anneal(
    latents: Latents, x: Tensor, exact: Tensor | None, settings: _Settings, progress: bool | None
) -> list[_Weights]:
    """Return the weights of forward chains, and of reverse ones from ``exact`` posterior samples, (1, N, dim)."""
    num_chains, num_temperatures = settings.num_chains, settings.num_temperatures
    density = Density(latents)
    try:
        size = _chunk_size(density, x, num_chains)
    except NotImplementedError as error:
        raise latents.inapplicable(str(error).rstrip(".")) from error
    num_chunks = math.ceil(len(x) / size)
    size = math.ceil(len(x) / num_chunks)
    # All chunks have one size, so that one record serves all: the last is filled up with rows that are then dropped.
    chunks = (torch.arange(num_chunks * size, device=x.device) % len(x)).split(size)

    betas = _schedule(num_temperatures).to(x)
    pilot = _schedule(max(num_temperatures // PILOT_SHARE, PILOT_LEAST)).to(x)
    nearest = torch.linspace(0, len(pilot) - 1, len(betas), device=x.device).round().long()
    directions = 1 if exact is None else 2
    total = num_chunks * (len(pilot) + directions * (num_temperatures - 1))
    value, gradient = _recorded_density(density, x[chunks[0]], num_chains, calls=total * settings.num_leapfrog)

    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(directions)]
    with progress_bar("anneal", progress, total=total, unit="step") as bar:
        for rows in chunks:
            start = density.draw(x[rows], num_chains)
            scale = start.flatten(0, 1).std(0, correction=0)
            scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
            chains = _Chains(value, gradient, x[rows], settings.num_leapfrog, bar.update, scale)
            steps = chains.adapt(start, pilot)[nearest]
            found[0].append(chains.run(density.draw(x[rows], num_chains), betas, steps))
            if exact is not None:
                start = exact[:, rows].repeat(num_chains, 1, 1)
                found[1].append(chains.run(start, betas.flip(0), steps.flip(0)))
    columns = [tuple(zip(*parts, strict=True)) for parts in found]
    return [_Weights(torch.cat(w, 1)[:, : len(x)].cpu(), float(torch.stack(a).mean())) for w, a in columns]


def _schedule(num_temperatures: int) -> Tensor:
    """Return β_0 = 0, ..., β_T = 1 along a sigmoid, dense at both ends (Wu et al. 2017), float64."""
    s = torch.linspace(-SCHEDULE_STEEPNESS, SCHEDULE_STEEPNESS, num_temperatures + 1, dtype=torch.float64).sigmoid()
    return (s - s[0]) / (s[-1] - s[0])


@dataclass
class _Chains:
    """Hamiltonian chains of one chunk of data, (chains, data, dim)."""

    value: Callable
    gradient: Callable
    x: Tensor
    num_leapfrog: int
    tick: Callable[[], Any]
    scale: Tensor  # (dim,), unit of length of each dimension

    def adapt(self, u: Tensor, betas: Tensor) -> Tensor:
        """Run chains from u, and return step sizes, (temperatures, data), that follow their acceptance."""
        step = torch.full_like(u[0, :, 0], u.shape[-1] ** -0.25)
        prior, likelihood = self.value(u, self.x)
        gain = min(1.0, PILOT_GAIN * len(u) ** 0.5)
        steps = []
        for beta in betas.unbind():
            steps.append(step)
            u, prior, likelihood, acceptance = self._transition(u, prior, likelihood, beta, step)
            step = step * (gain * (acceptance.mean(0) - TARGET_ACCEPTANCE)).exp()
        return torch.stack(steps)

    def run(self, u: Tensor, betas: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Run chains from u through ``betas``; return log w, (chains, data) float64, and the mean acceptance."""
        prior, likelihood = self.value(u, self.x)
        differences = betas.double().diff()
        log_w = differences[0] * likelihood.double()
        total = torch.zeros_like(differences[0])
        for t in range(1, len(betas) - 1):
            u, prior, likelihood, acceptance = self._transition(u, prior, likelihood, betas[t], steps[t])
            log_w = log_w + differences[t] * likelihood.double()
            total = total + acceptance.double().mean()
        return log_w, total / max(len(betas) - 2, 1)

    def _transition(
        self, u: Tensor, prior: Tensor, likelihood: Tensor, beta: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run one trajectory (half drift, kick, drift, ..., kick, half drift), and accept or reject it."""
        self.tick()
        jitter = 1 + STEP_JITTER * (2 * torch.rand_like(prior) - 1)
        epsilon = (jitter * step).unsqueeze(-1) * self.scale
        v = torch.randn_like(u)
        energy = prior + beta * likelihood - 0.5 * v.square().sum(-1)
        q = u + 0.5 * epsilon * v
        for i in range(1, self.num_leapfrog + 1):
            v = v + epsilon * self.gradient(q, self.x, beta)
            q = torch.addcmul(q, epsilon, v, value=1.0 if i < self.num_leapfrog else 0.5)
        new_prior, new_likelihood = self.value(q, self.x)
        change = new_prior + beta * new_likelihood - 0.5 * v.square().sum(-1) - energy
        acceptance = change.clamp(max=0).exp().nan_to_num(nan=0.0)
        accept = torch.rand_like(acceptance) < acceptance
        return (
            torch.where(accept.unsqueeze(-1), q, u),
            torch.where(accept, new_prior, prior),
            torch.where(accept, new_likelihood, likelihood),
            acceptance,
        )


def _chunk_size(density: Density, x: Tensor, num_chains: int) -> int:
    """Return how many data run at a time, so that chains · data · width stays near FLOATS_PER_CHUNK."""
    few, latents = x[:2], density.latents
    with same_random_state():
        terms = density.terms(latents.pair.model, density.draw(few, 1), few)[0]
    if terms.log_weights.dim() != 2:
        raise latents.inapplicable("its sites do not all lie in one plate 'data', so a datum has no weight")
    widest = measurement.width(latents.pair, terms.model_trace, len(few), enumerated=latents.enumerated)
    return min(len(x), max(1, measurement.runs_at_a_time(x.device, widest) // num_chains))


def _recorded_density(density: Density, x: Tensor, num_chains: int, *, calls: int) -> tuple[Callable[..., Any], ...]:
    """Return value and gradient for chunks of this size; recorded and compiled where enough calls pay for it."""
    if calls < CALLS_WORTH_RECORDING:
        return density.value, density.gradient
    with same_random_state():
        args = density.draw(x, num_chains), x, x.new_ones(())
    compiled = calls >= CALLS_WORTH_COMPILING
    return tuple(
        recorded_or_itself(function, inputs, [density.latents.pair], "annealing", compiled=compiled)
        for function, inputs in ((density.value, args[:2]), (density.gradient, args))
    )


# Density of unconstrained latents -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    plates: tuple[int, ...]  # sizes of the plates inside a datum
    axis: int  # axis of the data in (chains, plates ...)
    event: tuple[int, ...]  # event shape of the unconstrained value
    columns: slice  # its place in the vector u


class Latents:
    """The continuous latents of a datum as one unconstrained vector u, shape (chains, data, dim)."""

    def __init__(self, pair: Pair, trace: Trace) -> None:
        """Read the layout of the latents from a run of the model."""
        self.pair = pair
        sites = sample_sites(trace)
        observed = {n for n, s in sites.items() if s["is_observed"] or s["infer"].get("was_observed")}
        hidden = {name: site for name, site in sites.items() if name not in observed}
        self.enumerated = tuple(name for name, s in hidden.items() if s["infer"].get("enumerate") == "parallel")
        self.nesting = -min((f.dim for s in sites.values() for f in s["cond_indep_stack"] if f.vectorized), default=0)
        self.sites: dict[str, _Site] = {}
        self.dim = 0
        for name, site in hidden.items():
            frames = {f.name: f for f in site["cond_indep_stack"] if f.vectorized}
            if "data" not in frames:
                reason = f"its latent '{name}' lies outside the plate 'data', so data have no evidence of their own"
                raise self.inapplicable(f"{reason}. evaluate(...) estimates the evidence of all data together")
            if name not in self.enumerated:
                self.sites[name] = self._site(name, site, frames)
                self.dim = self.sites[name].columns.stop
        if not self.sites:
            reason = "it has no continuous latent, so its evidence is exact already, by summing the discrete ones out"
            raise self.inapplicable(f"{reason}: evaluate(...).log_evidence with a guide without them, or log_prob")

    def inapplicable(self, reason: str) -> NotApplicable:
        """Return the error to raise where chains cannot run on these latents."""
        return not_applicable("annealed_evidence", self.pair, f"{reason}.")

    def _site(self, name: str, site: Any, frames: dict[str, Any]) -> _Site:
        support = site["fn"].support
        if support.is_discrete:
            fix = "Mark it infer={'enumerate': 'parallel'} in the model, and it is summed out"
            raise self.inapplicable(f"its latent '{name}' is discrete, and Hamiltonian chains need gradients. {fix}")
        try:
            raw = biject_to(support).inv(site["value"])
        except NotImplementedError as error:
            raise self.inapplicable(f"no smooth map is known onto the support of '{name}', {support}") from error
        event = raw.shape[len(site["fn"].batch_shape) :]
        axis = self.nesting + 1 + frames["data"].dim
        plates = [1] * self.nesting
        for frame in frames.values():
            plates[frame.dim] = frame.size
        del plates[axis - 1]
        return _Site(tuple(plates), axis, event, slice(self.dim, self.dim + math.prod(plates) * event.numel()))

    def pack(self, trace: Trace) -> Tensor:
        """Return u of a run of the model."""
        nodes: Any = {name: trace.nodes[name] for name in self.sites}
        raw = {name: biject_to(node["fn"].support).inv(node["value"]) for name, node in nodes.items()}
        ranks = {name: self.nesting + 1 + len(site.event) for name, site in self.sites.items()}
        return torch.cat([per_datum(raw[name], self.sites[name].axis, rank) for name, rank in ranks.items()], -1)

    def unpack(self, name: str, u: Tensor) -> Tensor:
        """Return the part of u for one site, shape (chains, plates ..., event ...)."""
        site = self.sites[name]
        return u[..., site.columns].reshape(*u.shape[:2], *site.plates, *site.event).movedim(1, site.axis)

    def per_datum(self, name: str, terms: Tensor) -> Tensor:
        """Sum the terms of each datum: (chains, plates ..., rest ...) → (chains, data)."""
        return per_datum(terms, self.sites[name].axis, terms.dim()).sum(-1)


class _GiveLatents(Messenger):
    """Give the latents their values from u, and add up log |det dz/du|, (chains, data)."""

    def __init__(self, latents: Latents, u: Tensor) -> None:
        super().__init__()
        self._latents, self._u = latents, u
        self.log_det = u.new_zeros(u.shape[:2])

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self._latents.sites:
            return
        transform, raw = biject_to(msg["fn"].support), self._latents.unpack(name, self._u)
        msg["value"] = transform(raw)
        msg["done"] = True
        self.log_det = self.log_det + self._latents.per_datum(name, transform.log_abs_det_jacobian(raw, msg["value"]))


class Density:
    """log p(z) + log |det dz/du| and log p(x | z) as functions of u, with their gradient."""

    def __init__(self, latents: Latents) -> None:
        self.latents = latents

    def draw(self, x: Tensor, num_chains: int) -> Tensor:
        """Draw latents from the prior; return their u."""
        return self.latents.pack(poutine.trace(self._chains(self.latents.pair.model, num_chains)).get_trace(x))

    def value(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z) + log |det dz/du| and log p(x | z), both (chains, data)."""
        found, log_det = self.terms(self.latents.pair.model, u, x)
        terms, zero = found.model, torch.zeros_like(log_det)
        if self.latents.enumerated:  # a latent that is summed out may tie the two together: sum the prior by itself
            unobserved = poutine.block(self.latents.pair.model, hide_fn=lambda site: site.get("is_observed", False))
            prior = sum(self.terms(unobserved, u, x)[0].model.values(), zero)
            return prior + log_det, sum(terms.values(), zero) - prior
        prior = sum((terms[name] for name in self.latents.sites), zero)
        return prior + log_det, sum((term for name, term in terms.items() if name not in self.latents.sites), zero)

    def gradient(self, u: Tensor, x: Tensor, beta: Tensor) -> Tensor:
        """Return d/du (log p(z) + log |det dz/du| + β log p(x | z)), the shape of u."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            prior, likelihood = self.value(u, x)
            return torch.autograd.grad((prior + beta * likelihood).sum(), u)[0]

    def _chains(self, model: Callable, num_chains: int) -> Callable:
        return pyro.plate(PARTICLES, num_chains, dim=-self.latents.nesting - 1)(model)

    def terms(self, model: Callable, u: Tensor, x: Tensor) -> tuple[LogWeightTerms, Tensor]:
        """Return the log density of each site, and log |det dz/du|."""
        model = self._chains(model, len(u))
        if self.latents.enumerated:
            model = EnumMessenger(first_available_dim=-self.latents.nesting - 2)(model)
        given = _GiveLatents(self.latents, u)
        trace = prune_subsample_sites(poutine.trace(given(model)).get_trace(x))
        trace.compute_log_prob()
        # No guide: enumerated latents are summed out, the others keep their own terms.
        return log_weights_of_traces(trace, Trace(), len(u), self.latents.nesting), given.log_det
