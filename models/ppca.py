"""Probabilistic PCA: z ~ N(0, I), x | z ~ N(W z + μ, σ² I)."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.checks import check_data, check_positive
from pyrovae.pair import Pair

__all__ = ["PPCA"]


class PPCA(Pair):
    """Probabilistic principal component analysis (Tipping and Bishop 1999): p(x) = N(x | μ, W Wᵀ + σ² I).

    The guide is linear and Gaussian, q(z | x) = N(A x + b, L Lᵀ), with one full covariance for all data. The exact
    posterior has this form, so the ELBO can reach the log likelihood. It trains by SVI, by exact EM
    (:func:`pyrovae.fit_em`), or at once by :meth:`fit_closed_form`.

    Parameters of the model: ``weight`` W (D, Q), ``loc`` μ (D,), ``noise_variance`` σ² (). Parameters of the guide:
    ``guide_weight`` A (Q, D) and ``guide_loc`` b (Q,), both for standardised x, and ``guide_scale_tril`` L (Q, Q).

    Args:
        data_dim: number D of features.
        latent_dim: number Q of latent dimensions, below D.

    Raises:
        TypeError, ValueError: D or Q is not a positive whole number, or Q is not below D.

    References:
        Tipping and Bishop (1999), Probabilistic principal component analysis.
    """

    noise_floor = 1e-10
    """Fraction of the data's mean variance below which EM does not let the noise variance fall. Without it the
    likelihood is unbounded for data that lie in Q dimensions."""

    noise_variance: Any  # reads as a Tensor, and so does guide_scale_tril
    guide_scale_tril: Any

    default_lr = 0.02
    """Learning rate: large, as there are few parameters and no deep network."""

    def __init__(self, data_dim: int, latent_dim: int) -> None:
        super().__init__()
        check_positive("data_dim", data_dim, integer=True)
        check_positive("latent_dim", latent_dim, integer=True)
        if latent_dim >= data_dim:
            raise ValueError(
                f"latent_dim: expected a whole number below data_dim={data_dim}; got {latent_dim}. "
                "With as many latents as features no variance is left for the noise."
            )
        self.data_dim = data_dim
        self.latent_dim = latent_dim
        self.weight = nn.Parameter(0.1 * torch.randn(data_dim, latent_dim))
        self.loc = nn.Parameter(torch.zeros(data_dim))
        self.noise_variance = PyroParam(torch.tensor(1.0), constraints.positive)
        self.guide_weight = nn.Parameter(torch.zeros(latent_dim, data_dim))
        self.guide_loc = nn.Parameter(torch.zeros(latent_dim))
        self.guide_scale_tril = PyroParam(torch.eye(latent_dim), constraints.lower_cholesky)
        self.register_buffer("feature_loc", torch.zeros(data_dim))
        self.register_buffer("feature_scale", torch.ones(data_dim))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.loc.new_zeros(self.latent_dim), 1).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.mT + self.loc, self.noise_variance.sqrt()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc = (x - self.feature_loc) / self.feature_scale @ self.guide_weight.mT + self.guide_loc
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.guide_scale_tril))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log p(x), (N, D) → (N,), in nats, in O(D·Q) a datum.

        With M = Wᵀ W + σ² I, the determinant lemma gives log |W Wᵀ + σ² I| = (D − Q) log σ² + log |M|. With the
        posterior mean m = M⁻¹ Wᵀ (x − μ), the squared distance is |x − μ − W m|² / σ² + |m|². It adds squares only;
        Woodbury's formula subtracts, and would lose digits.
        """
        mean, tril = self._posterior(x)
        return self._log_prob(x, mean, tril)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Return the exact p(z | x) = N(M⁻¹ Wᵀ (x − μ), σ² M⁻¹), of batch shape (N,) and event shape (Q,)."""
        mean, tril = self._posterior(x)
        return dist.MultivariateNormal(mean, self.noise_variance * torch.cholesky_inverse(tril))

    @property
    def num_parameters(self) -> int:
        """Count the free parameters of the model, for BIC and AIC: μ, σ², and W up to a rotation of the latents."""
        d, q = self.data_dim, self.latent_dim
        return d + 1 + d * q - q * (q - 1) // 2

    @torch.no_grad()
    def initialize(self, x: Tensor, *, seed: int | None = None) -> None:
        """Start at the data's mean, with random weights on the scale of each feature.

        The noise starts at half of the mean variance. The guide standardises its input with the data's moments.

        Args:
            x: data, (N, D).
            seed: seed of the draw. Without one, torch's global generator draws.

        Raises:
            ValueError: not finite data of shape (N, D), or all data are equal.
        """
        x = self._double(x)
        variance = x.var(0, correction=0)
        if not variance.sum() > 0:
            raise ValueError(f"x: expected data that vary; got {len(x)} equal rows.")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        scale = torch.where(variance > 0, variance, variance.mean()).sqrt()
        draw = torch.randn(self.data_dim, self.latent_dim, generator=generator, dtype=torch.float64).to(x)
        self.weight.copy_(draw * (0.5 * variance / self.latent_dim).sqrt().unsqueeze(-1))
        self.loc.copy_(x.mean(0))
        self.noise_variance = (0.5 * variance.mean()).to(self.loc)
        self.feature_loc.copy_(x.mean(0))
        self.feature_scale.copy_(scale)

    @torch.no_grad()
    def fit_closed_form(self, x: Tensor) -> None:
        """Set the maximum likelihood solution, and the guide to its exact posterior.

        W = U (Λ − σ² I)^½ from the Q leading eigenvectors U and eigenvalues Λ of the data's covariance (with 1/N),
        σ² = the mean of the other D − Q eigenvalues. Computed in float64.

        Raises:
            ValueError: not finite data of shape (N, D), or data that lie in Q dimensions, which leave no noise.

        References:
            Tipping and Bishop (1999), section 3.2.
        """
        x = self._double(x)
        loc = x.mean(0)
        centred = (x - loc) / math.sqrt(len(x))
        if len(x) >= self.data_dim:
            values, vectors = torch.linalg.eigh(centred.mT @ centred)
        else:  # the N×N Gram matrix has the same eigenvalues, apart from zeros
            values, vectors = torch.linalg.eigh(centred @ centred.mT)
            vectors = nn.functional.normalize(centred.mT @ vectors, dim=0)
        values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)

        noise_variance = values[self.latent_dim :].sum() / (self.data_dim - self.latent_dim)
        if not noise_variance > 1e-14 * values.sum():
            raise ValueError(
                f"x: expected data that vary in more than latent_dim={self.latent_dim} dimensions; these {len(x)} "
                f"data of {self.data_dim} features leave no variance for the noise. Lower latent_dim, or add data."
            )
        leading = vectors[:, : self.latent_dim]
        sign = leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()  # that of an eigenvector is arbitrary
        self.weight.copy_(leading * sign * (values[: self.latent_dim] - noise_variance).clamp(min=0).sqrt())
        self.loc.copy_(loc)
        self.noise_variance = noise_variance.to(self.loc)
        self.feature_loc.copy_(loc)
        self.feature_scale.copy_(torch.where(x.var(0, correction=0) > 0, x.std(0, correction=0), 1))
        self.match_guide()

    @torch.no_grad()
    def match_guide(self) -> None:
        """Set the guide to the exact posterior. The ELBO then equals the log likelihood, for every sample."""
        at_loc = self.feature_loc.unsqueeze(0)
        _, tril = self._posterior(at_loc)
        self.guide_weight.copy_(torch.cholesky_solve(self.weight.mT, tril) * self.feature_scale)
        self.guide_loc.copy_(self.posterior(at_loc).loc[0])
        self.guide_scale_tril = self.posterior(at_loc).scale_tril[0]

    def expected_statistics(self, x: Tensor) -> dict[str, Tensor]:
        """Return the sums over data of the E step, under p(z | x). They add over chunks of ``x``.

        With c = x − μ for the present ``loc`` and ẑ = (z, 1): ``xz`` Σ c E[ẑ]ᵀ (D, Q+1), ``zz`` Σ E[ẑ ẑᵀ] (Q+1, Q+1),
        ``xx`` Σ |c|², ``log_likelihood`` Σ log p(x).
        """
        mean, tril = self._posterior(x)
        centred = x - self.loc
        latent = nn.functional.pad(mean, (0, 1), value=1.0)
        zz = latent.mT @ latent
        zz[:-1, :-1] += len(x) * self.noise_variance * torch.cholesky_inverse(tril)
        return {
            "xz": centred.mT @ latent,
            "zz": zz,
            "xx": centred.square().sum(),
            "log_likelihood": self._log_prob(x, mean, tril).sum(),
        }

    def maximize(self, statistics: dict[str, Tensor]) -> None:
        """Set the parameters that maximise the expected log joint: the M step.

        The regression of x on ẑ = (z, 1) gives the weights and the new mean together.
        """
        xz, zz, xx = (statistics[name] for name in ("xz", "zz", "xx"))
        size = zz[-1, -1] * self.data_dim
        coefficients = torch.linalg.solve(zz, xz.mT).mT
        variance = (xx - xz[:, -1].square().sum() / zz[-1, -1]) / size
        noise_variance = (xx - (coefficients * xz).sum()) / size
        self.weight.data = coefficients[:, :-1].contiguous()
        self.loc.data = self.loc + coefficients[:, -1]
        self.noise_variance = torch.maximum(noise_variance, self.noise_floor * variance)

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of p(z | x), (N, Q), and the Cholesky factor of M = Wᵀ W + σ² I, (Q, Q)."""
        if x.shape[-1] != self.data_dim:
            raise ValueError(f"x: expected shape (N, {self.data_dim}); got {tuple(x.shape)}.")
        gram = self.weight.mT @ self.weight
        tril = torch.linalg.cholesky(gram + self.noise_variance * torch.eye(self.latent_dim).to(gram))
        return torch.cholesky_solve(((x - self.loc) @ self.weight).mT, tril).mT, tril

    def _log_prob(self, x: Tensor, mean: Tensor, tril: Tensor) -> Tensor:
        residual = x - self.loc - mean @ self.weight.mT
        log_det = (self.data_dim - self.latent_dim) * self.noise_variance.log() + 2 * tril.diagonal().log().sum()
        distance = residual.square().sum(-1) / self.noise_variance + mean.square().sum(-1)
        return -0.5 * (self.data_dim * math.log(2 * math.pi) + log_det + distance)

    def _double(self, x: Tensor) -> Tensor:
        x = check_data(x, data_dim=self.data_dim)
        return x.detach().to(self.loc.device, torch.float64)
