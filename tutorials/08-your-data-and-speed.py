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
# # Bring your own data and go faster
#
# From an array on your disk to a trained pair: tensors, a `DataLoader`, a GPU. Then the compiled step, a run that is
# stopped and goes on, and files that other programs read.

# %%
import csv
import json
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch.utils.data import DataLoader, Dataset

import pyrovae as pv
from pyrovae.evaluation import latents
from pyrovae.infer import SVI, Trace_ELBO

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)

# %% [markdown]
# ## An array
#
# Your data are a matrix, one datum a row, of floating-point numbers. Here: 569 tumours, 30 measurements of each, some
# near 0.001 and some near 4,000. A VAE with a normal likelihood works in units of each feature's mean $m_d$ and
# standard deviation $s_d$, and learns a noise scale $\sigma_d$ for each:
#
# $$p(z) = \mathcal N(0, I), \qquad
# p(x_d \mid z) = \mathcal N\left(x_d \mid m_d + s_d f_d(z),\; s_d^2 \sigma_d^2\right)$$

# %%
measurements, benign = load_breast_cancer(return_X_y=True)  # NumPy arrays, (569, 30) and (569,); 1 is benign
x = torch.tensor(measurements, dtype=torch.float32)
x_train, x_test = x[:469], x[469:]

torch.manual_seed(0)
pair = pv.models.VAE(data_dim=30, latent_dim=2, hidden_dims=(100,), likelihood="normal")
print(pv.fit(pair, x_train, epochs=150, validation=50))

# %%
z = latents(pair, x, mean=True)["z"]  # the guide's means, (569, 2)
figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
for value, name in enumerate(("malignant", "benign")):
    axes.plot(*z[benign == value].T, ".", alpha=0.6, label=name)
axes.set(xlabel="first latent", ylabel="second latent", title="Nobody told the pair which is which")
axes.legend()
plt.show()

# %% [markdown]
# What does not fit is refused before any work starts, with the reason and the cure.

# %%
holes = x_train.clone()
holes[3, 7] = torch.nan
for wrong in (x_train[:, :10], holes, torch.tensor(measurements).int()):
    try:
        pv.fit(pair, wrong)
    except (TypeError, ValueError) as error:
        print(f"{error}\n")

# %% [markdown]
# ## A DataLoader, and a GPU
#
# Data that do not fit into memory, or that change at every use, come from a `DataLoader`. It yields batches, or tuples
# that start with one. This one leaves the array on the disk, and adds to a row the error of a new measurement.
#
# Nothing here names a device: `device="auto"`, the default everywhere, takes CUDA where there is one, and the pair
# comes back to where it was. `fit` keeps a tensor on the GPU for the whole run, and moves batches of a loader there.


# %%
class NoisyRows(Dataset):
    def __init__(self, file, noise):
        self.rows, self.noise = np.load(file, mmap_mode="r"), noise  # read row by row
        self.scale = torch.tensor(self.rows.std(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = torch.from_numpy(self.rows[index].copy())
        return row + self.noise * self.scale * torch.randn(row.shape), index


np.save(folder / "measurements.npy", x_train.numpy())
loader = DataLoader(NoisyRows(folder / "measurements.npy", noise=0.1), batch_size=64, shuffle=True)

torch.manual_seed(0)
careful = pv.models.VAE(30, 2, hidden_dims=(100,), likelihood="normal")
print(pv.fit(careful, loader, epochs=100, validation=x_test))

# %% [markdown]
# ## Your own loop
#
# `fit` is a loop around `pyrovae.infer.SVI`, which has the arguments of `pyro.infer.SVI`, and takes the optimizers of
# `torch.optim` too. One step on a batch $B$ is one gradient step on
#
# $$-\sum_{n \in B} \mathbb E_{q(z \mid x_n)}\left[\log p(x_n, z) - \log q(z \mid x_n)\right] .$$
#
# Most of an eager step of a small network is Python: Pyro's handlers, torch's dispatch. With `backend="compiled"`,
# the step is recorded once below Pyro and compiled: loss, gradient and Adam are one program. On CUDA,
# `backend="cudagraph"` captures it too. `auto`, the default, compiles where a run is long enough to pay for it.

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"  # in a loop of your own, you say it
digits = pv.data.load("digits").train.to(device)


def train(backend, steps=300):
    torch.manual_seed(0)
    pair = pv.models.VAE(64, 16, hidden_dims=(100,)).to(device)
    optimizer = torch.optim.Adam(pair.parameters(), lr=2e-3, fused=True)
    svi = SVI(pair.model, pair.guide, optimizer, Trace_ELBO(), backend=backend)
    start = time.perf_counter()
    svi.compile(digits[:64])  # else the second step does
    compiled = time.perf_counter()
    losses = [svi.step(digits[64 * (i % 22) : 64 * (i % 22 + 1)]) / 64 for i in range(steps)]
    losses = torch.stack(losses).tolist()  # waits for a GPU; a float() in the loop would do so at every step
    return losses, compiled - start, (time.perf_counter() - compiled) / steps


train("eager", steps=20)  # warm up
losses, seconds = {}, {}
for backend in ("eager", "compiled"):
    losses[backend], once, seconds[backend] = train(backend)
    print(f"{backend:<10}{1e3 * seconds[backend]:8.2f} ms a step, after {once:4.1f} s once")
difference = max(abs(a - b) for a, b in zip(losses["eager"], losses["compiled"], strict=True))
print(f"largest difference between the losses: {difference:.0e} nats per datum")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained", width_ratios=(2, 1))
left.plot(losses["eager"], linewidth=4, alpha=0.4, label="eager")
left.plot(losses["compiled"], color="black", linewidth=0.8, label="compiled")
left.set(xlabel="step", ylabel="loss (nats per datum)", ylim=(23, 34), title="The same numbers,")
left.legend()
right.barh(list(seconds), [1e3 * value for value in seconds.values()], color=["C0", "black"])
right.set(xlabel="milliseconds a step, here", title="faster")
plt.show()

# %% [markdown]
# A pair stays ordinary Pyro, and no line of it changes. What cannot be recorded, an `.item()` or an `if` on a
# tensor, is named in one warning with its line; the step then runs eagerly.
#
# ## Stop, and go on
#
# `checkpoint=` keeps the whole state of a run in a file: weights, optimizer, random numbers, history. Here someone
# pulls the plug in the middle. The same call with `resume=True` goes on from the last whole epoch, and ends with
# the very numbers of a run that nobody stopped.


# %%
class PluggedRows(NoisyRows):
    reads_left = float("inf")

    def __getitem__(self, index):
        self.reads_left -= 1
        if self.reads_left < 0:
            raise KeyboardInterrupt  # as Ctrl-C does, or the button that stops a cell
        return super().__getitem__(index)


def run(reads=float("inf"), **options):
    torch.manual_seed(0)
    pair = pv.models.VAE(30, 2, hidden_dims=(100,), likelihood="normal")
    rows = PluggedRows(folder / "measurements.npy", noise=0.1)
    rows.reads_left = reads
    return pv.fit(pair, DataLoader(rows, batch_size=64, shuffle=True), epochs=30, **options)


whole = run()
try:
    run(reads=9_000, checkpoint=folder / "run.safetensors")
except KeyboardInterrupt:
    print("stopped")
resumed = run(checkpoint=folder / "run.safetensors", resume=True)

bounds = [[row["train_bound"] for row in result.history] for result in (whole, resumed)]
print("epochs:", len(bounds[0]), "and", len(bounds[1]))
print("the same bound in every epoch:", bounds[0] == bounds[1])

# %% [markdown]
# ## Take it elsewhere
#
# Weights go to a `.safetensors` file, numbers to formats that everything reads, and nothing is pickled. For ArviZ, call
# `pv.to_arviz(pair, x)`: draws and pointwise log likelihoods (tutorial 7).

# %%
pair.save(folder / "weights.safetensors")
again = pv.models.VAE(30, 2, hidden_dims=(100,), likelihood="normal")
again.load(folder / "weights.safetensors")

scores = pv.evaluate(again, x_test, num_samples=500)
(folder / "scores.json").write_text(json.dumps(scores.to_dict(), indent=2))
with (folder / "history.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, whole.history[0])
    writer.writeheader()
    writer.writerows(whole.history)
np.save(folder / "codes.npy", latents(again, x, mean=True)["z"].numpy())

for file in sorted(folder.iterdir()):
    print(f"{file.name:<22}{file.stat().st_size:8,d} bytes")
print(scores)
temporary.cleanup()

# %% [markdown]
# The command line does all this in one go, and its run folder holds the pictures too:
#
# ```
# pyrovae fit vae --data measurements.npy --set likelihood=normal --set latent_dim=2
# pyrovae fit --resume runs/vae-measurements
# ```
#
# ## A question to try
#
# Set `hidden_dims=(500, 500)` in the timing: does compiling still help? What share of a step is left for it to
# save, once the matrix products take most of the time?
