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
# # Mixtures: EM against SVI
#
# One inequality, Jensen's, lies under both expectation maximisation (EM) and stochastic variational inference (SVI).
# We look at it in a mixture of Gaussians, fit Old Faithful in three ways, and meet local optima.

# %%
import copy

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrovae as pv

data = pv.data.load("faithful")
x = data.train  # (272, 2): how long an eruption lasted and how long the wait was, in minutes
gmm = pv.models.GMM(num_components=2, data_dim=2)
with torch.no_grad():  # a start that knows little: two wide components, left and right of the middle
    gmm.loc.copy_(x.mean(0) + torch.tensor([[-1.0, -8.0], [1.0, 8.0]]))
    gmm.scale = torch.linalg.cholesky(x.T.cov()).repeat(2, 1, 1)

# %% [markdown]
# ## The bound, factorised twice
#
# A mixture is $p(x) = \sum_k \pi_k\, \mathcal N(x \mid \mu_k, \Sigma_k)$; the hidden $z$ says which component a datum
# came from. For *any* distribution $q(z)$, as the logarithm is concave (Jensen),
#
# $$\log p(x) = \log \mathbb E_q\!\left[\frac{p(x, z)}{q(z)}\right]
# \ge \mathbb E_q\!\left[\log \frac{p(x, z)}{q(z)}\right] = \mathrm{ELBO}(q).$$
#
# Take the joint apart as $p(z \mid x)\, p(x)$, and the bound says what it misses; leave it whole, and it says what
# to maximise:
#
# $$\mathrm{ELBO}(q) = \log p(x) - \mathrm{KL}\left(q(z) \,\|\, p(z \mid x)\right)
# \qquad\qquad \mathrm{ELBO}(q) = \mathbb E_q\left[\log p(x, z)\right] + \mathrm H(q)$$


# %%
def log_joint(gmm):  # log p(x_n, z = k), shape (N, 2)
    return gmm.weights.log() + gmm.component(torch.arange(2)).log_prob(x[:, None])


with torch.no_grad():
    evidence = gmm.log_prob(x).sum()
    posterior = gmm.posterior(x)
    print(f"{'q':<20}{'E log joint':>12}{'+ entropy':>12}{'= ELBO':>12}{'+ KL':>12}{'= sum':>12}")
    for name, q in {
        "half and half": torch.full_like(posterior.probs, 0.5),
        "all on the likelier": nn.functional.one_hot(posterior.probs.argmax(-1), 2).float(),
        "the posterior": posterior.probs,
    }.items():
        expected, entropy = (q * log_joint(gmm)).sum(), torch.special.entr(q).sum()
        kl = (torch.special.xlogy(q, q) - q * posterior.logits).sum().abs()  # not −0.00
        elbo = expected + entropy
        print(f"{name:<20}{expected:12.2f}{entropy:12.2f}{elbo:12.2f}{kl:12.2f}{elbo + kl:12.2f}")
    print(f"\nlog p(x), exact, total: {evidence:.2f} nats")

# %% [markdown]
# So the *E step* of EM sets $q$ to the posterior, where the bound is tight. The *M step* keeps $q$ and climbs the bound
# in the parameters; the evidence lies above the bound and touched it where we stood, so it rises at least as much. On
# the left $q \propto p(z \mid x)^t$ for many $t$; on the right both steps, twice, with one parameter free.


# %%
def elbo(gmm, q):
    return (q * log_joint(gmm)).sum() + torch.special.entr(q).sum()


figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained")
with torch.no_grad():
    powers = torch.linspace(0, 5, 101)
    left.plot(powers, [elbo(gmm, (t * posterior.logits).softmax(-1)) for t in powers], label="ELBO")
    left.axhline(evidence, color="black", linestyle="--", label="log evidence")
    left.set(xlabel="power $t$", ylabel="nats", title="E step: tight at the posterior, $t = 1$")
    left.legend()

    moved, means, here = copy.deepcopy(gmm), torch.linspace(40, 80, 161), 76.0

    def curve(function):
        values = []
        for mean in means:
            moved.loc[0, 1] = mean
            values.append(function(moved))
        return torch.stack(values)

    right.plot(means, curve(lambda gmm: gmm.log_prob(x).sum()), color="black", linestyle="--", label="log evidence")
    for step in range(2):
        moved.loc[0, 1] = here
        q = moved.posterior(x).probs
        right.plot(here, elbo(moved, q), "o", color=f"C{step}")
        bound = curve(lambda gmm, q=q: elbo(gmm, q))
        right.plot(means, bound, color=f"C{step}", label=f"ELBO, tight where step {step + 1} starts")
        here = means[bound.argmax()].item()
right.set(xlabel="mean wait of the first component (min)", ylabel="nats", title="M step: climb the bound")
right.set_ylim(-1900, -1280)
right.legend()
plt.show()

# %% [markdown]
# ## Old Faithful in three ways
#
# - **EM** repeats the two steps, exactly.
# - **SVI with enumeration** climbs $\log p(x) = \log \sum_k p(x, z = k)$ itself by gradients: $z$ is summed out.
# - **SVI with an amortized guide** learns a network $q(z \mid x)$ beside the model; its bound is tight only where the
#   network is right.
#
# All three start at the same parameters.

# %%
em_pair = pv.models.GMM(2, 2)
svi_pair = pv.models.GMM(2, 2)
torch.manual_seed(0)
amortized_pair = pv.models.GMM(2, 2, amortized=True)
amortized_pair.initialize(x)  # so that its network sees standardised features
for pair in (em_pair, svi_pair, amortized_pair):
    pair.load_state_dict(gmm.state_dict(), strict=False)

em = pv.fit_em(em_pair, x, initialize=False)
svi = pv.fit(svi_pair, x, batch_size=len(x), epochs=1000, lr=0.05, initialize=False)
amortized = pv.fit(amortized_pair, x, batch_size=len(x), epochs=1000, lr=0.05, initialize=False)

print(f"{'total, nats':<24}{'log p(x)':>12}{'ELBO':>12}{'gap':>10}{'steps':>8}")
steps = {"EM": em.iterations, "SVI, enumeration": svi.steps, "SVI, amortized guide": amortized.steps}
for (name, count), pair in zip(steps.items(), (em_pair, svi_pair, amortized_pair), strict=True):
    scores = pv.evaluate(pair, x, num_samples=1000)
    likelihood, bound = scores.log_likelihood * len(x), scores.elbo * len(x)
    print(f"{name:<24}{likelihood:12.3f}{bound:12.3f}{max(likelihood - bound, 0.0):10.3f}{count:8d}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained")
left.plot([em.seconds * i / em.iterations for i in range(len(em.trace))], em.trace, marker=".", label="EM")
for name, run in {"SVI, enumeration": svi, "SVI, amortized guide (ELBO)": amortized}.items():
    left.plot([row["seconds"] for row in run.history], [row["train_bound"] * len(x) for row in run.history], label=name)
left.axhline(em.log_likelihood, color="black", linewidth=0.8, linestyle="--", label="maximum")
left.set(
    xscale="log",
    xlabel="seconds",
    ylabel="log evidence or its bound (nats)",
    ylim=(-1530, -1115),
    title="Evidence against time",
)
left.legend()

with torch.no_grad():
    first, second = torch.linspace(1.2, 5.5, 100), torch.linspace(38, 100, 100)
    density = em_pair.log_prob(torch.cartesian_prod(first, second)).reshape(100, 100).T.exp()
    belongs = em_pair.posterior(x).probs[:, 0]
right.contour(first, second, density, levels=6, colors="grey", linewidths=0.7)
points = right.scatter(x[:, 0], x[:, 1], c=belongs, s=6, cmap="coolwarm", linewidth=0)
figure.colorbar(points, label="p(first component | x)")
right.set(xlabel=data.feature_names[0], ylabel=data.feature_names[1], title="Old Faithful, by EM")
plt.show()

# %% [markdown]
# ## Local optima
#
# Each step goes uphill, so where a run ends depends on where it begins. The cure is plain: start often, keep the best.
# Three components for the 150 irises, from 100 starts; the best maximum known is −180.185.

# %%
iris = pv.data.load("iris").train
restarts = pv.fit_em(pv.models.GMM(3, 4), iris, restarts=100)
ends = torch.tensor(restarts.restart_log_likelihoods).sort().values
same = (ends - restarts.log_likelihood).abs() < 0.01
print(f"best {restarts.log_likelihood:.5f}, reached by {int(same.sum())} of 100 runs")

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(ends, ".", label="one run of EM")
axes.axhline(restarts.log_likelihood, color="black", linestyle="--", linewidth=1, label="the best")
axes.set(xlabel="run, sorted", ylabel="log likelihood at the end (nats)", title="Iris, three components: 100 starts")
axes.legend()
plt.show()

# %% [markdown]
# The three runs at −91 are no better fits. There one component took the 29 flowers whose petals are noted as exactly
# 0.2 cm wide. A Gaussian without width has infinite density, so this likelihood has no maximum, only the floor that
# `fit_em` puts under a variance. While another run exists, `fit_em` does not choose such a one.

# %% [markdown]
# ## Straight up the log likelihood
#
# A mixture of your own is a `Pair`. This one has three round components, and a uniform prior that is *not* learned:
#
# $$\log p(x) = \log \tfrac13 \sum_{k=1}^{3} \mathcal N\left(x \mid \mu_k, \sigma_k^2 I\right)$$
#
# The sum is short enough to write out, so no guide is needed. Adam on `log_prob` and `fit` with enumeration are
# then the same algorithm.


# %%
class EqualMixture(pv.Pair):
    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.zeros(3, 1))

    def component(self, z):
        return dist.Normal(self.loc[z], self.log_scale[z].exp()).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=x.new_zeros(3)), infer={"enumerate": "parallel"})
            pyro.sample("x", self.component(z), obs=x)

    def log_prob(self, x):
        return self.component(torch.arange(3)).log_prob(x[:, None]).logsumexp(-1) - torch.tensor(3.0).log()


torch.manual_seed(0)
centres = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
y = torch.cat([centre + torch.randn(100, 2) for centre in centres])

by_hand = EqualMixture()
by_fit = copy.deepcopy(by_hand)
starts = by_hand.loc.detach().clone()

adam, trace = torch.optim.Adam(by_hand.parameters(), lr=0.05), []
for _ in range(200):
    log_likelihood = by_hand.log_prob(y).mean()
    trace.append(log_likelihood.item())
    adam.zero_grad()
    (-log_likelihood).backward()
    adam.step()

run = pv.fit(by_fit, y, loss="TraceEnum_ELBO", batch_size=len(y), epochs=200, lr=0.05, schedule="constant")
bounds = [row["train_bound"] for row in run.history]
print(f"by hand {by_hand.log_prob(y).mean():.4f}, by fit {by_fit.log_prob(y).mean():.4f} nats per datum")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained")
left.plot(trace, linewidth=5, alpha=0.4, label="Adam on log_prob")
left.plot(bounds, color="black", linewidth=1, label="fit, enumeration")
left.set(xlabel="step", ylabel="log likelihood (nats per datum)", title="One algorithm, written twice")
left.legend()
with torch.no_grad():
    grid = torch.cartesian_prod(torch.linspace(-6, 6, 100), torch.linspace(-6, 7, 100))
    density = by_hand.log_prob(grid).reshape(100, 100).T.exp()
right.scatter(*y.T, s=6, linewidth=0)
right.contour(torch.linspace(-6, 6, 100), torch.linspace(-6, 7, 100), density, levels=6, colors="grey", linewidths=0.7)
right.plot(*starts.T, "x", color="black", label="where means began")
right.plot(*by_hand.loc.detach().T, "o", color="C3", label="where they ended")
right.set(title="Three equal components")
right.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## A question to try
#
# In the last section change the seed before `EqualMixture()` a few times. Which starts end with two means in one cloud?
# With `fit_em` you would ask for `restarts=`. How would you choose a start for gradient ascent, from the data alone?
# (`GMM.initialize` has one answer.)
