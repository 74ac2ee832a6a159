"""Encoders and decoders: networks that return distributions.

Weights start Glorot-uniform (Glorot and Bengio 2010) and biases at zero, as in Burda et al. (2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["MLP", "BernoulliNetwork", "ContinuousBernoulliNetwork", "NormalNetwork", "NormalSharedScaleNetwork"]


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
