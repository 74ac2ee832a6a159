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
# # A VAE on digits
#
# Put two neural networks into a pair, and you have a variational autoencoder (VAE). We write one, look at what it
# generates, reconstructs and interpolates, and learn which curves to watch while it trains.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyrovae as pv
from pyrovae.evaluation import decode, latents, reconstruct, sample
from pyrovae.networks import BernoulliNetwork, NormalNetwork
from pyrovae.plots import plot_images, plot_latents, plot_manifold

data = pv.data.load("digits", binarize=False)  # grey levels in [0, 1]
x, x_test = (data.train > 0.5).float(), (data.test > 0.5).float()
print(data)
figure, panels = plt.subplots(2, 15, figsize=(8, 1.2))
for axes, image in zip(panels.flat, x, strict=False):
    axes.imshow(image.reshape(data.image_shape).numpy(), cmap="gray_r")
    axes.set_axis_off()
plt.show()

# %% [markdown]
# ## Ten lines
#
# The *decoder* turns a hidden $z$ into the probability of ink at each pixel; the *encoder* turns an image into a
# Gaussian guess of its $z$ (Kingma and Welling 2014).
#
# $$p(z) = \mathcal N(0, I), \qquad p(x \mid z) = \prod_d \mathrm{Bernoulli}\left(x_d \mid \mathrm{decoder}_d(z)\right),
# \qquad q(z \mid x) = \mathcal N\left(\mu(x), \mathrm{diag}\, \sigma^2(x)\right)$$


# %%
class DigitsVAE(pv.Pair):
    def __init__(self, data_dim, latent_dim):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = NormalNetwork(data_dim, [200, 200], latent_dim)
        self.decoder = BernoulliNetwork(latent_dim, [200, 200], data_dim)

    def model(self, x):  # p(x, z); x: (batch, data_dim)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x):  # q(z | x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(x))

    def initialize(self, x):  # optional: start the decoder at the mean image
        self.decoder.initialize(x)


# %% [markdown]
# The bound says what an autoencoder must balance. *Reconstruction* wants $z$ to say much about the image; the *KL* is
# what saying it costs, and draws the codes of all images together into one cloud, the prior.
#
# $$\mathrm{ELBO}(x) = \underbrace{\mathbb E_{q(z \mid x)}\left[\log p(x \mid z)\right]}_{\text{reconstruction}}
# - \underbrace{\mathrm{KL}\left(q(z \mid x) \,\|\, p(z)\right)}_{\text{regulariser}}$$
#
# The KL of two Gaussians is known in closed form, so `TraceMeanField_ELBO` does not sample it.

# %%
torch.manual_seed(0)
by_hand = DigitsVAE(64, 2)
pv.fit(by_hand, x, loss="TraceMeanField_ELBO", epochs=120, lr=6e-3)
pv.evaluate(by_hand, x_test, num_samples=500)

# %% [markdown]
# (The line on $\hat k$ asks whether the guide's samples can be trusted to find the evidence: tutorial 7.)
#
# `pv.models.VAE` is the same pair, with a choice of likelihoods. It even takes our weights:

# %%
ready_made = pv.models.VAE(64, 2, hidden_dims=(200, 200))
ready_made.load_state_dict(by_hand.state_dict(), strict=False)
print(f"ELBO {pv.evaluate(ready_made, x_test, num_samples=500).elbo:.3f}")

# %% [markdown]
# ## The manifold
#
# With two latent dimensions the whole model fits into one picture: walk over the plane of $z$, decode at each point.
# Below it, where the guide puts the training images. It never saw the labels that colour them.

# %%
plot_manifold(ready_made, "z", data.image_shape, size=14)

# %%
plot_latents(ready_made, x, "z", labels=data.labels_train)

# %% [markdown]
# ## More room
#
# Two numbers cannot say all that makes a digit. The next VAE has 32, and 200 training images are held out to watch it.

# %%
torch.manual_seed(0)
wide = pv.models.VAE(64, 32, hidden_dims=(200, 200))
result = pv.fit(wide, x[200:], validation=x[:200], epochs=100, schedule="constant")
scores = pv.evaluate(wide, x_test, num_samples=500)
print(scores)

# %% [markdown]
# ## What to monitor
#
# 1. *The bound on data held out.* Where it falls while the training bound goes on rising, the networks learn images
#    by heart. To see it, the next run has 300 images only. `patience=20` would stop it, and keep the best weights.
# 2. *Reconstruction and KL apart*, as `evaluate` prints them. A KL near zero is *collapse*: the decoder ignores $z$.
# 3. *The KL of each dimension.* One that costs nothing says nothing. *Active units* counts the dimensions whose
#    posterior mean moves over the data (variance above 0.01; Burda et al. 2016).

# %%
torch.manual_seed(0)
few = pv.models.VAE(64, 32, hidden_dims=(200, 200))
few_result = pv.fit(few, x[200:500], validation=x[:200], epochs=200, schedule="constant")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
for color, name, run in (("C0", "all images", result), ("C1", "300 images", few_result)):
    steps = [row["step"] for row in run.history]
    left.plot(steps, [row["train_bound"] for row in run.history], color, linestyle=":")
    left.plot(steps, [row["validation_bound"] for row in run.history], color, label=name)
left.set(xlabel="step", ylabel="ELBO (nats per datum)", ylim=(-25, -14), title="Held out (solid), training (dotted)")
left.legend(loc=(0.65, 0.28))
right.bar(range(32), sorted(scores.kl_per_dimension["z"], reverse=True))
right.set(xlabel="latent dimension, sorted", ylabel="KL (nats per datum)", title="What each dimension says")
plt.show()

# %% [markdown]
# ## What it has learned
#
# Ten test images, what two latent dimensions keep of them, and what 32 keep:

# %%
rows = x_test[::36]
plot_images(
    torch.cat([rows, reconstruct(ready_made, rows, seed=0), reconstruct(wide, rows, seed=0)]),
    data.image_shape,
    title="Data; reconstructed from 2, and from 32 latent dimensions",
)

# %% [markdown]
# New digits, $\mathbb E[x \mid z]$ at a drawn $z \sim p(z)$. And three walks from one test image to another: along
# the straight line between the means that the guide gives them, decoded.

# %%
plot_images(sample(wide, 40, mean=True, seed=0), data.image_shape, title="Drawn from the model (pixel means)")

# %%
z = latents(wide, x_test[[5, 105, 155, 205, 255, 305]], mean=True)["z"]
share = torch.linspace(0, 1, 10)[:, None]
walks = [decode(wide, {"z": (1 - share) * start + share * end}) for start, end in zip(z[::2], z[1::2], strict=True)]
plot_images(torch.cat(walks), data.image_shape, title="Three walks through $z$")

# %% [markdown]
# ## A question to try
#
# Give `wide` 8 latent dimensions, then 100. Does the test ELBO change, and does the number of active units? A VAE
# prunes what it cannot use: how would you choose `latent_dim`?
