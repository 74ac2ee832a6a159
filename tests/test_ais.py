"""Annealed importance sampling against exact answers, and the theorems that make it a check."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.evaluate import ais, evaluate, sample
from pyrovae.evaluate.ais import annealed_evidence, bidirectional_evidence
from pyrovae.evaluate.prepare import NotApplicable

NUM_SE = 5  # standard errors allowed in statistical tests


class Linear(pv.Pair):
    """z ~ N(0, I), x | z ~ N(W z, σ² I). The guide is exact, apart from ``shift`` and ``widen``."""

    data_dim, latent_dim, noise = 3, 2, 0.5

    def __init__(self, shift=0.0, widen=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.3], [-0.5, 0.8], [0.2, -0.4]]))
        self.shift, self.widen = shift, widen

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.mT, self.noise).to_event(1), obs=x)

    def guide(self, x):
        precision = torch.eye(self.latent_dim).to(x) + self.weight.mT @ self.weight / self.noise**2
        loc = torch.linalg.solve(precision, self.weight.mT @ x.mT / self.noise**2).mT + self.shift
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, torch.linalg.inv(precision) * self.widen**2))

    def log_prob(self, x):
        weight = self.weight.double()
        return normal_log_prob(weight @ weight.mT + self.noise**2 * torch.eye(self.data_dim).double(), x)


class TwoLayers(pv.Pair):
    """z2 ~ N(0, I), z1 | z2 ~ N(A z2, I/4), x | z1 ~ N(B z1, I/4). The guide samples z1 first, and is the prior's size."""

    data_dim = 3

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.upper = nn.Parameter(torch.randn(2, 2, generator=generator))
        self.lower = nn.Parameter(torch.randn(3, 2, generator=generator))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 @ self.upper.mT, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z1 @ self.lower.mT, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x[:, :2], 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(z1, 1.0).to_event(1))

    def log_prob(self, x):
        upper, lower, eye = self.upper.double(), self.lower.double(), torch.eye(3).double()
        of_z1 = upper @ upper.mT + 0.25 * eye[:2, :2]
        return normal_log_prob(lower @ of_z1 @ lower.mT + 0.25 * eye, x)


class Mixed(pv.Pair):
    """c ~ Categorical, z | c ~ N(m_c, s_c²), x | z, c ~ N(w_c z, σ²): c is summed out, and ties prior and likelihood."""

    data_dim, noise = 1, 0.3

    def __init__(self):
        super().__init__()
        self.odds = nn.Parameter(torch.tensor([0.2, 0.5, 0.3]))
        self.loc = nn.Parameter(torch.tensor([-2.0, 0.5, 3.0]))
        self.scale = torch.tensor([0.5, 1.0, 0.3])
        self.weight = torch.tensor([1.0, -1.0, 2.0])

    def model(self, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(self.odds), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.loc[c], self.scale[c]))
            pyro.sample("x", dist.Normal((self.weight[c] * z).unsqueeze(-1), self.noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], 2.0))

    def log_prob(self, x):
        parts = dist.Normal(self.weight * self.loc, (self.weight**2 * self.scale**2 + self.noise**2).sqrt())
        return (parts.log_prob(x) + self.odds.log()).logsumexp(-1)


class Constrained(pv.Pair):
    """z from a prior with a support of its own, x | z ~ N(z_1, 0.3²), where z_1 is z or its first element."""

    data_dim, noise = 1, 0.3

    def __init__(self, prior):
        super().__init__()
        self.unit = nn.Parameter(torch.tensor(1.0))
        self.prior = prior

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)
            z = z[..., :1] if self.prior.event_shape else z.unsqueeze(-1)
            pyro.sample("x", dist.Normal(self.unit * z, self.noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.prior)

    def log_prob(self, x):
        """By quadrature over u, where z = exp(u), or z = sigmoid(u) in (0, 1)."""
        u = torch.linspace(-30, 10, 20_001, dtype=torch.float64)
        marginal = self.prior
        if marginal.event_shape:
            concentration = marginal.concentration
            marginal = dist.Beta(concentration[0], concentration.sum() - concentration[0])
        in_unit = marginal.support is dist.constraints.unit_interval
        # Below -15 the density of z has nothing left that float32 could tell from 0.
        z = u.sigmoid() if in_unit else u.exp()
        jacobian = (z * (1 - z)).log() if in_unit else u
        inside = torch.isfinite(marginal.log_prob(z)) & torch.isfinite(jacobian)
        log_joint = marginal.log_prob(z) + jacobian + dist.Normal(z, self.noise).log_prob(x.double())
        return log_joint[:, inside].logsumexp(-1) + math.log(u[1] - u[0])


class Parts(pv.Pair):
    """Two latents a datum in a plate of their own, x_j | z_j ~ N(z_j + a, 0.5²), and a third beside them."""

    data_dim = 2

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(self.loc, 0.5))
            with pyro.plate("parts", 2, dim=-2):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            both = (z + a.unsqueeze(-2) if a.dim() == 1 else z + a).movedim(-2, -1)
            pyro.sample("x", dist.Normal(both, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Normal(self.loc, 1.0))
            with pyro.plate("parts", 2, dim=-2):
                pyro.sample("z", dist.Normal(x.mT, 1.0))

    def log_prob(self, x):
        return normal_log_prob(1.25 * torch.eye(2).double() + 0.25, x - self.loc)


class GlobalMean(pv.Pair):
    data_dim = 1

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(x.new_zeros(()), 3.0))


class Discrete(pv.Pair):
    """A discrete latent that nobody marked for enumeration."""

    data_dim = 1

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))


class TwoSites(Linear):
    """Observes x in two pieces."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = z @ self.weight.mT
            pyro.sample("x1", dist.Normal(loc[..., :1], self.noise).to_event(1), obs=x[:, :1])
            pyro.sample("x2", dist.Normal(loc[..., 1:], self.noise).to_event(1), obs=x[:, 1:])


def normal_log_prob(covariance, x):
    zero = torch.zeros(len(covariance), dtype=torch.float64)
    return torch.distributions.MultivariateNormal(zero, covariance).log_prob(x.double())


def assert_agrees(found, pair, x):
    """With the exact evidence, within the errors stated; data are taken one by one in the second check."""
    exact = pair.log_prob(x).detach().double()
    assert 0 < found.log_evidence_stderr < 0.1  # else the test would say nothing
    assert abs(found.log_evidence - exact.mean().item()) < NUM_SE * found.log_evidence_stderr
    assert found.log_evidence_per_datum.shape == exact.shape
    each = found.log_evidence_stderr * math.sqrt(len(x))  # the root mean square of the errors of single data
    assert (found.log_evidence_per_datum - exact).square().mean().sqrt() < 3 * each


# Against exact answers


SUPPORTS = {
    "LogNormal": dist.LogNormal(0.2, 0.7),
    "Gamma": dist.Gamma(2.0, 1.5),
    "Beta": dist.Beta(2.0, 3.0),
    "Dirichlet": dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0])),
}


@pytest.mark.parametrize("pair", [Linear, TwoLayers, Mixed, Parts], ids=lambda pair: pair.__name__)
def test_exact_evidence(pair):
    pair = pair()
    x = sample(pair, 40, seed=1)
    assert_agrees(annealed_evidence(pair, x, num_temperatures=60, num_chains=32), pair, x)


@pytest.mark.parametrize("prior", SUPPORTS.values(), ids=SUPPORTS)
def test_constrained_latents_against_quadrature(prior):
    pair = Constrained(prior)
    x = sample(pair, 20, seed=1)
    assert_agrees(annealed_evidence(pair, x, num_temperatures=30, num_chains=32), pair, x)
