"""Files written in one step, so that a crash leaves the old file or the new one: training states, text and bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["load_state", "save_state", "write_bytes", "write_text"]


def save_state(path: str | Path, state: dict[Any, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers and strings, as safetensors: reading them unpickles nothing."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, tensors))
    temporary = Path(f"{path}.tmp")
    save_file(tensors, temporary, metadata={"pyrovae_state": tree})
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())  # on the disk before its name is
    os.replace(temporary, path)


def load_state(path: str | Path, argument: str = "path") -> dict[Any, Any]:
    """Read what :func:`save_state` wrote. ``argument`` is the name of ``path`` in messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or another program wrote it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: expected a checkpoint, found none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tree = (file.metadata() or {})["pyrovae_state"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = _decode(json.loads(tree), tensors)
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__} where a state should be")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} is damaged or is no pyrovae checkpoint ({error}).") from error
    return state


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. A crash or an error leaves the old file or the new, whole."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file. A crash or an error leaves the old file or the new, whole, and so do two processes at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: JSON would turn the integer keys of an optimizer's state into strings
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_encode(item, tensors) for item in value]
    return value


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _decode(item, tensors) for key, item in value["dict"]}
    return value
