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
# # Is my guide any good?
#
# One VAE, four guides for it, and everything there is to ask of a guide: what has collapsed, can its evidence be
# trusted, where does its bound lose. At the end stands a table that can be published.

# %%
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyrovae as pv
from pyrovae.evaluation import annealed_evidence, collapse, guide_quality, inference_gaps
from pyrovae.networks import MLP, BernoulliNetwork
from pyrovae.plots import plot_gaps

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ announces, once a day, that it will change
    import arviz as az

data = pv.data.load("digits", binarize=False)
x, x_test = (data.train > 0.5).float(), (data.test > 0.5).float()
few = x_test[:100]  # for what takes long

# %% [markdown]
# ## One model, four guides
#
# A model is trained together with its guide, so whoever compares two trained VAEs compares two models. To compare
# guides, we train a VAE once, hold its decoder, and give it three more guides. Two differ in the network that maps
# $x$ to a Gaussian with a diagonal covariance; the third may use any covariance.


# %%
class DigitsPair(pv.Pair):
    def __init__(self, decoder, hidden_dims, *, full=False, dim=16):
        super().__init__()
        self.decoder, self.dim, self.full = decoder, dim, full
        self.encoder = MLP(64, hidden_dims, dim + (dim * dim if full else dim))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.dim), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x):
        loc, rest = self.encoder(x).tensor_split([self.dim], dim=-1)
        if self.full:
            square = rest.unflatten(-1, (self.dim, self.dim))
            diagonal = square.diagonal(dim1=-2, dim2=-1).exp()
            q = dist.MultivariateNormal(loc, scale_tril=square.tril(-1) + diagonal.diag_embed())
        else:
            q = dist.Normal(loc, rest.exp()).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)


torch.manual_seed(0)
decoder = BernoulliNetwork(16, [200], 64)
decoder.initialize(x)
pairs = {
    "100, the first": DigitsPair(decoder, [100]),
    "linear": DigitsPair(decoder, []),
    "200, 200": DigitsPair(decoder, [200, 200]),
    "200, 200, full": DigitsPair(decoder, [200, 200], full=True),
}
for pair in pairs.values():
    pv.fit(pair, x, loss="TraceMeanField_ELBO", epochs=60, lr=5e-3)
    decoder.requires_grad_(False)  # the first pair has trained it

# %% [markdown]
# ## What has collapsed?
#
# A dimension of $z$ is worth what it tells about the datum, in nats. `collapse` measures that, dimension by
# dimension, and says it in words. Here for the first pair, and for a deeper VAE with 32 dimensions, which cannot
# use them all:

# %%
torch.manual_seed(0)
deep = pv.models.VAE(64, 32, hidden_dims=(200, 200))
pv.fit(deep, x, epochs=60, lr=5e-3)

first = pairs["100, the first"]
reports = {"16 dimensions": collapse(first, x_test), "32, deeper": collapse(deep, x_test)}
for name, report in reports.items():
    print(f"{name:<15}{report.latents['z'].text}")

figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
for name, report in reports.items():
    axes.plot(sorted(report.latents["z"].information_per_dimension, reverse=True), ".-", label=name)
axes.set(xlabel="dimension of $z$, sorted", ylabel="nats about the datum", title="What each dimension tells")
axes.legend()
plt.show()

# %% [markdown]
# ## Is the evidence right?
#
# All four guides are asked for the evidence of one model, so they should agree. `evaluate` estimates it by importance
# sampling from the guide, $\log p(x) \approx \log \frac1K \sum_k w_k$ with $w_k = p(x, z_k) / q(z_k \mid x)$. A guide
# that misses a part of the posterior gives a value that is too low, and an error bar that does not know.
#
# The shape $\hat k$ of the weights' upper tail does know (Vehtari et al. 2024). Below 0.5 the weights have a finite
# variance, above 0.7 their mean is not to be relied on. It is a diagnosis of each *datum*.

# %%
print(f"{'guide':<16}{'log evidence':>20}{'ELBO':>10}{'k̂ > 0.7':>10}")
quality = {}
for name, pair in pairs.items():
    scores = pv.evaluate(pair, few, num_samples=2000)
    quality[name] = guide_quality(pair, few, num_samples=2000)
    evidence = f"{scores.log_evidence:.3f} ± {scores.log_evidence_stderr:.3f}"
    print(f"{name:<16}{evidence:>20}{scores.elbo:>10.3f}{quality[name].num_bad / len(few):>10.0%}")

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, found in quality.items():
    axes.plot(found.k.sort().values, label=name)
axes.axhspan(0.7, 1, color="C3", alpha=0.12, linewidth=0, label="do not rely on it")
axes.set(xlabel="datum, sorted", ylabel="Pareto k̂", ylim=(-0.2, 1), title="Importance weights of 100 test images")
axes.legend(fontsize="small")
plt.show()

# %% [markdown]
# A second opinion that uses no guide: annealed importance sampling (Neal 2001) moves samples by Hamiltonian dynamics
# from the prior to the posterior, in many small steps. This estimate, too, is rather too low than too high: where the
# two agree that is good news, and where they do not, believe the higher one.

# %%
annealed_evidence(pairs["linear"], few, num_temperatures=300, num_chains=5)

# %% [markdown]
# ## Where does the bound lose?
#
# Let $q^*$ be the best guide of the family for a datum, found for that datum alone. Then the loss has two parts
# (Cremer, Li and Duvenaud 2018):
#
# $$\log p(x) - \mathrm{ELBO}(q) = \underbrace{\log p(x) - \mathrm{ELBO}(q^*)}_{\text{approximation gap}}
# + \underbrace{\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)}_{\text{amortization gap}}$$
#
# The first asks for another family, the second for a better network, or for more data.

# %%
gaps = {name: inference_gaps(pair, few, num_samples=500, num_steps=200) for name, pair in pairs.items()}
print(gaps["linear"])
plot_gaps(gaps)

# %% [markdown]
# The three diagonal guides have one approximation gap, as they must: it is a matter of the family. The full
# covariance halves it, and has more to amortize. The networks differ in the other gap alone.
#
# ## A table to publish
#
# `to_arviz` turns a pair into an `InferenceData`. Its log likelihood is that of each test image with $z$ integrated
# out, so `az.compare` ranks the two models by the evidence of data that neither has seen, in nats over all 360. `dse`
# is the standard error of the difference, image by image. The column `warning` says that some $\hat k$ are high, as we
# know by now.

# %%
idata = {
    name: pv.to_arviz(pair, x_test, predictive=False) for name, pair in {"16, shallow": first, "32, deep": deep}.items()
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the high k̂
    table = az.compare({name: az.loo(one, pointwise=True, reff=1.0) for name, one in idata.items()})
table[["rank", "elpd_loo", "se", "elpd_diff", "dse", "warning"]].round(1)

# %% [markdown]
# `table.to_latex()` or `table.to_csv()` does the rest.
#
# ## A question to try
#
# Train `DigitsPair(decoder, [200, 200])` on the first 200 images only, still with the decoder held. Which gap grows,
# and on which data: those 200, or the test images? And what would `RenyiELBO(num_particles=50)` do to $\hat k$?
