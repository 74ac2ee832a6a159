"""Objectives of stochastic variational inference, with Pyro's names and arguments.

Each is a :class:`pyro.infer.ELBO`: it works in ``pyro.infer.SVI`` and in :class:`pyrovae.infer.SVI`. Beyond Pyro's,
each has ``differentiable_loss``; none waits for the device (but ``TraceEnum_ELBO``, where a latent is not local to a
datum); none is confused by a second pair; and particles are vectorised unless asked otherwise. A loss is the negative
bound in nats, summed over the batch (times dataset / batch size, where the model subsamples).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO
from pyro.infer import TraceEnum_ELBO as PyroTraceEnum_ELBO
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.infer.util import MultiFrameTensor, get_plate_stacks
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from pyrovae.checks import check_positive
from pyrovae.infer.weights import (
    LogWeightTerms,
    Structure,
    enumerated_bound,
    log_weights_of_traces,
    trace_pair,
)
from pyrovae.pair import Pair

__all__ = ["RenyiELBO", "TraceEnum_ELBO", "TraceMeanField_ELBO", "Trace_ELBO", "default_loss", "renyi_bound"]


MOST_CALLS = 8
"""Number of kinds of calls whose structure an objective remembers."""


class _Objective(ELBO):
    """Base of all objectives: particles, the structure of the pair last seen, and Pyro's three entry points."""

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = True,
        **options: Any,
    ) -> None:
        check_positive("num_particles", num_particles, integer=True)
        super().__init__(num_particles, max_plate_nesting, vectorize_particles=vectorize_particles, **options)
        self._given_nesting = max_plate_nesting
        self._pair: Any = None  # the one last seen, and its structure by kind of call
        self._seen: dict[Any, Structure] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_pair": None, "_seen": {}}  # copies look anew

    def _structure(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Structure:
        """Return what one run shows of the pair. It runs once for each kind of call: with labels, say, and without."""
        if self._pair != (model, guide):
            self._pair = (model, guide)
            self._seen.clear()
        call = _kind_of_call(args, kwargs)
        if call not in self._seen:
            structure = Structure.of(model, guide, args, kwargs)
            if self._given_nesting != math.inf:
                structure = Structure(int(self._given_nesting), structure.enumerated)
            if len(self._seen) == MOST_CALLS:
                self._seen.clear()
            self._seen[call] = structure
        return self._seen[call]

    def _get_traces(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Iterator[tuple[Trace, Trace]]:
        """Yield one pair of vectorised traces, or one pair for each particle."""
        structure = self._structure(model, guide, args, kwargs)
        runs, particles = (1, self.num_particles) if self.vectorize_particles else (self.num_particles, 1)
        for _ in range(runs):
            yield trace_pair(model, guide, args, kwargs, num_particles=particles, structure=structure)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
        structure = self._structure(model, guide, args, kwargs)
        return trace_pair(model, guide, args, kwargs, num_particles=1, structure=structure)

    def _bound(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
        """Return the bound, with its pathwise gradient, and a term of which only the *gradient* counts, or None."""
        raise NotImplementedError

    def _explained_bound(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Tensor, Tensor | None]:
        """Return :meth:`_bound`. An error that one particle does not have says what may be its cause."""
        try:
            return self._bound(model, guide, args, kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            if self.num_particles > 1 and self.vectorize_particles and _runs(model, guide, args, kwargs):
                error.add_note(
                    f"With {self.num_particles} particles at once, values have one more dim on the left. For a pair "
                    "that cannot run so, give the loss vectorize_particles=False."
                )
            raise

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss as a scalar tensor whose gradient is an unbiased estimate of the bound's."""
        bound, surrogate = self._explained_bound(model, guide, args, kwargs)
        if surrogate is not None:
            bound = bound + (surrogate - surrogate.detach())
        return -bound

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss as a scalar tensor, without gradient."""
        with torch.no_grad():
            return -self._explained_bound(model, guide, args, kwargs)[0]

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss as a scalar tensor, and add its gradients to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach()

    def _refuse_enumeration(self, model_trace: Trace, guide_trace: Trace) -> None:
        for name, site in model_trace.nodes.items():
            if site["type"] == "sample" and not site["is_observed"] and name not in guide_trace:
                raise ValueError(
                    f"guide: site '{name}' is left to enumeration, and {type(self).__name__} samples every latent. "
                    "Use TraceEnum_ELBO, or sample the site in the guide."
                )


def _kind_of_call(args: tuple, kwargs: dict) -> Any:
    """Return a key that is equal for calls that differ in values of tensors and numbers alone."""
    leaves, spec = tree_flatten((args, kwargs))
    return spec, tuple(
        [x if isinstance(x, bool) else Tensor if isinstance(x, Tensor | int | float) else type(x) for x in leaves]
    )


def _runs(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> bool:
    """Return whether the pair runs with one particle."""
    try:
        Structure.of(model, guide, args, kwargs)
    except Exception:
        return False
    return True


class Trace_ELBO(_Objective):
    """Evidence lower bound, E_q[log p(x, z) − log q(z | x)], by Monte Carlo.

    Pathwise gradients where the guide's distributions have them; elsewhere the score function, with terms of
    other plates left out (Ranganath et al. 2014). Value and gradient are those of ``pyro.infer.Trace_ELBO``.
    Site scales multiply their own terms, as in Pyro: with β on a latent's model and guide site, a β-VAE.
    """

    def _bound(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
        bound: Any = 0.0
        surrogate: Any = None
        for traces in self._get_traces(model, guide, args, kwargs):
            self._refuse_enumeration(*traces)
            value, score = self._particle_bound(*traces)
            bound = bound + value / self.num_particles
            if score is not None:
                surrogate = (0.0 if surrogate is None else surrogate) + score / self.num_particles
        return bound, surrogate

    def _particle_bound(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor | None]:
        bound: Any = 0.0
        surrogate: Any = None
        for site in model_trace.nodes.values():
            if site["type"] == "sample":
                bound = bound + site["log_prob_sum"]
        log_r = None
        for site in guide_trace.nodes.values():
            if site["type"] != "sample":
                continue
            _, score, entropy = site["score_parts"]
            # Without a pathwise gradient E_q[∇ log q] = 0: its noise is left out.
            pathwise = not is_identically_zero(entropy)
            bound = bound - (entropy.sum() if pathwise else site["log_prob_sum"].detach())
            if not is_identically_zero(score):
                log_r = log_r or _local_learning_signal(model_trace, guide_trace)
                signal = log_r.sum_to(site["cond_indep_stack"])
                surrogate = (0.0 if surrogate is None else surrogate) + (signal * score).sum()
        return bound, surrogate


def _local_learning_signal(model_trace: Trace, guide_trace: Trace) -> MultiFrameTensor:
    log_r = MultiFrameTensor()
    stacks = get_plate_stacks(model_trace)
    for name, site in model_trace.nodes.items():
        if site["type"] == "sample":
            term = site["log_prob"]
            if not site["is_observed"]:
                term = term - guide_trace.nodes[name]["log_prob"]
            log_r.add((stacks[name], term.detach()))
    return log_r


def default_loss(pair: Pair) -> ELBO:
    """Return the loss that a pair is trained by when none is named: its own, or ``Trace_ELBO``."""
    return Trace_ELBO() if pair.default_loss is None else pair.default_loss()


class TraceMeanField_ELBO(Trace_ELBO):
    """Evidence lower bound with the KL terms in closed form where they have one (Kingma and Welling 2014, eq. 10).

    A site's KL(q(z_i | ·) ‖ p(z_i | ·)) is taken in closed form only if every latent that comes before z_i in the model
    also comes before it in the guide; otherwise z_i may be a parent of p's parents, the closed form would be wrong
    (Pyro warns and goes on), and the sampled term is used.

    Raises:
        NotImplementedError: a guide site has no pathwise gradient.
    """

    def _particle_bound(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor | None]:
        model_order = [n for n, s in model_trace.nodes.items() if s["type"] == "sample" and n in guide_trace]
        guide_order = [n for n, s in guide_trace.nodes.items() if s["type"] == "sample"]
        bound: Any = 0.0
        for site in model_trace.nodes.values():
            if site["type"] == "sample" and site["is_observed"]:
                bound = bound + site["log_prob_sum"]
        for position, name in enumerate(guide_order):
            site = guide_trace.nodes[name]
            if not is_identically_zero(site["score_parts"].score_function):
                raise NotImplementedError(
                    f"site '{name}': TraceMeanField_ELBO needs a guide distribution with a pathwise gradient; got "
                    f"{type(site['fn']).__name__}. Use Trace_ELBO or TraceEnum_ELBO."
                )
            if name not in model_order:  # auxiliary
                bound = bound - site["log_prob_sum"]
                continue
            prior = model_trace.nodes[name]
            before = model_order[: model_order.index(name)]
            kl = _closed_form_kl(site, prior) if set(before) <= set(guide_order[:position]) else None
            bound = bound + (prior["log_prob_sum"] - site["log_prob_sum"] if kl is None else -kl)
        return bound, None


def _closed_form_kl(guide_site: Any, model_site: Any) -> Tensor | None:
    try:
        kl = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return None
    return scale_and_mask(kl, guide_site["scale"], guide_site["mask"]).sum()


class TraceEnum_ELBO(_Objective, PyroTraceEnum_ELBO):
    """Evidence lower bound with discrete latents marked ``infer={"enumerate": "parallel"}`` summed out exactly.

    Marked in the model and absent from the guide: log Σ_z p(x, z). Marked in the guide:
    Σ_z q(z | x)(log p(x, z) − log q(z | x)). Latents that are local to a datum are summed out directly; for the others
    the contraction is Pyro's own (Obermeyer et al. 2019).
    """

    def _get_traces(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Iterator[tuple[Trace, Trace]]:
        structure = self._structure(model, guide, args, kwargs)
        self.max_plate_nesting = structure.max_plate_nesting + 1  # one dim for particles, needed or not
        return PyroTraceEnum_ELBO._get_traces(self, model, guide, args, kwargs)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
        return PyroTraceEnum_ELBO._get_trace(self, model, guide, args, kwargs)

    def _bound(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
        nesting = self._structure(model, guide, args, kwargs).max_plate_nesting
        particles = self.num_particles if self.vectorize_particles else 1
        bound: Any = 0.0
        for traces in self._get_traces(model, guide, args, kwargs):
            value = enumerated_bound(*traces, particles, nesting)
            if value is None:
                with _ImpossibleAtNoCost():
                    value = _compute_dice_elbo(*traces) / particles
            bound = bound + value * (particles / self.num_particles)
        return bound, None


class _ImpossibleAtNoCost(TorchFunctionMode):
    """Gives impossible outcomes the cost 0. Pyro leaves them out by a boolean index, which cannot be recorded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.all:
            return False
        if func is Tensor.masked_select:
            values, mask = args
            return torch.where(mask, values, 0.0)
        return func(*args, **(kwargs or {}))


class RenyiELBO(_Objective):
    """Rényi bound of order α with K particles (Li and Turner 2016), one for each datum, summed:

        L_α = Σ_n 1/(1−α) · log 1/K Σ_k w_kn^(1−α)

    α = 0 is the importance-weighted bound (Burda et al. 2016), which rises with K toward log p(x). α = −∞ is VR-max,
    Σ_n max_k log w_kn; α = +∞ its mirror, the least weight. α → 1 is the ELBO: use Trace_ELBO.

    Where Pyro 1.9.2 is wrong this is right: a mini-batch scale multiplies outside the logarithm; with a global latent
    the K weights are those of the whole batch, local terms scaled before they are added; discrete guide sites get the
    score-function gradient, with the leave-one-out control variate of VIMCO (Mnih and Rezende 2016), in place of none;
    and particles that are drawn one by one share the rows of a subsampled plate.

    With a global latent, a mini-batch and K > 1 the value is no longer sure to lie below the evidence: log mean exp is
    convex in the log-weights, so its average over batches is no less than its value on all the data.

    Args:
        alpha: the order, any number but 1.
        num_particles: K.

    Raises:
        ValueError: α = 1, K < 1.
    """

    def __init__(self, alpha: float = 0, num_particles: int = 2, **options: Any) -> None:
        self.alpha: float = alpha
        if isinstance(alpha, bool) or not isinstance(alpha, Real):
            raise TypeError(f"alpha: expected a number; got {alpha!r}.")
        if alpha == 1:
            raise ValueError("alpha: expected any number but 1, where the Rényi bound is the ELBO; use Trace_ELBO.")
        if math.isnan(alpha):
            raise ValueError("alpha: expected a number; got nan.")
        super().__init__(num_particles, **options)

    def _bound(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
        nesting = self._structure(model, guide, args, kwargs).max_plate_nesting
        particles = self.num_particles if self.vectorize_particles else 1
        with _SameSubsample():
            runs: list[LogWeightTerms] = [
                log_weights_of_traces(*traces, particles, nesting)
                for traces in self._get_traces(model, guide, args, kwargs)
            ]
        log_w = torch.cat([run.log_weights for run in runs])
        scale = runs[0].scale
        bound = renyi_bound(log_w, self.alpha)  # (N,)
        surrogate = None
        if runs[0].score is not None:
            score = torch.cat([run.score for run in runs if run.score is not None])
            with torch.no_grad():
                signal = bound - _leave_one_out(log_w, self.alpha)  # (K, N)
            surrogate = (signal * score).sum() * scale
        return bound.sum() * scale, surrogate


class _SameSubsample(Messenger):
    """Gives each run the rows that the first one drew: weights of different data must not be averaged."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self._rows:
            msg["value"], msg["done"] = self._rows[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._rows[msg["name"]] = msg["value"]


def renyi_bound(log_weights: Tensor, alpha: float) -> Tensor:
    """Return 1/(1−α) · log mean_k w^(1−α) over the first dimension: (K, ...) → (...). α = −∞: max; α = +∞: min."""
    if alpha == -math.inf:
        return log_weights.amax(0)
    if alpha == math.inf:
        return log_weights.amin(0)
    scaled = (1 - alpha) * log_weights
    # Terms below e^-60 of the largest change no digit, but their gradients would be subnormal numbers, and those make a
    # CPU's matrix products ten times slower.
    scaled = scaled.masked_fill(scaled < scaled.detach().amax(0) - 60, -math.inf)
    return (torch.logsumexp(scaled, 0) - math.log(len(log_weights))) / (1 - alpha)


def _leave_one_out(log_weights: Tensor, alpha: float) -> Tensor:
    """Return the bound with particle k's log-weight replaced by the mean of the others', for each k: (K, N) → (K, N).

    It does not depend on z_k, so subtracting it leaves the score-function gradient unbiased. With one particle
    there are no others, and the baseline is zero.
    """
    num_particles = len(log_weights)
    if num_particles == 1:
        return torch.zeros_like(log_weights)
    own = torch.eye(num_particles, dtype=torch.bool, device=log_weights.device)
    own = own.reshape(own.shape + (1,) * (log_weights.dim() - 1))  # [particle j, replaced k, 1 ...]
    each = log_weights.unsqueeze(1)
    others = torch.where(own, 0.0, each).sum(0) / (num_particles - 1)
    baseline = renyi_bound(torch.where(own, others, each), alpha)
    return torch.where(baseline.isfinite(), baseline, 0.0)  # other particles that the model rules out
