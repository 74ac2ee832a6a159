"""Base of what measurements return: a table for reading, and plain numbers for JSON."""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["Result"]


class Result:
    """Base of the dataclasses that measurements return."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, for JSON.

        Tensors, which hold a value for each datum, are left out. JSON has no infinity and no NaN: such a number becomes
        None.
        """
        return _plain({name: value for name, value in vars(self).items() if not isinstance(value, Tensor)})

    def __repr__(self) -> str:
        """Return a table for reading, with the notes below it."""
        return "\n".join([*self._table(), *(f"NOTE: {note}" for note in getattr(self, "notes", ()))])

    def _table(self) -> list[str]:
        """Return the lines of the table."""
        raise NotImplementedError


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if is_dataclass(value):
        return _plain(vars(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
