"""The number of threads: a rule, the user's own number, the container's quota."""

from __future__ import annotations

import math
import os

import pytest
import torch

from pyrovae import machine
from pyrovae.machine import allowed_threads, count_products, limit_threads


@pytest.fixture
def torchs_own(monkeypatch):
    """As in a process where nobody has chosen a number, on a machine with four cores."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "_at_import", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine, "_quota", lambda: math.inf)
    torch.set_num_threads(4)


@pytest.mark.usefixtures("torchs_own")
@pytest.mark.parametrize(("work", "number"), [(1e6, 1), (1e9, 4), (lambda: 1e6, 1)])
def test_small_steps_get_one_thread_and_large_ones_all(work, number):
    with limit_threads(None, work) as given:
        assert given == torch.get_num_threads() == number
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("torchs_own")
def test_a_number_is_put_back_after_an_error():
    with pytest.raises(KeyError), limit_threads(2):
        raise KeyError
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("torchs_own")
def test_the_users_number_is_kept_unless_another_is_asked_for(monkeypatch):
    torch.set_num_threads(3)
    with limit_threads(None, 1e6) as given:
        assert given == 3
    with limit_threads(2, 1e6) as given:
        assert given == torch.get_num_threads() == 2
    torch.set_num_threads(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with limit_threads(None, 1e6) as given:
        assert given == 4


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_quota_of_a_control_group_is_read(files, quota, tmp_path):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert machine._quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "number"), [(math.inf, 4), (2.5, 2), (0.3, 1)])
def test_threads_stay_within_cores_and_quota(quota, number, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(machine, "_quota", lambda: quota)
    assert allowed_threads() == number


def test_products_are_counted():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert count_products(lambda: a @ b) == 2 * 3 * 5 * 7
