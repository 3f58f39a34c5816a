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
    """What the tokenizer says of a filled template once its longest fields lose their ends, until it has at most
    ``room`` tokens; None where the template alone has more. Its own words and the fields ``fixed`` stay whole (PET,
    Schick and Schütze, 2021, arXiv:2001.07676, cuts the same).
    """
    values = dict(fields)
    free = [n for n in dict.fromkeys(fields_of(template)) if n not in fixed]
    while len((made := tokenizer(filled(template, values.get), verbose=False))["input_ids"]) > room:
        found = {n: _spans(tokenizer, values[n]) for n in free}
        longest = max(found, key=lambda n: len(found[n]), default="")
        spans = found.get(longest)
        if not spans:
            return None
        kept = max(len(spans) - (len(made["input_ids"]) - room), 0)
        values[longest] = values[longest][: spans[kept - 1][1] if kept else 0]
    return made


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Start and end of each token of a text, in characters."""
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
