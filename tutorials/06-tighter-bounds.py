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
# # Tighter bounds: IWAE and Rényi
#
# With K samples for each datum the bound rises toward the evidence, and the same network learns a better model.
# But the guide pays: we measure how its gradient drowns in noise, and what that does to a VAE.

# %%
import copy

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrovae as pv
from pyrovae.infer import RenyiELBO, renyi_bound

data = pv.data.load("digits", binarize=False)
x, x_test = (data.train > 0.5).float(), (data.test > 0.5).float()

# %% [markdown]
# ## The bound rises with K
#
# Draw $K$ values $z_k \sim q(z \mid x)$ and let $w_k = p(x, z_k) / q(z_k \mid x)$. Every $w_k$ is an unbiased
# estimate of $p(x)$, and so is their mean, with less noise. By Jensen's inequality its logarithm is a lower bound;
# less noise, less loss (Burda, Grosse and Salakhutdinov 2016):
#
# $$\mathcal L_K = \mathbb E\left[\log \frac1K \sum_{k=1}^K w_k\right], \qquad
# \mathrm{ELBO} = \mathcal L_1 \le \mathcal L_K \le \mathcal L_{K+1} \le \log p(x)$$
#
# Li and Turner (2016) raise the weights to a power. For $0 \le \alpha \le 1$ this is a bound too, between the ELBO
# ($\alpha \to 1$) and $\mathcal L_K$ ($\alpha = 0$). Below 0 it is none.
#
# $$\mathcal L_{\alpha, K} = \frac{1}{1 - \alpha}\, \mathbb E\left[\log \frac1K \sum_{k=1}^K w_k^{1 - \alpha}\right]$$
#
# An `IWAE` of one layer is a VAE that is trained on $\mathcal L_K$. We train it on the ELBO, $K = 1$, and look.

# %%
pairs = {}
torch.manual_seed(0)
pairs[1] = pv.models.IWAE(64, latent_dims=(32,), hidden_dims=((100, 100),), num_particles=1)
pv.fit(pairs[1], x, epochs=30, batch_size=100, lr=0.01)

few = x_test[:100]
evidence = pv.evaluate(pairs[1], few, num_samples=5000).log_evidence
with torch.no_grad():
    log_w = pv.log_weights(pairs[1].model, pairs[1].guide, few, num_particles=1024)  # (1024, 100)

counts = [2**i for i in range(11)]
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for alpha, label in ((0.5, "α = 1/2"), (0.0, "α = 0: IWAE"), (-1.0, "α = −1"), (-torch.inf, "α = −∞: VR-max")):
    # 1024 weights are one group of 1024, or 512 groups of 2: the mean over groups is the expectation
    bounds = [renyi_bound(log_w.reshape(count, -1, len(few)), alpha).mean() for count in counts]
    axes.plot(counts, bounds, ".-", label=label)
axes.axhline(evidence, color="black", linestyle="--", label="log evidence, K = 5000")
axes.set(xscale="log", xlabel="K", ylabel="nats per datum", ylim=(evidence - 1, evidence + 2.2))
axes.set_title("One VAE, many bounds, and two that are none")
axes.legend(fontsize="small", loc="upper right")
plt.show()

# %% [markdown]
# ## Train on it
#
# The bound that is measured can also be the one that is maximised: `RenyiELBO(alpha=0, num_particles=K)`, the default
# loss of `IWAE`. Same network, same start, same steps; only $K$ differs.

# %%
for count in (5, 50):
    torch.manual_seed(0)
    pairs[count] = pv.models.IWAE(64, latent_dims=(32,), hidden_dims=((100, 100),), num_particles=count)
    pv.fit(pairs[count], x, loss=RenyiELBO(alpha=0, num_particles=count), epochs=30, batch_size=100, lr=0.01)

scores = {f"K = {count}": pv.evaluate(pair, x_test, num_samples=1000) for count, pair in pairs.items()}


def show(name):
    found = scores[name]
    gap = found.log_evidence - found.elbo
    print(f"{name:<22}{found.log_evidence:12.2f}{found.elbo:8.2f}{gap:7.2f}{found.active_units:8d} of 32")


print(f"{'trained on':<22}{'log evidence':>12}{'ELBO':>8}{'gap':>7}{'active units':>14}")
for name in scores:
    show(name)

# %% [markdown]
# The evidence of the test data rises with $K$, and so does the number of units in use. The ELBO *falls*. This bound
# does not ask the guide to be the posterior; it asks for a cloud in which *some* of the samples are good. With a large
# $K$ the model may have posteriors that no Gaussian fits, and the guide may fit them loosely.
#
# Which of the two is it here? Hold the model, train the guide alone on the ELBO, and see how much comes back:

# %%
refitted = copy.deepcopy(pairs[50])
refitted.likelihood.requires_grad_(False)
pv.fit(refitted, x, loss="Trace_ELBO", epochs=30, batch_size=100, lr=0.01, initialize=False)
scores["K = 50, guide refitted"] = pv.evaluate(refitted, x_test, num_samples=1000)
show("K = 50, guide refitted")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
names = list(scores)
for label in ("log evidence", "ELBO"):
    values = [getattr(scores[name], label.replace(" ", "_").lower()) for name in names]
    left.plot(values, range(len(names)), "o", label=label)
left.set(yticks=range(len(names)), yticklabels=names, ylim=(3.5, -0.5), xlabel="nats per datum", title="Test data")
left.legend()
left.grid(axis="x", alpha=0.3)
for name in names[:3]:
    right.plot(sorted(scores[name].kl_per_dimension["z1"], reverse=True), ".-", label=name)
right.set(xlabel="latent dimension, sorted", ylabel="KL (nats per datum)", title="A large K uses all dimensions")
right.legend()
plt.show()

# %% [markdown]
# Both. A part of the loss was the guide's; the rest belongs to a model whose posteriors are hard.
#
# ## Signal and noise
#
# A guide can be loose because nobody asks for better, and for a second reason. When the bound is nearly tight, the
# guide hardly matters to it: the guide's gradient is small, and its noise is not as small. Rainforth et al. (2018)
# divide the two,
#
# $$\mathrm{SNR} = \frac{\left|\mathbb E[\nabla]\right|}{\mathrm{std}[\nabla]}, \qquad
# \mathrm{SNR}_{\mathrm{model}} = O(\sqrt K), \qquad \mathrm{SNR}_{\mathrm{guide}} = O(1 / \sqrt K).$$
#
# To see it, take a pair whose best guide is known, put it a little off, and draw the gradient of the same loss 200
# times. The best guide here has $a = \tfrac12$ and $b = \tfrac12 m$:
#
# $$p(z) = \mathcal N(m, I), \qquad p(x \mid z) = \mathcal N(z, I), \qquad
# q(z \mid x) = \mathcal N(a x + b, \tfrac23 I)$$


# %%
class Toy(pv.Pair):
    def __init__(self, dim):
        super().__init__()
        self.m, self.b = nn.Parameter(0.1 * torch.randn(dim)), nn.Parameter(0.1 * torch.randn(dim))
        self.a = nn.Parameter(0.5 + 0.1 * torch.randn(dim))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.m, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.a * x + self.b, (2 / 3) ** 0.5).to_event(1))


torch.manual_seed(0)
toy, toy_x = Toy(5), 2**0.5 * torch.randn(100, 5)
counts, repeats = [1, 3, 10, 30, 100], 200
snr = {"model": [], "guide": []}
for count in counts:
    loss = RenyiELBO(alpha=0, num_particles=count)
    draws = [
        torch.cat(torch.autograd.grad(loss.differentiable_loss(toy.model, toy.guide, toy_x), [toy.m, toy.b]))
        for _ in range(repeats)
    ]
    for name, gradient in zip(snr, torch.stack(draws).split(5, dim=1), strict=True):  # each (200, 5)
        variance = gradient.var(0)
        signal = gradient.mean(0).square() - variance / repeats  # a mean of 200 draws has noise of its own
        snr[name].append((signal.sum() / variance.sum()).clamp(min=0).sqrt().item())
    print(f"K = {count:<5} signal to noise: model {snr['model'][-1]:6.2f}, guide {snr['guide'][-1]:6.3f}")

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
k = torch.tensor(counts, dtype=torch.float)
for (name, values), power in zip(snr.items(), (0.5, -0.5), strict=True):
    axes.loglog(k, values, "o-", label=f"the {name}'s gradient")
    axes.loglog(k, values[0] * k**power, color="grey", linestyle=":")
axes.set(xlabel="K", ylabel="signal to noise", title="Tighter: better for the model, worse for the guide")
axes.legend(title="dotted: slopes 1/2 and −1/2")
plt.show()

# %% [markdown]
# What helps: more data in a batch, a moderate $K$, or several bounds averaged ($M$ draws of $\mathcal L_K$), which
# raises both ratios by $\sqrt M$. An estimator that differentiates the weights twice through $z$ removes the effect
# (Tucker et al. 2019).
#
# ## A question to try
#
# Give each run the same *number of samples*: $K = 50$ in batches of 20 against $K = 1$ in batches of 1000. Then try
# `RenyiELBO(alpha=0.5, num_particles=50)`. Which pair would you sample from, and which guide would you encode with?
