"""Importance-weighted autoencoder (Burda, Grosse and Salakhutdinov 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.infer import ELBO
from torch import Tensor, nn

from pyrovae.checks import check_positive
from pyrovae.infer import RenyiELBO
from pyrovae.networks import BernoulliNetwork, NormalNetwork
from pyrovae.pair import Pair

__all__ = ["IWAE"]

DEFAULT_WIDTHS = (200, 200)


class IWAE(Pair):
    """Chain of L stochastic layers over binary data, trained on K importance weights a datum.

        p(x, z) = N(z_L | 0, I) Π_l p(z_l | z_{l+1}) · Bernoulli(x | z_1)
        q(z | x) = q(z_1 | x) Π_l q(z_{l+1} | z_l)

    Networks with tanh layers give every conditional: Gaussians with diagonal covariance, σ = exp(linear), and the
    Bernoulli of the data. The paper's two-layer network on MNIST is
    ``IWAE(784, latent_dims=(100, 50), hidden_dims=((200, 200), (100, 100)), num_particles=50)``.

    Args:
        data_dim: number D of features, each in {0, 1}.
        latent_dims: size of each stochastic layer, from the data up. One number means one layer.
        hidden_dims: widths of the hidden layers below each stochastic layer, one group a layer. With one stochastic
            layer, its widths alone will do. The default is (200, 200) for every layer.
        num_particles: number K of particles of the default loss, ``RenyiELBO(alpha=0, num_particles=K)``.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dims: int | Sequence[int] = (50,),
        *,
        hidden_dims: int | Sequence[int] | Sequence[Sequence[int]] = (DEFAULT_WIDTHS,),
        num_particles: int = 5,
    ) -> None:
        super().__init__()
        check_positive("data_dim", data_dim, integer=True)
        check_positive("num_particles", num_particles, integer=True)
        latent_dims = tuple(latent_dims) if isinstance(latent_dims, Sequence) else (latent_dims,)
        if not latent_dims:
            raise ValueError("latent_dims: expected the size of one stochastic layer or more; got none.")
        for size in latent_dims:
            check_positive("latent_dims", size, integer=True)
        groups = _groups(hidden_dims, latent_dims)
        self.data_dim, self.latent_dims, self.num_particles = data_dim, latent_dims, num_particles
        steps = list(zip(pairwise((data_dim, *latent_dims)), groups, strict=True))
        self.encoders = nn.ModuleList(NormalNetwork(low, hidden, high) for (low, high), hidden in steps)
        self.decoders = nn.ModuleList(NormalNetwork(high, hidden[::-1], low) for (low, high), hidden in steps[1:])
        self.likelihood = BernoulliNetwork(latent_dims[0], groups[0][::-1], data_dim)

    def model(self, x: Tensor) -> None:  # x: (batch, data_dim)
        top = len(self.latent_dims)
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{top}", dist.Normal(x.new_zeros(self.latent_dims[-1]), 1.0).to_event(1))
            for layer in range(top - 1, 0, -1):
                z = pyro.sample(f"z{layer}", self.decoders[layer - 1](z))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = x
            for layer, encoder in enumerate(self.encoders, start=1):
                z = pyro.sample(f"z{layer}", encoder(z))

    def initialize(self, x: Tensor) -> None:
        """Start the decoder at the logit of the mean of ``x``, (N, D)."""
        self.likelihood.initialize(x)

    def default_loss(self) -> ELBO:
        return RenyiELBO(alpha=0, num_particles=self.num_particles)


def _groups(hidden_dims: Any, latent_dims: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the widths of the hidden layers, one group for each stochastic layer."""
    groups = hidden_dims if isinstance(hidden_dims, Sequence) else (hidden_dims,)
    if not any(isinstance(group, Sequence) for group in groups):
        groups = (groups,)
    groups = tuple(tuple(group) if isinstance(group, Sequence) else group for group in groups)
    if groups == (DEFAULT_WIDTHS,):
        groups *= len(latent_dims)
    if len(groups) != len(latent_dims) or not all(isinstance(group, tuple) for group in groups):
        example = tuple((2 * size,) for size in latent_dims)
        raise ValueError(
            f"hidden_dims: expected one group of widths for each of the {len(latent_dims)} stochastic layers in "
            f"latent_dims={latent_dims}; got {hidden_dims!r}. Write hidden_dims={example}; on the command line, --set "
            f"'hidden_dims={str(example).replace(' ', '')}'."
        )
    for width in (width for group in groups for width in group):
        check_positive("hidden_dims", width, integer=True)
    return groups
