"""Synthetic data. The distributions are fixed and their parameters are public; only the draws follow the seed.

Each function takes a generator and a number of rows. It returns values (num_rows, D) and labels (num_rows,), or None
for the labels.
"""

from __future__ import annotations

import numpy as np

__all__ = ["mixture", "moons", "pinwheel", "ppca"]

NUM_TRAIN = 2_000
NUM_TEST = 1_000

MIXTURE_WEIGHTS = np.array([0.5, 0.3, 0.2])
MIXTURE_LOCS = np.array([[-4.0, 0.0], [4.0, 0.0], [0.0, 6.0]])
MIXTURE_COVARIANCES = np.array([[[1.0, 0.6], [0.6, 1.0]], [[1.0, -0.5], [-0.5, 0.5]], [[0.5, 0.0], [0.0, 0.5]]])

PPCA_LOC = np.linspace(-1.0, 1.0, 10)
# Cosines of frequency 1, 2, 3 on ten points: orthonormal columns, times 3, 2, 1. So W Wᵀ has the eigenvalues
# 9, 4, 1 and the principal subspace is known in closed form.
PPCA_WEIGHT = np.sqrt(2 / 10) * np.cos(np.pi * np.outer(np.arange(10) + 0.5, [1, 2, 3]) / 10) * [3.0, 2.0, 1.0]
PPCA_NOISE_VARIANCE = 0.25


def mixture(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw from three Gaussians in 2-D: ``MIXTURE_WEIGHTS``, ``_LOCS``, ``_COVARIANCES``. Labels are components."""
    labels = rng.choice(len(MIXTURE_WEIGHTS), num_rows, p=MIXTURE_WEIGHTS)
    noise = rng.standard_normal((num_rows, 2))
    scale_tril = np.linalg.cholesky(MIXTURE_COVARIANCES)
    return MIXTURE_LOCS[labels] + np.einsum("nij,nj->ni", scale_tril[labels], noise), labels


def pinwheel(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw from five Gaussian arms in 2-D, bent by a rotation that grows with the radius. Labels are arms.

    Johnson, Duvenaud, Wiltschko, Datta and Adams 2016, Composing graphical models with neural networks
    """
    labels = rng.integers(5, size=num_rows)
    along, across = rng.standard_normal((2, num_rows)) * [[0.3], [0.05]]
    along += 1
    angle = 2 * np.pi * labels / 5 + 0.25 * np.exp(along)
    cos, sin = np.cos(angle), np.sin(angle)
    return 2 * np.stack([along * cos - across * sin, along * sin + across * cos], axis=1), labels


def moons(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw from two interleaved half circles of radius 1 in 2-D, with noise of scale 0.1. Labels are the halves."""
    labels = rng.integers(2, size=num_rows)
    angle = np.pi * rng.random(num_rows)
    sign = 1 - 2 * labels  # the lower half is the upper one turned by 180° and moved to (1, 0.5)
    circle = np.stack([sign * np.cos(angle) + labels, sign * np.sin(angle) + 0.5 * labels], axis=1)
    return circle + 0.1 * rng.standard_normal((num_rows, 2)), labels


def ppca(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, None]:
    """Draw x = W z + μ + ε in 10-D, with z ~ N(0, I₃) and ε ~ N(0, σ²I).

    ``PPCA_WEIGHT`` (10, 3), ``PPCA_LOC`` (10,) and ``PPCA_NOISE_VARIANCE`` are W, μ and σ². The covariance of x has
    the eigenvalues 9.25, 4.25, 1.25 and, seven times, 0.25.

    Tipping and Bishop 1999, Probabilistic principal component analysis
    """
    latent = rng.standard_normal((num_rows, 3))
    noise = np.sqrt(PPCA_NOISE_VARIANCE) * rng.standard_normal((num_rows, 10))
    return latent @ PPCA_WEIGHT.T + PPCA_LOC + noise, None
