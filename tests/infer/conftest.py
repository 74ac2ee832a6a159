"""Fixtures of the tests of the recorded step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from pyrovae.infer import record, svi


@pytest.fixture
def uncompiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs, with Adam's operations in them, run as they are; those of ``slow`` tests are compiled."""
    monkeypatch.setattr(record, "_warned", set())
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(record.Recorded, "compile", lambda self, args: None)
        monkeypatch.setattr(svi, "compile_or_warn", lambda graph, inputs: graph)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Shapes of the arguments that steps were recorded for, and that recorded steps took."""
    records, steps = [], []
    make, call = svi._RecordedStep.__init__, svi._RecordedStep.__call__

    def spy_on_making(self: Any, record: Any, params: Any, optimizer: Any, args: Any, **options: Any) -> None:
        records.append(tuple(x.shape for x in args))
        make(self, record, params, optimizer, args, **options)

    def spy_on_steps(self: Any, args: list[Tensor]) -> Tensor:
        loss = call(self, args)
        steps.append(tuple(x.shape for x in args))
        return loss

    monkeypatch.setattr(svi._RecordedStep, "__init__", spy_on_making)
    monkeypatch.setattr(svi._RecordedStep, "__call__", spy_on_steps)
    return SimpleNamespace(records=records, steps=steps)
