"""Variational autoencoder (Kingma and Welling 2014; Rezende, Mohamed and Wierstra 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyrovae.checks import check_choice, check_positive
from pyrovae.infer import TraceMeanField_ELBO
from pyrovae.networks import (
    BernoulliNetwork,
    ContinuousBernoulliNetwork,
    NormalNetwork,
    NormalSharedScaleNetwork,
)
from pyrovae.pair import Pair

__all__ = ["VAE"]

DECODERS: dict[str, type[BernoulliNetwork] | type[NormalSharedScaleNetwork]] = {
    "bernoulli": BernoulliNetwork,
    "normal": NormalSharedScaleNetwork,
    "continuous-bernoulli": ContinuousBernoulliNetwork,
}


class VAE(Pair):
    """Deep latent Gaussian model with an amortized Gaussian guide.

        p(z) = N(0, I),    p(x | z) = likelihood(decoder(z)),    q(z | x) = N(μ(x), diag σ²(x))

    Args:
        data_dim: number D of features.
        latent_dim: number of dimensions of z.
        hidden_dims: widths of the encoder's hidden layers (tanh); the decoder mirrors them.
        likelihood: ``bernoulli`` for pixels in {0, 1}, ``continuous-bernoulli`` for grey pixels in [0, 1]
            (Loaiza-Ganem and Cunningham 2019), ``normal`` for real features, with a learned scale for each.
    """

    feature_loc: Tensor
    feature_scale: Tensor

    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 50,
        *,
        hidden_dims: int | Sequence[int] = (200, 200),
        likelihood: Literal["bernoulli", "normal", "continuous-bernoulli"] = "bernoulli",
    ) -> None:
        super().__init__()
        check_positive("data_dim", data_dim, integer=True)
        check_positive("latent_dim", latent_dim, integer=True)
        hidden_dims = (hidden_dims,) if isinstance(hidden_dims, int) else tuple(hidden_dims)
        for width in hidden_dims:
            check_positive("hidden_dims", width, integer=True)
        check_choice("likelihood", likelihood, DECODERS)
        self.data_dim, self.latent_dim = data_dim, latent_dim
        self.encoder = NormalNetwork(data_dim, hidden_dims, latent_dim)
        self.register_buffer("feature_loc", torch.zeros(data_dim))
        self.register_buffer("feature_scale", torch.ones(data_dim))
        self.decoder = DECODERS[likelihood](latent_dim, hidden_dims[::-1], data_dim)

    def model(self, x: Tensor) -> None:  # x: (batch, data_dim)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder((x - self.feature_loc) / self.feature_scale))

    def initialize(self, x: Tensor) -> None:
        """Start the decoder at the mean of ``x``, (N, D), and standardise real features for the encoder."""
        self.decoder.initialize(x)
        if isinstance(self.decoder, NormalSharedScaleNetwork):
            self.feature_loc.copy_(self.decoder.feature_loc)
            self.feature_scale.copy_(self.decoder.feature_scale)

    def default_loss(self) -> ELBO:
        """Return the ELBO with its KL in closed form: the same bound, with less noise."""
        return TraceMeanField_ELBO()
