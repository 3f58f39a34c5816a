"""Virtual tokens in a template: ``{virtual:3}`` is the next three of a method's (P-tuning, arXiv:2103.10385, 3.2).

The tokenizer reads each as one special token, so what stands beside it is read as beside any special token.
"""

import copy
import re
from typing import Any

from tunejax.core import errors

MARK = re.compile(r"\{virtual:([1-9]\d*)\}")
"""Where a template has virtual tokens, and how many."""
_LIKE = re.compile(r"\{\s*virtual\b[^}]*\}?")


def count(template: str | None) -> int:
    """How many virtual tokens a template places. Raises ConfigError on a mark that is written wrong."""
    for like in _LIKE.findall(template or ""):
        if not MARK.fullmatch(like):
            raise errors.ConfigError(
                f"data.template holds {like!r}; expected such as '{{virtual:3}}', for the next three"
            )
    return sum(map(int, MARK.findall(template or "")))


def check(template: str | None, length: int, method: str = "the method") -> None:
    """Raises ConfigError where a template places virtual tokens, but not as many as the method trains."""
    placed = count(template)
    if placed and placed != length:
        found = ", ".join(m[0] for m in MARK.finditer(template or ""))
        raise errors.ConfigError(
            f"data.template places {placed} virtual tokens ({found}), and {method} trains {length or 'none'}: "
            "expected all of a method's, or no mark, where they stand in front"
        )


def front(template: str | None, ids: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a method's virtual tokens ``ids`` that stand before every example: all, or none where a template
    places them."""
    return () if count(template) else ids


def named(template: str) -> str:
    """``template`` with each mark as the names that `Reader` reads as virtual tokens."""
    names = map(_name, range(count(template)))
    return MARK.sub(lambda m: "".join(next(names) for _ in range(int(m[1]))), template)


def _name(i: int) -> str:
    return f"\ue000{i}\ue001"  # of the private use area, which no text has


class Reader:
    """A tokenizer that also reads the names of `named`, as the virtual tokens ``ids``; the given one is not changed."""

    def __init__(self, tokenizer: Any, ids: tuple[int, ...]) -> None:
        from tokenizers import AddedToken

        if not tokenizer.is_fast:
            raise errors.ConfigError("virtual tokens in data.template need a tokenizer.json (a fast tokenizer)")
        self._inner = copy.deepcopy(tokenizer)
        self._ids = {_name(i): own for i, own in enumerate(ids)}
        self._inner.add_tokens([AddedToken(n, normalized=False, special=True) for n in self._ids], special_tokens=True)

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        """What the tokenizer says, with the virtual tokens' own ids."""
        made = self._inner(text, *args, **options)
        # By name: where a vocabulary has gaps, an added token's id may be that of another.
        found = [[self._ids.get(t, i) for t, i in zip(e.tokens, e.ids, strict=True)] for e in made.encodings]
        made["input_ids"] = found[0] if isinstance(text, str) else found
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def reader(tokenizer: Any, ids: tuple[int, ...]) -> Any:
    """``tokenizer``, or its `Reader` where there are virtual tokens to read."""
    return Reader(tokenizer, ids) if ids else tokenizer
