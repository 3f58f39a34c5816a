"""How rows become examples: the options that the readers, formats and the loader share."""

import dataclasses
import re
from typing import Literal

from tunejax.core import errors
from tunejax.data import bad

Format = Literal["text", "prompt_completion", "messages", "classification"]
FORMATS = ("text", "prompt_completion", "messages", "classification")
OBJECTIVES = ("causal_lm", "masked_lm", "classification")
TRUNCATION = ("error", "skip", "end", "split")


@dataclasses.dataclass(frozen=True)
class Options:
    """How rows become examples.

    format: None tells it from the fields of the first row (see `formats.detect`).
    objective: "causal_lm" shifts targets; "masked_lm" keeps whole texts whose tokens are hidden when a batch is made;
        "classification" puts the label at one position.
    max_length: positions of an example at most, special tokens and ``prompt`` included.
    truncation: what a longer row is: "error" a bad row, "skip" left out and counted, "end" cut at its end, "split"
        (format text only) cut into several examples.
    append_eos: end every row with the end-of-sequence token, in the loss.
    completion_only_loss, assistant_only_loss: False: prompts and other turns are in the loss too.
    template: for prompt_completion: text around "{prompt}"; any field of the row may stand in braces.
    labels: names of the classes in order; None: those of the rows, sorted.
    labelled: the position that is classified: "first" ([CLS] of an encoder) or "last" (of a decoder).
    eos_token_id: instead of the tokenizer's.
    prompt: ids that every example of a batch begins with, never in the loss (virtual tokens). Rows have `room` tokens.
    """

    format: Format | None = None
    objective: str = "causal_lm"
    max_length: int = 512
    truncation: str = "error"
    append_eos: bool = True
    completion_only_loss: bool = True
    assistant_only_loss: bool = True
    template: str | None = None
    labels: tuple[str, ...] | None = None
    labelled: str = "first"
    eos_token_id: int | None = None
    on_bad_row: bad.Policy = "error"
    prompt: tuple[int, ...] = ()

    @property
    def room(self) -> int:
        """Tokens of a row at most: max_length without the prompt."""
        return self.max_length - len(self.prompt)

    def __post_init__(self) -> None:
        choices = {
            "format": (None, *FORMATS),
            "objective": OBJECTIVES,
            "truncation": TRUNCATION,
            "labelled": ("first", "last"),
            "on_bad_row": ("error", "skip"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                known = [c for c in allowed if c is not None]
                raise errors.ConfigError(f"{name} is {value!r}. {errors.did_you_mean(str(value), known)}")
        if self.max_length < 2:
            raise errors.ConfigError(f"max_length is {self.max_length}; expected 2 or more")
        if self.room < 2:
            raise errors.ConfigError(
                f"max_length is {self.max_length}, and {len(self.prompt)} virtual tokens stand before every example; "
                f"expected {len(self.prompt) + 2} or more"
            )
        if self.template is not None and not fields_of(self.template):
            raise errors.ConfigError(f"template {self.template!r} has no field; expected text around '{{prompt}}'")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise errors.ConfigError(f"labels name a class twice: {', '.join(self.labels)}")


FIELD = re.compile(r"\{(\w+)\}")
"""A field of a template."""


def fields_of(template: str) -> list[str]:
    """The names in braces of a template."""
    return FIELD.findall(template)
