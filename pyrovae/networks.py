"""Encoders and decoders: networks that return distributions.

Weights start uniform with Glorot's bound (Glorot and Bengio 2010), biases at zero, as in Burda et al. (2016).
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
    """Multi-layer perceptron, (..., in_dim) → (..., out_dim). Without ``hidden_dims`` it is a linear map."""

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
        """Return the last layer, which is linear."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer


class NormalNetwork(nn.Module):
    """Network x ↦ N(μ(x), diag σ²(x)): hidden layers, then one linear map to μ and one to log σ."""

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        out_dim: int,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        # One product gives μ and log σ. Weights start as those of two separate (in, out_dim) maps would.
        self.network = MLP(in_dim, hidden_dims, 2 * out_dim, activation)
        bound = math.sqrt(6 / (self.network.output.in_features + out_dim))
        nn.init.uniform_(self.network.output.weight, -bound, bound)

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return a Normal with batch shape (...) and event shape (out_dim,), for x of shape (..., in_dim)."""
        loc, log_scale = self.network(x).chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class NormalSharedScaleNetwork(nn.Module):
    """Network z ↦ N(μ(z), diag σ²). Each feature has one learned σ, which all z share.

    Once ``initialize`` has seen data, the network works in units of each feature's mean and standard deviation.
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
        """Set the units to the mean and the standard deviation of each feature of ``x``, (N, out_dim)."""
        self.feature_loc.copy_(x.mean(0))
        scale = x.std(0, correction=0)
        self.feature_scale.copy_(torch.where(scale > 1e-6 * x.abs().amax(0), scale, 1.0))  # 1 for constant features


class BernoulliNetwork(MLP):
    """Network z ↦ Bernoulli over each feature, given by its logits."""

    likelihood: Callable[..., dist.TorchDistribution] = dist.Bernoulli

    def forward(self, z: Tensor) -> dist.Distribution:
        return self.likelihood(logits=super().forward(z)).to_event(1)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the output's bias to the logit of each feature's mean, kept off 0 and 1 (Burda et al. 2016)."""
        self.output.bias.copy_(torch.logit(x.mean(0), eps=1e-3))


class ContinuousBernoulliNetwork(BernoulliNetwork):
    """Network z ↦ continuous Bernoulli over each feature in [0, 1] (Loaiza-Ganem and Cunningham 2019)."""

    likelihood = dist.ContinuousBernoulli
