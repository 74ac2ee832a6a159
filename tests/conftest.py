"""Fixtures of all tests: they guard process globals, and skip CUDA tests where there is no CUDA."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: tests run side by side, and threads would spin for each other

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def guard_globals() -> Iterator[None]:
    """Start each test from the same random state, and restore every process-wide setting after it."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    settings = pyro.settings.get()
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_num_threads(1)  # small tensors: threads that wait for each other cost more than they bring
    yield
    pyro.clear_param_store()
    pyro.settings.set(**settings)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])


@pytest.fixture
def float64(guard_globals: None) -> None:
    """Make double precision the default, for comparisons to rounding."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def data_dir() -> Path:
    """Return the folder that ``PYROVAE_DATA`` names, or skip the test."""
    folder = os.environ.get("PYROVAE_DATA")
    if not folder:
        pytest.skip("needs the data folder that PYROVAE_DATA names")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # long ones first: none is left for the end
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
