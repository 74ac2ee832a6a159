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
# # A first pair
#
# Write a model and a guide, fit both by stochastic variational inference (SVI), check them against the exact answer.
# Then break the guide on purpose, and see which numbers notice.

# %%
import copy
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrovae as pv
from pyrovae.evaluation import guide_quality, simulation_based_calibration

# %% [markdown]
# ## The model and its guide
#
# A scale weighs each object $n$ once. Its true weight $z_n$ is hidden; the scale shows $x_n$, off by $\sigma = 0.5$.
#
# $$p(z) = \mathcal N(m, s^2), \qquad p(x \mid z) = \mathcal N(z, \sigma^2)$$
#
# The population's $m$ and $s$ are to be learned. The *guide* is our guess of the posterior $p(z \mid x)$: a Gaussian
# whose mean is a line in $x$. One guide serves all data, so it is called *amortized*.
#
# $$q(z \mid x) = \mathcal N(a x + b, w^2)$$

# %%
NOISE = 0.5


class Weighing(pv.Pair):
    def __init__(self):
        super().__init__()
        self.m, self.log_s = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.a, self.b, self.log_w = (nn.Parameter(torch.zeros(1)) for _ in range(3))

    def model(self, x):  # p(x, z); x: (batch, 1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.m, self.log_s.exp()).to_event(1))
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)

    def guide(self, x):  # q(z | x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.a * x + self.b, self.log_w.exp()).to_event(1))


# %% [markdown]
# ## Fit
#
# SVI raises the evidence lower bound (ELBO) by gradient ascent in the model's and the guide's parameters together.
# What the bound misses is how far the guide is from the posterior:
#
# $$\log p(x) = \underbrace{\mathbb E_{q}\left[\log p(x, z) - \log q(z \mid x)\right]}_{\text{ELBO}}
# + \mathrm{KL}\left(q(z \mid x) \,\|\, p(z \mid x)\right)$$

# %%
torch.manual_seed(0)
weights = 3.0 + 1.2 * torch.randn(500, 1)  # what nobody sees
x = weights + NOISE * torch.randn(500, 1)

pair = Weighing()
result = pv.fit(pair, x, epochs=300, lr=0.05, seed=0)
print(result)

# %% [markdown]
# ## Check
#
# Normal times normal is normal, so everything here has an exact answer. The evidence is
# $p(x) = \mathcal N(m, s^2 + \sigma^2)$, so the most likely $m$ and $s^2$ are the data's mean and their variance less
# $\sigma^2$; and the posterior is
#
# $$p(z \mid x) = \mathcal N\left(a x + b,\; w^2\right), \qquad
# a = \frac{s^2}{s^2 + \sigma^2}, \quad b = (1 - a)\, m, \quad w = \sqrt a\, \sigma .$$

# %%
m, s2 = x.mean(), x.var(correction=0) - NOISE**2
a = s2 / (s2 + NOISE**2)
exact = {"m": m, "s": s2.sqrt(), "a": a, "b": (1 - a) * m, "w": a.sqrt() * NOISE}
found = {"m": pair.m, "s": pair.log_s.exp(), "a": pair.a, "b": pair.b, "w": pair.log_w.exp()}
print("      exact  found")
for name, value in exact.items():
    print(f"{name}   {value:8.3f}{found[name].item():7.3f}")

evidence = dist.Normal(m, (s2 + NOISE**2).sqrt()).log_prob(x).mean().item()
print(f"\nexact log evidence, nats per datum: {evidence:.3f}")

# %% [markdown]
# `evaluate` needs no exact answer. It draws $z_{kn}$ from the guide and computes the *importance weights*
# $w_{kn} = p(x_n, z_{kn}) / q(z_{kn} \mid x_n)$: their mean estimates $p(x_n)$, the mean of their logarithms the ELBO.

# %%
pv.evaluate(pair, x, num_samples=1000)

# %%
z = torch.linspace(-0.5, 6.5, 300)
datum = x[:1]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.plot([row["epoch"] for row in result.history], [row["train_bound"] for row in result.history], label="ELBO")
left.axhline(evidence, color="black", linestyle="--", label="exact log evidence, at its best")
left.set(xlabel="epoch", ylabel="nats per datum", ylim=(evidence - 0.6, evidence + 0.1), title="Training")
left.legend()
right.plot(z, dist.Normal(m, s2.sqrt()).log_prob(z).exp(), color="grey", label="prior")
right.plot(z, dist.Normal(a * datum[0] + exact["b"], exact["w"]).log_prob(z).exp(), label="posterior, exact")
with torch.no_grad():
    guide = dist.Normal(pair.a * datum[0] + pair.b, pair.log_w.exp()).log_prob(z).exp()
right.plot(z, guide, linestyle="--", label="guide, learned")
right.axvline(datum.item(), color="black", linewidth=0.8, label="$x$")
right.set(xlabel="$z$", ylabel="density", title="One object: what the guide says")
right.legend()
plt.show()

# %% [markdown]
# ## Break it
#
# The model stays as it is; three guides are worse than the learned one. Suppose there were no exact answer: what would
# tell? Apart from the ELBO, two things do.
#
# **The weights.** A guide much narrower than the posterior misses its tails, and there the weights are huge: of $K$
# draws few count, which the effective sample size says. For a Gaussian $\rho$ times as wide as the posterior,
# $\rho < 1$, the weights have a Pareto tail of index $k$. Above 0.5 their variance is infinite; above 0.7 believe no
# estimate that is made of them (Vehtari et al. 2024).
#
# $$\mathrm{ESS} = \frac{\left(\sum_k w_k\right)^2}{\sum_k w_k^2}, \qquad k = 1 - \rho^2$$
#
# **The ranks.** Draw $z$ and $x$ from the model, then many draws from $q(z \mid x)$. If the guide is the posterior, the
# true $z$ has any rank among them with equal chance (Talts et al. 2018), and so has $\log p(x \mid z)$.


# %%
def changed(**values):  # the learned pair with other numbers in its guide
    other = copy.deepcopy(pair)
    with torch.no_grad():
        for name, value in values.items():
            getattr(other, name).fill_(value)
    return other


width = pair.log_w.item()
guides = {
    "as learned": pair,
    "too narrow": changed(log_w=width + math.log(0.3)),
    "too wide": changed(log_w=width + math.log(2.0)),
    "blind to x": changed(a=0.0, b=pair.m.item(), log_w=pair.log_s.item()),
}
ranks = {}
print("guide          ELBO     log evidence    median k   least ESS of 1000   ranks: p-value")
for name, broken in guides.items():
    scores = pv.evaluate(broken, x, num_samples=1000)
    quality = guide_quality(broken, x, num_samples=1000)
    ranks[name] = simulation_based_calibration(broken, data_dim=1)
    print(
        f"{name:<12}{scores.elbo:7.3f}{scores.log_evidence:9.3f} ± {scores.log_evidence_stderr:.3f}"
        f"{quality.k.median():12.2f}{quality.ess.min():20.1f}{ranks[name].p_value:18.2g}"
    )

# %%
figure, panels = plt.subplots(2, 4, figsize=(9, 3.6), layout="constrained", sharex=True, sharey=True)
for column, (name, found) in zip(panels.T, ranks.items(), strict=True):
    for axes, quantity in zip(column, ("z", "log p(x | z)"), strict=True):
        axes.hist(found.tests[quantity].ranks[:, 0], bins=range(0, 101, 10), rwidth=0.9)
        axes.axhline(100, color="black", linestyle="--", linewidth=1)
    column[0].set_title(name)
panels[0, 0].set_ylabel("$z$")
panels[1, 0].set_ylabel(r"$\log p(x \mid z)$")
figure.supxlabel("rank of the truth among 99 draws, 1,000 simulations")
plt.show()

# %% [markdown]
# The narrow guide has a *better* ELBO than the wide one, and is the worse of the two. Its evidence is wrong by many
# times the error bar, for the weights that would mend it were not drawn. Its $k$ says so: 0.91 by the formula, of which
# a thousand draws see most. The wide guide only wastes draws: a $k$ below zero means no tail at all. The blind guide,
# which repeats the prior, fools the ranks of $z$, but not those of $\log p(x \mid z)$.
#
# ## Mistakes in the code
#
# A guide that does not fit its model at all is named before training starts.


# %%
class Misspelt(Weighing):
    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("weight", dist.Normal(self.a * x + self.b, self.log_w.exp()).to_event(1))


class ForgottenEvent(Weighing):
    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.a * x + self.b, self.log_w.exp()))  # no to_event(1)


for mistaken in (Misspelt(), ForgottenEvent()):
    try:
        pv.fit(mistaken, x)
    except ValueError as error:
        print(f"{type(mistaken).__name__}:\n{error}\n")

# %% [markdown]
# ## A question to try
#
# Give the guide a heavy tail, `dist.StudentT(4.0, ...)` in place of `dist.Normal`, and let it be too narrow again. Its
# ELBO cannot reach the evidence now. What happens to the least effective sample size, and why?
