"""Errors on the command line. The library names its arguments; here they become the options that a user types."""

from __future__ import annotations

import re
import traceback

import typer
from typer.core import TyperCommand

__all__ = ["MISTAKES", "Command", "explain_error", "option_names"]

MISTAKES = (ValueError, TypeError, NotImplementedError, OSError)
"""Errors whose message tells a user what to change."""

SYNONYMS = {
    "options": ("settings",),
    "methods": ("losses",),
    "path": ("run", "resume", "out"),
    "folder": ("resume", "compare", "out"),
    "x": ("data",),
}
"""Arguments of the library, and the parameters of commands that may stand for each: the first one that was given."""


class Command(TyperCommand):
    """A command whose errors name its options: ``batch_size: ...`` of the library reads ``--batch-size: ...``."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except MISTAKES as error:
            if len(error.args) == 1 and isinstance(error.args[0], str):
                error.args = (_name_options(error.args[0], ctx),)
            raise


def option_names(context: typer.Context) -> dict[str, str]:
    """Return what a user types for each parameter of a command: ``PAIR`` for ``pair``, ``--set`` for ``settings``."""
    return {
        str(p.name): str(p.metavar).rstrip(".") if p.param_type_name == "argument" else max(p.opts, key=len)
        for p in context.command.params
    }


def _name_options(message: str, context: typer.Context) -> str:
    shown = option_names(context)
    for name, candidates in SYNONYMS.items():
        known = [candidate for candidate in candidates if candidate in shown]
        given = [candidate for candidate in known if context.params.get(candidate) is not None]
        if known:
            shown[name] = shown[(given or known[-1:])[0]]
    argument, colon, rest = message.partition(":")
    if argument in shown:
        message = f"{shown[argument]}{colon}{rest}"
    resume = f"--resume {context.params.get('out') or 'FOLDER'}"
    for written, typed in (("overwrite", "--overwrite"), ("resume", resume), ("binarize", "--binarize dynamic")):
        if written in shown:
            message = re.sub(rf"\b{written}=True\b", typed, message)
    return message


def explain_error(error: Exception) -> str:
    """Return the message, with the line of the user's own file that the error came from."""
    speaks_to_users = isinstance(error, (*MISTAKES, FloatingPointError))
    text = str(error) if speaks_to_users else f"{type(error).__name__}: {error}"
    frames: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        for frame, line in traceback.walk_tb(cause.__traceback__):
            if frame.f_globals.get("__name__", "").startswith("pyrovae_user_"):
                frames.append(f"{frame.f_code.co_filename}, line {line}")
        cause = cause.__cause__
    if frames or not speaks_to_users:
        text += f"{_space(text)}({frames[-1] if frames else 'PYROVAE_TRACEBACK=1 shows where'})"
    return _space(str(error)).join([text, *getattr(error, "__notes__", [])])


def _space(text: str) -> str:
    return "\n" if "\n" in text else " "  # Pyro's messages may end in a table of shapes
