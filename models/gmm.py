"""Gaussian mixture: z ~ Categorical(π), x | z ~ N(μ_z, Σ_z)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK, InferDict
from torch import Tensor, nn
from torch.distributions import constraints
from torch.linalg import solve_triangular

from pyrovae.checks import check_choice, check_data, check_positive
from pyrovae.infer import TraceEnum_ELBO
from pyrovae.networks import MLP
from pyrovae.pair import Pair

if TYPE_CHECKING:
    from pyro.infer import ELBO

__all__ = ["GMM"]


class GMM(Pair):
    """Mixture of K Gaussians, p(x) = Σ_k π_k N(x | μ_k, Σ_k).

    It trains in three ways: by SVI with the component summed out (no guide site), by SVI with an amortized
    guide q(z | x) = Categorical(logits = network(x)), and by exact EM (:func:`pyrovae.fit_em`).

    Parameters: ``weights`` (K,), ``loc`` (K, D) and ``scale``, whose form depends on ``covariance``:

    ============= ======================== =========
    covariance    scale                    shape
    ============= ======================== =========
    ``full``      Cholesky factors         (K, D, D)
    ``tied``      one Cholesky factor      (1, D, D)
    ``diag``      standard deviations      (K, D)
    ``spherical`` standard deviations      (K, 1)
    ============= ======================== =========

    Args:
        num_components: number K of components.
        data_dim: number D of features.
        covariance: ``full``, ``tied``, ``diag`` or ``spherical``.
        amortized: make the guide a network. Otherwise the guide is empty and the component is always summed out.
        hidden_dims: widths of the network's hidden layers.

    Raises:
        TypeError, ValueError: K or D is not a positive whole number; an unknown covariance.

    References:
        Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm.
    """

    default_lr = 0.02
    """Learning rate: large, as there are few parameters and no deep network."""

    batched_em = True
    """Mark for ``fit_em``: the EM methods take parameters with leading dimensions, one row a restart."""

    covariance_floor = 1e-6
    """Fraction of the data's variance below which EM lets no component's variance fall, in any direction. Without it
    the likelihood is unbounded: a component that shrinks onto one point has infinite density there."""

    weights: Any  # reads as a Tensor, and so does scale
    scale: Any
    floored: Tensor
    """Components that the last M step held at the floor, (K,), bool."""

    def __init__(
        self,
        num_components: int,
        data_dim: int,
        *,
        covariance: str = "full",
        amortized: bool = False,
        hidden_dims: Sequence[int] = (32,),
    ) -> None:
        super().__init__()
        check_positive("num_components", num_components, integer=True)
        check_positive("data_dim", data_dim, integer=True)
        check_choice("covariance", covariance, ("full", "tied", "diag", "spherical"))
        self.num_components = num_components
        self.data_dim = data_dim
        self.covariance = covariance
        self.amortized = amortized

        self._has_matrices = covariance in ("full", "tied")
        rows = 1 if covariance == "tied" else num_components
        columns = 1 if covariance == "spherical" else data_dim
        self.weights = PyroParam(torch.full((num_components,), 1 / num_components), constraints.simplex)
        self.loc = nn.Parameter(torch.randn(num_components, data_dim))
        if self._has_matrices:
            self.scale = PyroParam(torch.eye(data_dim).repeat(rows, 1, 1), constraints.lower_cholesky)
        else:
            self.scale = PyroParam(torch.ones(rows, columns), constraints.positive)
        self.register_buffer("floored", torch.zeros(num_components, dtype=torch.bool), persistent=False)
        if amortized:
            self.encoder = MLP(data_dim, hidden_dims, num_components)
            self.register_buffer("feature_loc", torch.zeros(data_dim))
            self.register_buffer("feature_scale", torch.ones(data_dim))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            pyro.sample("x", self.component(z), obs=x)

    def guide(self, x: Tensor) -> None:
        if not self.amortized:
            return
        # Pyro's sampling losses warn about guide sites marked for enumeration: mark the site only under an enumeration.
        enumerated = any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)
        with pyro.plate("data", len(x), dim=-1):
            logits = self.encoder((x - self.feature_loc) / self.feature_scale)
            infer: InferDict = {"enumerate": "parallel"} if enumerated else {}
            pyro.sample("z", dist.Categorical(logits=logits), infer=infer)

    def component(self, z: Tensor) -> dist.TorchDistribution:
        """Return p(x | z), of batch shape ``z.shape`` and event shape (D,)."""
        scale = self.scale[0] if self.covariance == "tied" else self.scale[z]
        if self._has_matrices:
            return dist.MultivariateNormal(self.loc[z], scale_tril=scale)
        return dist.Normal(self.loc[z], scale).to_event(1)

    def default_loss(self) -> ELBO:
        return TraceEnum_ELBO(max_plate_nesting=1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log p(x), (N, D) → (N,), in nats."""
        return self._log_joint(x)[0].logsumexp(-2)

    def posterior(self, x: Tensor) -> dist.Categorical:
        """Return the exact p(z | x), the responsibilities: a Categorical of batch shape (N,)."""
        return dist.Categorical(logits=self._log_joint(x)[0].mT)

    @property
    def covariance_matrix(self) -> Tensor:
        """Return the components' covariances, (K, D, D)."""
        scale = self.scale if self._has_matrices else self.scale.expand_as(self.loc).diag_embed()
        return (scale @ scale.mT).expand(self.num_components, -1, -1)

    @property
    def num_parameters(self) -> int:
        """Count the free parameters of the mixture, for BIC and AIC."""
        k, d = self.num_components, self.data_dim
        of_covariance = {
            "full": k * d * (d + 1) // 2,
            "tied": d * (d + 1) // 2,
            "diag": k * d,
            "spherical": k,
        }
        return k - 1 + k * d + of_covariance[self.covariance]

    @torch.no_grad()
    def initialize(self, x: Tensor, *, seed: int | None = None) -> None:
        """Start with means at K data that lie far apart, by k-means++ on standardised features.

        Weights start equal. Every component starts with the covariance of the data about the nearest of the means.

        Args:
            x: data, (N, D).
            seed: seed of the draw. Without one, torch's global generator draws.

        Raises:
            ValueError: fewer data than components, or not finite data of shape (N, D).

        References:
            Arthur and Vassilvitskii (2007), k-means++: The advantages of careful seeding.
        """
        check_data(x, data_dim=self.data_dim)
        if len(x) < self.num_components:
            raise ValueError(
                f"x: expected at least as many data as components; got {len(x)} data for num_components="
                f"{self.num_components}. Lower num_components to {len(x)} or fewer."
            )
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        x = x.detach().to(self.loc.device, torch.float64)
        loc, variance = x.mean(0), _reference_variance(x.var(0, correction=0), x.mean(0))

        y = x / variance.sqrt()
        distance, nearest, centres = torch.full_like(y[:, 0], torch.inf), torch.zeros(len(y)).to(y).long(), []
        for k in range(self.num_components):  # the next with probability proportional to the squared distance
            odds = (distance if k else torch.ones_like(distance)).cumsum(0)
            draw = torch.rand((), generator=generator, dtype=torch.float64).to(odds) * odds[-1]
            centres.append(torch.searchsorted(odds, draw, right=True).clamp(max=len(y) - 1))
            from_new = (y - y[centres[-1]]).square().sum(-1)
            nearest = torch.where(from_new < distance, k, nearest)
            distance = torch.minimum(distance, from_new)
        seeds = x[torch.stack(centres)]

        residual = x - seeds[nearest]
        covariance = (residual.mT @ residual / len(x)).unsqueeze(0)
        if not self._has_matrices:
            covariance = self._average(covariance.diagonal(dim1=-2, dim2=-1))
        self.weights = torch.full_like(self.weights, 1 / self.num_components)
        self.loc.copy_(seeds)
        self.scale = self._factor(covariance, variance)[0].to(self.loc).expand_as(self.scale)
        self.floored.zero_()
        if self.amortized:
            self.feature_loc.copy_(loc)
            self.feature_scale.copy_(variance.sqrt())

    @torch.no_grad()
    def expected_statistics(self, x: Tensor) -> dict[str, Tensor]:
        """Return the sums over data of the E step, under p(z | x). They add over chunks of ``x``.

        With responsibilities r_nk and y_nk = L_k⁻¹ (x_n − μ_k), L_k the Cholesky factor (or the standard deviations):
        ``count`` Σ_n r_nk, ``first`` Σ_n r_nk y_nk, ``second`` Σ_n r_nk y_nk y_nkᵀ, or the part of it that
        ``covariance`` needs, and ``log_likelihood`` Σ_n log p(x_n). The density needs y anyway. Moments of y are of
        order one, so they stay accurate where moments of x about the origin would cancel.
        """
        log_joint, y = self._log_joint(x)
        log_prob = log_joint.logsumexp(-2, keepdim=True)
        responsibility = (log_joint - log_prob).exp_()
        if self._has_matrices:
            root = responsibility.sqrt()
            y.mul_(root.unsqueeze(-2))
            first, second = y @ root.unsqueeze(-1), y @ y.mT
            second = second.sum(-3, keepdim=True) if self.covariance == "tied" else second
        else:
            first = y @ responsibility.unsqueeze(-1)
            second = self._average((y.square_() @ responsibility.unsqueeze(-1)).squeeze(-1))
        return {
            "count": responsibility.sum(-1),
            "first": first.squeeze(-1),
            "second": second,
            "log_likelihood": log_prob.sum((-2, -1)),
        }

    def maximize(self, statistics: dict[str, Tensor]) -> None:
        """Set the parameters that maximise the expected log joint, in closed form: the M step.

        Variances stay above ``covariance_floor`` times the data's. Clamping the eigenvalues gives the maximum under
        that constraint, so the likelihood does not fall. A component without data stays as it is.
        """
        count, first, second = (statistics[name] for name in ("count", "first", "second"))
        tiny = torch.finfo(count.dtype).tiny
        size = count.clamp(min=tiny).unsqueeze(-1)
        weights = count / count.sum(-1, keepdim=True)

        mean_y = first / size
        if self._has_matrices:
            shift = (self.scale @ mean_y.unsqueeze(-1)).squeeze(-1)  # from the old means to the new
            if self.covariance == "full":
                within_y = second / size.unsqueeze(-1) - mean_y.unsqueeze(-1) * mean_y.unsqueeze(-2)
            else:
                within_y = (second - (first.mT @ mean_y).unsqueeze(-3)) / size.sum(-2).unsqueeze(-1).unsqueeze(-1)
            covariance = self.scale @ within_y @ self.scale.mT
        else:
            shift = self.scale * mean_y
            covariance = self.scale.square() * (second / size - self._average(mean_y.square()))
        loc = self.loc + shift

        # The variance of the data is the mean of the components' variances plus the variance of their means.
        mean = (weights.unsqueeze(-1) * loc).sum(-2)
        within = covariance.diagonal(dim1=-2, dim2=-1) if self._has_matrices else covariance
        spread = within + (loc - mean.unsqueeze(-2)).square()
        variance = _reference_variance((weights.unsqueeze(-1) * spread).sum(-2), mean)

        scale, floored = self._factor(covariance, variance)
        empty = count < tiny
        if self.covariance != "tied":
            kept = empty.unsqueeze(-1).unsqueeze(-1) if self._has_matrices else empty.unsqueeze(-1)
            scale, floored = torch.where(kept, self.scale, scale), floored & ~empty
        self.weights = weights.clamp(min=1e-30)  # a zero would have an infinite logit
        self.loc.data = loc
        self.scale = scale
        self.floored = floored.expand_as(count)

    def _log_joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x, z = k), (..., K, N), and y = L_k⁻¹ (x − μ_k), (..., K, D, N)."""
        if x.shape[-1] != self.data_dim:
            raise ValueError(f"x: expected shape (N, {self.data_dim}); got {tuple(x.shape)}.")
        # Far from the origin the two products below would cancel, so both are taken about one point among the means.
        centre = self.loc.detach().reshape(-1, self.data_dim).mean(0)
        x, scale, loc = x - centre, self.scale, (self.loc - centre).unsqueeze(-1)
        if self._has_matrices:
            inverse = solve_triangular(scale, torch.eye(self.data_dim).to(scale), upper=False).expand(
                *loc.shape[:-1], -1
            )
            # One matrix product for all components.
            y = torch.addmm(-(inverse @ loc).reshape(-1, 1), inverse.reshape(-1, self.data_dim), x.mT)
            y = y.view(*loc.shape[:-1], len(x))
            scale = scale.diagonal(dim1=-2, dim2=-1)
        else:
            y = (x.mT - loc) / scale.unsqueeze(-1)
        log_det = scale.log().expand_as(self.loc).sum(-1)
        constant = self.weights.log() - log_det - 0.5 * self.data_dim * math.log(2 * math.pi)
        return constant.unsqueeze(-1) - 0.5 * y.square().sum(-2), y

    def _average(self, variance: Tensor) -> Tensor:
        """Average variances over features where the covariance is spherical; else return them as they are."""
        return variance.mean(-1, keepdim=True) if self.covariance == "spherical" else variance

    def _factor(self, covariance: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``scale`` for covariances and which the floor changed, given the data's ``variance`` (..., D)."""
        variance = self._average(variance).unsqueeze(-2)
        if not self._has_matrices:
            lowest = self.covariance_floor * variance
            return torch.maximum(covariance, lowest).sqrt(), (covariance < lowest).any(-1)

        unit = variance.sqrt().unsqueeze(-1)  # of standardised data, eigenvalues compare with the floor
        correlation = covariance / (unit * unit.mT)
        tril, failed = torch.linalg.cholesky_ex(correlation)
        # The trace of the inverse bounds its largest eigenvalue: where it is small, no decomposition is needed.
        trace = solve_triangular(tril, torch.eye(self.data_dim).to(tril), upper=False).square().sum((-2, -1))
        floored = (failed > 0) | ~(trace <= 1 / self.covariance_floor)
        if floored.any():
            values, vectors = torch.linalg.eigh(correlation)
            floored &= values[..., 0] < self.covariance_floor
            raised = (vectors * values.clamp(min=self.covariance_floor).unsqueeze(-2)) @ vectors.mT
            tril = torch.linalg.cholesky(torch.where(floored[..., None, None], raised, correlation))
        return unit * tril, floored


def _reference_variance(variance: Tensor, mean: Tensor) -> Tensor:
    """Return the variances (..., D) of floors and standardisation. A constant feature gets the mean of the others."""
    constant = variance <= (100 * torch.finfo(variance.dtype).eps * mean).square()
    overall = variance.masked_fill(constant, 0).mean(-1, keepdim=True)
    return torch.where(constant, torch.where(overall > 0, overall, 1), variance)
