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
# # PPCA is a linear VAE
#
# Probabilistic PCA is the autoencoder whose every answer is known: the best parameters, the posterior, the evidence.
# Closed form, EM and SVI meet at one likelihood, and the amortized guide becomes the exact posterior.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import kl_divergence

import pyrovae as pv
from pyrovae.evaluation import latents
from pyrovae.infer import Trace_ELBO

data = pv.data.load("iris")
x = data.train  # (150, 4): lengths and widths of sepals and petals, in centimetres

# %% [markdown]
# ## The model, and its closed form
#
# Tipping and Bishop (1999): a hidden $z$ of $Q$ dimensions, a linear decoder, equal noise on all $D$ features.
#
# $$p(z) = \mathcal N(0, I), \qquad p(x \mid z) = \mathcal N(W z + \mu, \sigma^2 I),
# \qquad p(x) = \mathcal N(\mu, W W^\top + \sigma^2 I)$$
#
# With eigenvalues $\lambda_1 \ge \lambda_2 \ge \dots$ and eigenvectors $u_1, u_2, \dots$ of the data's covariance, the
# likelihood is greatest at $\mu = \bar x$ and
#
# $$W = (u_1 \dots u_Q)\left(\mathrm{diag}(\lambda_1 \dots \lambda_Q) - \sigma^2 I\right)^{1/2}, \qquad
# \sigma^2 = \frac{1}{D - Q} \sum_{i > Q} \lambda_i .$$

# %%
closed = pv.models.PPCA(data_dim=4, latent_dim=2)
closed.fit_closed_form(x)
best = closed.log_prob(x).sum().item()
print(f"closed form: log likelihood {best:.3f} nats, noise variance {closed.noise_variance:.6f}")

# %% [markdown]
# EM needs no eigenvectors, and creeps up to the same place.

# %%
em_pair = pv.models.PPCA(4, 2)
em = pv.fit_em(em_pair, x)
print(em)

# %% [markdown]
# ## By SVI, with a guide
#
# The pair's guide is linear as well, and its covariance is the same for all data:
#
# $$q(z \mid x) = \mathcal N(A x + b,\; L L^\top), \qquad
# p(z \mid x) = \mathcal N\left(M^{-1} W^\top (x - \mu),\; \sigma^2 M^{-1}\right), \quad M = W^\top W + \sigma^2 I$$
#
# The posterior is of the guide's form, so the gap $\log p(x) - \mathrm{ELBO} = \mathrm{KL}(q \,\|\, p(z \mid x))$ can
# close entirely. We train in twenty rounds, of smaller and smaller steps, and look at both errors after each.

# %%
svi_pair = pv.models.PPCA(4, 2)
svi_pair.initialize(x, seed=0)
loss = Trace_ELBO(num_particles=32)
below, gaps = [], []
for i in range(20):
    pv.fit(
        svi_pair,
        x,
        loss=loss,
        epochs=50,
        batch_size=150,
        lr=0.16 * 0.8**i,
        schedule="constant",
        initialize=False,
        seed=i,
    )
    with torch.no_grad():
        guide = pyro.poutine.trace(svi_pair.guide).get_trace(x).nodes["z"]["fn"]  # q(z | x), a distribution
        gaps.append(kl_divergence(guide, svi_pair.posterior(x)).sum().item())
        below.append(best - svi_pair.log_prob(x).sum().item())

print("total, nats       log p(x)      ELBO       gap")
for i in (0, 4, 9, 19):
    print(f"round {i + 1:2d}{best - below[i]:18.3f}{best - below[i] - gaps[i]:10.3f}{gaps[i]:10.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained", sharey=True)
left.plot([best - value for value in em.trace], label="best − log p(x)")
left.set(xlabel="iteration", ylabel="nats, total", xscale="symlog", yscale="log", ylim=(1e-3, 1e3), title="EM")
right.plot(range(1, 21), below, label="the model: best − log p(x)")
right.plot(range(1, 21), gaps, label="the guide: log p(x) − ELBO")
right.set(xlabel="round of 50 steps", xticks=range(0, 21, 5), title="SVI: both errors go to zero")
left.legend()
right.legend()
plt.show()

# %% [markdown]
# What is left is the noise of the last steps. With the guide set to the posterior itself, as `fit_closed_form` does,
# $p(x, z) / q(z \mid x) = p(x)$ whatever $z$ is drawn: every importance weight is the evidence.

# %%
with torch.no_grad():
    log_w = pv.log_weights(closed.model, closed.guide, x, num_particles=10)  # (10, 150)
print(f"ELBO {log_w.mean(0).sum():.3f}; the weights of a datum differ by at most {(log_w.std(0)).max():.1e} nats")

# %% [markdown]
# ## A linear VAE of your own
#
#
# Now the usual VAE guide, with *independent* dimensions: $q(z \mid x) = \mathcal N(A x + b, \mathrm{diag}\, v)$. PPCA's
# likelihood does not change when $W$ is rotated to $W R$, but this guide's bound does: it is tight only where the
# posterior covariance $\sigma^2 M^{-1}$ is diagonal, and that is where $W^\top W$ is. So the bound alone picks the
# principal axes, and it has no worse maximum than the likelihood has (Lucas et al. 2019).


# %%
class LinearVAE(pv.Pair):
    def __init__(self, data_dim, latent_dim):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(latent_dim, data_dim), nn.Linear(data_dim, latent_dim)
        self.log_sigma, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(latent_dim))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.log_scale), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.log_sigma.exp()).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))


torch.manual_seed(0)
centred = x - x.mean(0)
vae = LinearVAE(4, 2)
pv.fit(vae, centred, loss="TraceMeanField_ELBO", epochs=800, batch_size=150, lr=0.05)
scores = pv.evaluate(vae, centred, num_samples=1000)
print(f"log evidence {150 * scores.log_evidence:.2f}, ELBO {150 * scores.elbo:.2f}, best {best:.2f} nats")

print("\nWᵀW")
weights = {"closed form": closed.weight, "SVI, full guide": svi_pair.weight, "linear VAE": vae.decoder.weight}
for name, weight in weights.items():
    gram = (weight.T @ weight).detach().double()
    print(f"{name:<20}", (gram.numpy().round(2) + 0.0).tolist())

# %%
named = {
    "Closed form": latents(closed, x, mean=True),
    "SVI, full guide: rotated": latents(svi_pair, x, mean=True),
    "Linear VAE: principal axes": latents(vae, centred, mean=True),
}
figure, panels = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained", sharex=True, sharey=True)
for axes, (title, found) in zip(panels, named.items(), strict=True):
    for species, name in enumerate(("setosa", "versicolor", "virginica")):
        axes.plot(*found["z"][data.labels_train == species].T, ".", label=name)
    axes.set(xlabel="first latent", title=title)
panels[0].set_ylabel("second latent")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# Up to the sign and the order of the axes, which no likelihood knows, the linear VAE has found the closed form.
#
# ## A question to try
#
# Hold the noise fixed: make `self.log_sigma` a plain number, $\log 0.7$. Which of the two latents dies, and at which
# $\sigma$ would the other follow? Compare with the eigenvalues, `torch.linalg.eigvalsh(x.T.cov(correction=0))`. Is this
# posterior collapse the fault of the bound, or does the exact likelihood want it?
