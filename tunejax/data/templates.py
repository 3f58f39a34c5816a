"""Templates: text with the fields of a row in braces, and virtual tokens in marks (see `virtual`)."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from tunejax.data import virtual

FIELD = re.compile(r"\{(\w+)\}")
"""A field of a template."""


def fields_of(template: str) -> list[str]:
    """The names in braces of a template."""
    return FIELD.findall(template)


def filled(template: str, value: Callable[[str], str | None]) -> str:
    """A template with the value of each field, which stays as it is where that is None; marks as `virtual.named`."""
    return FIELD.sub(lambda m: m[0] if (found := value(m[1])) is None else found, virtual.named(template))


def shortened(tokenizer: Any, template: str, fields: Mapping[str, str], room: int, fixed: tuple[str, ...] = ()) -> Any:
    """What the tokenizer says of a filled template once its fields lose their ends, token by token and the longest
    first, until there are at most ``room`` tokens. None where too many are left without them.

    The template's own words and the fields ``fixed`` stay whole.
    """
    values = dict(fields)
    free = [n for n in dict.fromkeys(fields_of(template)) if n not in fixed]
    while len((made := tokenizer(filled(template, values.get), verbose=False))["input_ids"]) > room:
        spans = {n: _spans(tokenizer, values[n]) for n in free}
        kept = {n: len(found) for n, found in spans.items()}
        for _ in range(len(made["input_ids"]) - room):
            longest = max(kept, key=lambda n: kept[n], default="")
            if not kept.get(longest):
                return None
            kept[longest] -= 1
        # Up to where the first lost token begins: a character of several tokens goes with any of them.
        cut = {n: values[n][: spans[n][k][0]].rstrip() for n, k in kept.items() if k < len(spans[n])}
        if all(values[n] == text for n, text in cut.items()):
            return None
        values |= cut
    return made


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Start and end of each token of a text, in characters."""
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
