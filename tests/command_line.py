"""The command in this process, for tests."""

from __future__ import annotations

import pytest

from pyrovae.cli.main import main


def call(*arguments):
    """Run the command and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code or 0


def refusal(capsys, *arguments):
    """Run a command that must be refused, and return its message, which has no traceback."""
    assert call(*arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message
