"""Figures need no pyplot and change no setting of matplotlib; data of many features are drawn in one plane."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.decomposition import PCA

from pyrovae import plots
from pyrovae.plots.figures import new_figure, plane_of


def test_plots_leave_matplotlib_s_global_state_alone():
    """They never load pyplot, which would keep figures alive. ``import pyrovae`` does not load matplotlib."""
    program = """
import sys, torch
import pyrovae as pv
assert "matplotlib" not in sys.modules, "matplotlib is loaded by import pyrovae"
import matplotlib
raw = lambda: dict(dict.items(matplotlib.rcParams))  # reading the backend would choose one
before = raw()
from pyrovae import plots
pair, x = pv.models.VAE(6, 2, hidden_dims=(4,)), torch.bernoulli(torch.full((30, 6), 0.5))
flat = pv.models.GMM(2, 2)
plots.plot_samples(pair, x, image_shape=(3, 2))
plots.plot_latents(pair, x, "z", labels=torch.arange(30) % 3)
plots.plot_manifold(pair, "z", (3, 2), size=3)
plots.plot_samples(flat, torch.randn(30, 2))
plots.plot_density(flat, torch.randn(30, 2))
plots.plot_history([{"epoch": 1, "train_bound": -1.0}])
assert "matplotlib.pyplot" not in sys.modules
assert raw() == before
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_a_notebook_shows_a_figure_without_pyplot():
    figure = new_figure(2, 1)
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("num_data", [5, 60])
def test_plane_of_many_features_is_that_of_principal_components(num_data):
    x = torch.randn(num_data, 4) * torch.tensor([1.0, 5.0, 2.0, 3.0])
    project, names = plane_of(x, None)
    torch.testing.assert_close(project(x), torch.as_tensor(PCA(2).fit_transform(x.double().numpy())))
    assert names == ["first principal component", "second principal component"]


@pytest.mark.parametrize(("feature_names", "names"), [(None, ["feature 1", "feature 2"]), (("a", "b"), ["a", "b"])])
def test_plane_of_two_features_is_theirs(feature_names, names):
    x = torch.randn(5, 2)
    project, found = plane_of(x, feature_names)
    assert project(x) is x
    assert found == names


def test_every_picture_is_drawn_in_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert all(f"{name}(" in tests for name in plots.__all__ if name.startswith("plot_"))
