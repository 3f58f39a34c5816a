"""Errors that a person can act on: what was found, what was expected, and the nearest valid choice."""

import difflib
from collections.abc import Iterable


class TunejaxError(Exception):
    """A mistake in the user's input; the command line prints it alone (no traceback) and exits with 2."""


class ConfigError(TunejaxError):
    """A key, value or flag that does not fit."""


class DataError(TunejaxError):
    """A row or file that cannot be used; the message names file and line."""


class CheckpointError(TunejaxError):
    """A checkpoint that is missing, damaged, of an unknown family, or made for another model."""


class TargetError(TunejaxError):
    """A target pattern that matches nothing, or two methods that rewrite one path."""


class NotLinear(TunejaxError):
    """An operator that no plain kernel equals, so it cannot be merged; the message names the path."""


def nearest(name: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The at most ``n`` choices that look most like ``name``, best first."""
    by_text = {str(c): str(c) for c in choices}
    return difflib.get_close_matches(str(name), list(by_text), n=n, cutoff=0.4)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence that offers the nearest choice, or lists the choices where none is near."""
    choices = sorted(str(c) for c in choices)
    close = nearest(name, choices)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"Choices: {shown}." if choices else ""
