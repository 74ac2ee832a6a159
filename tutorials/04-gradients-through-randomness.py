# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gradients through randomness
#
# A bound is an expectation under the guide, and we want its gradient in the guide's parameters. Two estimators, the
# score function and the pathwise one, are both right on average; how much they scatter decides what can be trained.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from torch import nn
from torch.distributions import kl_divergence

import pyrovae as pv
from pyrovae.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, log_weight_terms, renyi_bound

# %% [markdown]
# ## Two estimators of one gradient
#
# Let $z \sim \mathcal N(\theta, 1)$ and $f(z) = z^2$. Then $\mathbb E f = \theta^2 + 1$, and its gradient is $2\theta$,
# which is 4 at $\theta = 2$. With $z = \theta + \varepsilon$ for the second form,
#
# $$\nabla_\theta\, \mathbb E[f(z)]
# = \underbrace{\mathbb E\left[f(z)\, \nabla_\theta \log p_\theta(z)\right]}_{\text{score function}}
# = \underbrace{\mathbb E\left[f'(z)\, \nabla_\theta z\right]}_{\text{pathwise}} .$$
#
# For this $f$ the terms are $z^2 (z - \theta)$ and $2z$. Their variances need only the moments of
# $\varepsilon = z - \theta$; the mean of $N$ terms has
#
# $$\mathrm{Var}_{\text{score}} = \frac{\theta^4 + 14\,\theta^2 + 15}{N} = \frac{87}{N}, \qquad
# \mathrm{Var}_{\text{path}} = \frac{4}{N} .$$

# %%
theta, repeats = 2.0, 300
sizes = [10, 100, 1_000, 10_000, 100_000]
published = {"score function": (6.5, 0.68, 0.087, 0.010, 0.00086), "pathwise": (0.46, 0.043, 0.0033, 0.00052, 0.000047)}
exact = {"score function": theta**4 + 14 * theta**2 + 15, "pathwise": 4.0}

torch.manual_seed(0)
estimates = {"score function": [], "pathwise": []}  # by size: (repeats,)
for size in sizes:
    score, path = [], []
    for _ in range(repeats):
        z = theta + torch.randn(size)
        score.append((z.square() * (z - theta)).mean())
        path.append((2 * z).mean())
    estimates["score function"].append(torch.stack(score))
    estimates["pathwise"].append(torch.stack(path))

print("estimator             N     mean   variance      exact  published")
for name, by_size in estimates.items():
    for size, found, number in zip(sizes, by_size, published[name], strict=True):
        variance = exact[name] / size
        print(f"{name:<15}{size:8,d}{found.mean():9.3f}{found.var():#11.2g}{variance:#11.2g}{number:#11.2g}")

# %% [markdown]
# The published variances are sampled too, and so scatter about the exact ones. For the same accuracy the score function
# needs 87 / 4, or about 22, times as many draws.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for (name, by_size), color in zip(estimates.items(), ("C3", "C0"), strict=True):
    left.loglog(sizes, [found.var() for found in by_size], "o", color=color, label=name)
    left.loglog(sizes, [exact[name] / size for size in sizes], "-", color=color, label=f"{exact[name]:.0f} / N")
    left.loglog(sizes, published[name], "x", color="black", label="published" if color == "C0" else None)
    right.hist(by_size[1], bins=40, range=(0, 8), alpha=0.6, color=color, label=name)
left.set(xlabel="draws N", ylabel="variance of the estimate", title="How much the estimates scatter")
left.legend()
right.axvline(4, color="black", linestyle="--", label="the gradient, 4")
right.set(xlabel="estimate", ylabel="repeats", title="300 estimates of 100 draws each")
right.legend()
plt.show()

# %% [markdown]
# ## A baseline
#
# The score has mean zero, so any constant $b$ may be taken from $f$ without moving the mean. The best $b$ more than
# halves the variance, and asks for no derivative of $f$:
#
# $$\mathrm{Var}\left[(z^2 - b)(z - \theta)\right] = 87 - 14\,b + b^2, \qquad \text{38 at best, where } b = 7$$

# %%
z = theta + torch.randn(2_000_000)
for b in (0.0, 5.0, 7.0):
    found = ((z.square() - b) * (z - theta)).var()
    print(f"b = {b:.0f}: variance of one term {found:6.2f}, exact {87 - 14 * b + b**2:.0f}")

# %% [markdown]
# ## Guides with discrete sites
#
# A category is no smooth function of noise, so it has no pathwise gradient. Three ways are left:
#
# - **enumeration**: all values, weighted, $\sum_z q(z \mid x) \left[\log p(x, z) - \log q(z \mid x)\right]$; no noise;
# - **score function**: `Trace_ELBO` takes it for the sites that need it;
# - **score function with a baseline** made of the other draws (VIMCO, Mnih and Rezende 2016): `RenyiELBO(alpha=0)` has
#   it, for the importance-weighted bound of $K$ draws.
#
# $$\mathcal L_K = \mathbb E_{z_1 \dots z_K \sim q}\Big[\log \frac1K \sum_k w_k\Big], \qquad
# \nabla \mathcal L_K = \mathbb E\Big[\sum_k \left(\hat{\mathcal L}_K - \hat{\mathcal L}_{-k}\right) \nabla \log q(z_k)
# + \nabla \hat{\mathcal L}_K\Big]$$
#
# Here $\hat{\mathcal L}_{-k}$ has $\log w_k$ replaced by the mean of the others. A small case: the guide has free
# logits for each datum, and all 20,000 data are the same: each row of the gradient is one more estimate of one thing.


# %%
LOC = torch.tensor([[-2.0], [0.0], [2.0]])  # of three equally likely components


class Which(pv.Pair):
    def __init__(self, num_data):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_data, 3))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=x.new_zeros(3)))
            pyro.sample("x", dist.Normal(LOC[z], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.logits))


x = torch.full((20_000, 1), 1.5)


def exact_gradient(num_particles):  # of L_K, over all 3^K draws; L_1 is the ELBO
    logits = torch.zeros(3, requires_grad=True)
    log_q = logits.log_softmax(0)
    log_w = dist.Normal(LOC[:, 0], 1.0).log_prob(x[0]) - torch.tensor(3.0).log() - log_q
    draws = torch.cartesian_prod(*[torch.arange(3)] * num_particles).reshape(-1, num_particles)
    bound = log_w[draws].logsumexp(1) - torch.tensor(float(num_particles)).log()
    return torch.autograd.grad((log_q[draws].sum(1).exp() * bound).sum(), logits)[0]


def score_function(pair, num_particles):  # L_K without a baseline, by hand
    terms = log_weight_terms(pair.model, pair.guide, x, num_particles=num_particles)
    bound = renyi_bound(terms.log_weights, alpha=0)  # (N,)
    return (bound + bound.detach() * (terms.score.sum(0) - terms.score.sum(0).detach())).sum()


pair = Which(len(x))
objectives = {
    "enumeration": (1, -TraceEnum_ELBO().differentiable_loss(pair.model, config_enumerate(pair.guide), x)),
    "score function": (1, -Trace_ELBO(num_particles=8).differentiable_loss(pair.model, pair.guide, x)),
    "the same for L_8": (8, score_function(pair, 8)),
    "VIMCO": (8, -RenyiELBO(alpha=0, num_particles=8).differentiable_loss(pair.model, pair.guide, x)),
}
print("bound           draws          exact gradient       mean of estimates   their noise")
for name, (num_particles, objective) in objectives.items():
    found = torch.autograd.grad(objective, pair.logits)[0]
    noise = found.var(0).sum().sqrt()
    exact, mean = ("".join(f"{v:8.3f}" for v in values) for values in (exact_gradient(num_particles), found.mean(0)))
    draws = "all" if name == "enumeration" else 8
    print(f"{name:<18}{draws:>3}{exact}{mean}{noise:14.3f}")

# %% [markdown]
# All are right on average. The baseline takes most of the noise out of the gradient of $\mathcal L_8$. But that
# gradient is itself small: the bound of eight draws is nearly tight whatever the guide is, so it says little about it.
# (In Pyro 1.9.2 `RenyiELBO` leaves the first term out, and a discrete site learns nothing from it.)
#
# ## What it means for training
#
# Now one network for all data. The posterior's logits are linear in $x$, so a linear guide can be exact. The gap
# $\mathrm{KL}(q \,\|\, p(z \mid x))$ shows how fast each objective gets there, with mini-batches of 20.


# %%
class Amortized(Which):
    def __init__(self):
        super().__init__(0)
        self.encoder = nn.Linear(1, 3)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.encoder(x)))


torch.manual_seed(1)
x = LOC[torch.randint(3, (500,))] + torch.randn(500, 1)
posterior = dist.Categorical(logits=dist.Normal(LOC[:, 0], 1.0).log_prob(x))

losses = {
    "enumeration": TraceEnum_ELBO(),
    "score function, 8 draws": Trace_ELBO(num_particles=8),
    "VIMCO, 8 draws": RenyiELBO(alpha=0, num_particles=8),
    "VIMCO, 2 draws": RenyiELBO(alpha=0, num_particles=2),
}
gaps = {}
for name, loss in losses.items():
    torch.manual_seed(0)
    pair = Amortized()
    guide = config_enumerate(pair.guide) if name == "enumeration" else pair.guide
    svi = SVI(pair.model, guide, torch.optim.Adam(pair.encoder.parameters(), lr=0.03), loss)
    gaps[name] = []
    for step in range(301):
        if step % 10 == 0:
            with torch.no_grad():
                gaps[name].append(kl_divergence(dist.Categorical(logits=pair.encoder(x)), posterior).mean().item())
        svi.step(x[torch.randint(500, (20,))])
    print(f"{name:<24} gap after 300 steps: {gaps[name][-1]:.4f} nats per datum")

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
for name, gap in gaps.items():
    axes.semilogy(range(0, 301, 10), gap, label=name)
axes.set(xlabel="step", ylabel="gap (nats per datum)", title="A discrete guide, four objectives")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# So: a pathwise gradient where the guide's distribution has one; enumeration where the values are few; a baseline where
# neither can be had. And a tighter bound is not always a better teacher of the guide (Rainforth et al. 2018).
#
# ## A question to try
#
# Look at `exact_gradient(K)` for $K$ = 1, 2, 4, 8. How does the gradient shrink, and how must the noise shrink for the
# guide to learn as fast as before? Then train with `num_particles` 2 and 64, and see whether you were right.
