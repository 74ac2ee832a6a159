"""Pairs that several tests of evaluation use."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrovae as pv


class GlobalMean(pv.Pair):
    """mu ~ N(0, 3²), x ~ N(mu, 1). The guide is the exact posterior of the data given, widened."""

    data_dim = 1

    def __init__(self, x, widen=1.0):
        super().__init__()
        variance = 1 / (len(x) + 1 / 9)
        self.loc = nn.Parameter(x.sum() * variance)
        self.scale = math.sqrt(variance) * widen

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(self.loc, self.scale))

    def evidence(self, x):
        n, x = len(x), x.double()
        covariance = torch.eye(n, dtype=torch.float64) + 9.0
        zero = torch.zeros(n, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(zero, covariance).log_prob(x[:, 0]).item() / n
