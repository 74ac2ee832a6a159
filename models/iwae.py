"""Importance-weighted autoencoder (Burda, Grosse and Salakhutdinov 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
from pyro.infer import ELBO
from torch import Tensor, nn

from pyrovae.checks import check_positive
from pyrovae.infer import RenyiELBO
from pyrovae.networks import BernoulliNetwork, NormalNetwork
from pyrovae.pair import Pair

__all__ = ["IWAE"]


class IWAE(Pair):
    """A chain of L stochastic layers over binary data, trained on K importance weights a datum.

        p(x, z) = N(z_L | 0, I) Π_l p(z_l | z_{l+1}) · Bernoulli(x | z_1)
        q(z | x) = q(z_1 | x) Π_l q(z_{l+1} | z_l)

    Every conditional but the prior is a Gaussian with diagonal covariance (tanh layers, σ = exp(linear)), or the
    Bernoulli at the bottom. The paper's two-layer network on MNIST is
    ``IWAE(784, latent_dims=(100, 50), hidden_dims=((200, 200), (100, 100)), num_particles=50)``.

    Args:
        data_dim: features D of a datum, each in {0, 1}.
        latent_dims: size of each stochastic layer, from the data up.
        hidden_dims: for each stochastic layer, the widths of the hidden layers between it and what lies below.
        num_particles: K of the default loss, ``RenyiELBO(alpha=0, num_particles=K)``.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dims: Sequence[int] = (50,),
        *,
        hidden_dims: Sequence[Sequence[int]] = ((200, 200),),
        num_particles: int = 5,
    ) -> None:
        super().__init__()
        check_positive("data_dim", data_dim, integer=True)
        check_positive("num_particles", num_particles, integer=True)
        if not latent_dims or len(latent_dims) != len(hidden_dims):
            raise ValueError(
                "hidden_dims: expected one group of widths for each of the stochastic layers in "
                f"latent_dims={tuple(latent_dims)}; got {tuple(hidden_dims)}."
            )
        for width in [*latent_dims, *(width for group in hidden_dims for width in group)]:
            check_positive("latent_dims and hidden_dims", width, integer=True)
        self.data_dim, self.latent_dims, self.num_particles = data_dim, tuple(latent_dims), num_particles
        steps = list(zip(pairwise((data_dim, *latent_dims)), hidden_dims, strict=True))
        self.encoders = nn.ModuleList(NormalNetwork(low, hidden, high) for (low, high), hidden in steps)
        self.decoders = nn.ModuleList(NormalNetwork(high, hidden[::-1], low) for (low, high), hidden in steps[1:])
        self.likelihood = BernoulliNetwork(latent_dims[0], hidden_dims[0][::-1], data_dim)

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
        """Start the decoder at the logit of the data's mean."""
        self.likelihood.initialize(x)

    def default_loss(self) -> ELBO:
        return RenyiELBO(alpha=0, num_particles=self.num_particles)
