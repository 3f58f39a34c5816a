"""What becomes of a row that cannot be used: all of them in one error, or skipped and counted by reason."""

from typing import Literal

from tunejax.core import errors

Policy = Literal["error", "skip"]

MALFORMED = "malformed"
ENCODING = "invalid UTF-8"
MISSING = "missing key"
TYPE = "wrong type"
EMPTY = "empty"
LONG = "too long"
LABEL = "unknown label"
UNLABELLED = "no label"
TEMPLATE = "template"
NO_LOSS = "no token in the loss"

SHOWN = 10
KEPT = 5


class BadRows:
    """Collects bad rows. ``skipped`` counts by reason; ``samples`` keeps the first messages of each.

    With the policy "error", `check` raises one DataError that lists the first ten.
    """

    def __init__(self, policy: Policy = "error"):
        if policy not in ("error", "skip"):
            raise errors.ConfigError(f"on_bad_row is {policy!r}. {errors.did_you_mean(str(policy), ('error', 'skip'))}")
        self.policy = policy
        self.skipped: dict[str, int] = {}
        self.samples: dict[str, list[str]] = {}
        self._problems: list[str] = []

    def add(self, reason: str, source: str, message: str, skip: bool = False) -> None:
        """One bad row; ``skip`` skips it whatever the policy. ``message`` says what was found and expected."""
        line = f"{source}: {message}"
        if self.policy == "error" and not skip:
            self._problems.append(line)
            return
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        kept = self.samples.setdefault(reason, [])
        if len(kept) < KEPT:
            kept.append(line)

    def check(self) -> None:
        """Raises DataError if the policy is "error" and a row was bad."""
        if not self._problems:
            return
        shown = self._problems[:SHOWN]
        more = len(self._problems) - len(shown)
        count = f"{len(self._problems)} bad rows\n  " if len(self._problems) > 1 else ""
        tail = f"\n  ... and {more} more" if more else ""
        advice = "\nFix them, or say data.on_bad_row=skip to leave such rows out (they are counted)."
        raise errors.DataError(count + "\n  ".join(shown) + tail + advice)

    def describe(self) -> str:
        """ "3 missing key, 1 empty", or "none"."""
        return ", ".join(f"{n} {reason}" for reason, n in self.skipped.items()) or "none"


def kind(value: object) -> str:
    """A value's JSON type and a glimpse of it, for a message."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    name = "null" if value is None else names.get(type(value), type(value).__name__)
    text = repr(value)
    return name if value is None else f"{name} {text[:40]}{'...' if len(text) > 40 else ''}"
