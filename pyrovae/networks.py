"""Encoders and decoders: networks that return distributions.

Weights start Glorot-uniform (Glorot and Bengio 2010) and biases at zero, as in Burda et al. (2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = [
    "MLP",
    "BernoulliNetwork",
    "ContinuousBernoulliNetwork",
    "NormalNetwork",
    "NormalSharedScaleNetwork",
]


class MLP(nn.Sequential):
    """A multi-layer perceptron (..., in_dim) → (..., out_dim); with no ``hidden_dims``, a linear map."""

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        out_dim: int,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        layers: list[nn.Module] = []
        for hidden_dim in hidden_dims:
            layers += [nn.Linear(in_dim, hidden_dim), activation()]
            in_dim = hidden_dim
        layers.append(nn.Linear(in_dim, out_dim))
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        super().__init__(*layers)

    @property
    def output(self) -> nn.Linear:
        """The last, linear layer."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer


class NormalNetwork(nn.Module):
    """x ↦ N(μ(x), diag σ²(x)): a trunk of hidden layers, then a linear map to μ and one to log σ."""

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        out_dim: int,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        # One product gives both halves; Glorot's bound is that of two separate (in, out_dim) maps.
        self.network = MLP(in_dim, hidden_dims, 2 * out_dim, activation)
        bound = math.sqrt(6 / (self.network.output.in_features + out_dim))
        nn.init.uniform_(self.network.output.weight, -bound, bound)

    def forward(self, x: Tensor) -> dist.Distribution:
        """(..., in_dim) → a Normal with batch shape (...) and event shape (out_dim,)."""
        loc, log_scale = self.network(x).chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class NormalSharedScaleNetwork(nn.Module):
    """z ↦ N(μ(z), diag σ²) with σ learned for each feature and shared by all z.

    Works in units of the data's mean and standard deviation, feature by feature, once ``initialize`` has seen them.
    """

    feature_loc: Tensor
    feature_scale: Tensor

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        out_dim: int,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        self.network = MLP(in_dim, hidden_dims, out_dim, activation)
        self.log_scale = nn.Parameter(torch.zeros(out_dim))
        self.register_buffer("feature_loc", torch.zeros(out_dim))
        self.register_buffer("feature_scale", torch.ones(out_dim))

    def forward(self, z: Tensor) -> dist.Distribution:
        loc = self.feature_loc + self.feature_scale * self.network(z)
        return dist.Normal(loc, self.feature_scale * self.log_scale.exp()).to_event(1)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start at the data's mean and standard deviation."""
        self.feature_loc.copy_(x.mean(0))
        scale = x.std(0, correction=0)
        self.feature_scale.copy_(torch.where(scale > 1e-6 * x.abs().amax(0), scale, 1.0))  # constant features: 1


class BernoulliNetwork(MLP):
    """z ↦ Bernoulli over each feature, by its logits."""

    likelihood: Callable[..., dist.TorchDistribution] = dist.Bernoulli

    def forward(self, z: Tensor) -> dist.Distribution:
        return self.likelihood(logits=super().forward(z)).to_event(1)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start at the logit of the data's mean (Burda et al. 2016), which is kept off 0 and 1."""
        self.output.bias.copy_(torch.logit(x.mean(0), eps=1e-3))


class ContinuousBernoulliNetwork(BernoulliNetwork):
    """z ↦ continuous Bernoulli over each feature in [0, 1], by its logits (Loaiza-Ganem and Cunningham 2019)."""

    likelihood = dist.ContinuousBernoulli
