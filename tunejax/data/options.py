"""How rows become examples: the options that the readers, formats and the loader share."""

import dataclasses
from typing import Literal

from tunejax.core import errors
from tunejax.data import bad, templates, virtual

Format = Literal["text", "prompt_completion", "messages", "classification"]
FORMATS = ("text", "prompt_completion", "messages", "classification")
OBJECTIVES = ("causal_lm", "masked_lm", "classification", "cloze")
LABELLED = ("classification", "cloze")
"""Objectives on rows with labels."""
MASK = "mask"
"""The field of a template where a cloze has its gap."""
TRUNCATION = ("error", "skip", "end", "split")


@dataclasses.dataclass(frozen=True)
class Options:
    """How rows become examples.

    format: None tells it from the fields of the first row (see `formats.detect`).
    objective: "causal_lm" shifts targets; "masked_lm" keeps whole texts whose tokens are hidden when a batch is made;
        "classification" puts the label at one position; "cloze" at the template's "{mask}".
    max_length: positions of an example at most, special tokens and ``prompt`` included.
    truncation: what a longer row is: "error" a bad row, "skip" left out and counted, "end" cut at its end, "split"
        (format text only) cut into several examples.
    append_eos: end every row with the end-of-sequence token, in the loss.
    completion_only_loss, assistant_only_loss: False: prompts and other turns are in the loss too.
    template: text around "{prompt}" (of prompt_completion) or "{text}" (of classification); any field of the row may
        stand in braces, and "{virtual:3}" is the next three of ``prompt``.
    labels: names of the classes in order; None: see `labels.names`.
    known: names of the classes of the model's trained head, whose order the classes have.
    labelled: the position that is classified: "first" ([CLS] of an encoder) or "last" (of a decoder).
    eos_token_id: instead of the tokenizer's.
    prompt: ids of virtual tokens, never in the loss. They stand where the template has them, else before every example
        of a batch; then rows have `room` tokens.
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
    known: tuple[str, ...] = ()
    labelled: str = "first"
    eos_token_id: int | None = None
    on_bad_row: bad.Policy = "error"
    prompt: tuple[int, ...] = ()

    @property
    def room(self) -> int:
        """Tokens of a row at most: max_length without what stands in front."""
        return self.max_length - len(self.front)

    @property
    def front(self) -> tuple[int, ...]:
        """The virtual tokens that stand before every example, and not in rows."""
        return virtual.front(self.template, self.prompt)

    @property
    def inside(self) -> tuple[int, ...]:
        """The virtual tokens that the template has in every row."""
        return self.prompt[len(self.front) :]

    @property
    def answers_only(self) -> bool:
        """Whether nothing but answers is in the loss, where a format has answers."""
        return self.completion_only_loss and self.assistant_only_loss

    @property
    def labels_first(self) -> bool:
        """Whether an example carries its label at its first position."""
        return self.labels is not None and self.objective == "classification" and self.labelled == "first"

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
                f"max_length is {self.max_length}, and {len(self.front)} virtual tokens stand before every example; "
                f"expected {len(self.front) + 2} or more"
            )
        virtual.check(self.template, len(self.prompt))
        if self.template is not None and not templates.fields_of(self.template):
            raise errors.ConfigError(f"template {self.template!r} has no field; expected text around '{{prompt}}'")
        if self.objective == "cloze":
            check_gap(self.template)
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise errors.ConfigError(f"labels name a class twice: {', '.join(self.labels)}")


def check_gap(template: str | None) -> None:
    """Raises ConfigError where a template has not one gap, as a cloze needs."""
    if templates.fields_of(template or "").count(MASK) != 1:
        raise errors.ConfigError(
            f"data.template is {template!r}; a cloze needs one with '{{mask}}' once: '{{text}} It was {{mask}}.'"
        )
