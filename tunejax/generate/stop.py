"""Stop strings and streamed text, on the host: tokens come in, text that is safe to show goes out."""

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "�"
"""What a tokenizer shows for the first bytes of a character whose others are still to come."""


def cut(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """``text`` up to the first stop string in it, and whether there was one."""
    places = [i for s in stop_strings if s and (i := text.find(s)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def held_back(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the start of a stop string."""
    longest = 0
    for s in stop_strings:
        for n in range(min(len(s) - 1, len(text)), 0, -1):
            if text.endswith(s[:n]):
                longest = max(longest, n)
                break
    return longest


class TextStream:
    """The text of one row as it is drawn. Invariant: what `push` returned so far is a prefix of the final text.

    It holds back what may still change: bytes of an unfinished character, and the start of a stop string.
    """

    def __init__(self, tokenizer: Any, *, stop_tokens: Sequence[int] = (), stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop_tokens = frozenset(stop_tokens)
        self.stop_strings = tuple(stop_strings)
        self.ids: list[int] = []
        self.shown = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that one more token makes certain; empty once the row has stopped."""
        if self.stopped:
            return ""
        if int(token) in self.stop_tokens:
            return self.finish()
        self.ids.append(int(token))
        text, self.stopped = cut(self._text(), self.stop_strings)
        if not self.stopped:
            if text.endswith(INCOMPLETE):
                return ""
            text = text[: len(text) - held_back(text, self.stop_strings)]
        return self._show(text)

    def finish(self) -> str:
        """What was held back; the row has stopped."""
        if self.stopped:
            return ""
        self.stopped = True
        return self._show(cut(self._text(), self.stop_strings)[0])

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def _show(self, text: str) -> str:
        new = text[len(self.shown) :]
        self.shown = text if len(text) > len(self.shown) else self.shown
        return new
