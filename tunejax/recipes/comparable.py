"""Whether a teacher and a student mean the same by what is compared: tokens or labels, positions and their number."""

from collections.abc import Sequence
from typing import NamedTuple

from tunejax.core import errors
from tunejax.models.config import ModelConfig
from tunejax.recipes import artefact, assemble


class Teacher(NamedTuple):
    """What is known of a teacher before its parameters are used.

    labels: names of its classes, where they are known. tuned_by: its run's method, if any; prefix: how many positions
    that takes before every row.
    """

    name: str
    shape: ModelConfig
    labels: tuple[str, ...] = ()
    tuned_by: str = ""
    prefix: int = 0


def check(parts: assemble.Parts, labels: Sequence[str], teacher: Teacher) -> None:
    """Raises ConfigError where the teacher cannot be compared with the student, or does not take its rows.

    parts, labels: of the student; the names of its classes, where it has any.
    """
    name, shape = teacher.name, teacher.shape
    check_vocabulary(parts, name, shape)
    if shape.kind != parts.model_config.kind:  # they carry a label at other ends of a row, and see other tokens
        theirs, ours = (f"a{'n' * (kind == 'encoder')} {kind}" for kind in (shape.kind, parts.model_config.kind))
        raise errors.ConfigError(
            f"distill.teacher {name} is {theirs}, and the student {ours}; expected two of one kind, whose positions "
            "read the same"
        )
    if parts.config.model.head == "classification" and parts.config.distill and parts.config.distill.logits:
        check_labels(name, labels, teacher.labels)
    if shape.max_positions - teacher.prefix < parts.config.data.max_length:
        taken = f", of which {teacher.tuned_by} takes {teacher.prefix}" if teacher.prefix else ""
        raise errors.ConfigError(
            f"distill.teacher {name} has {shape.max_positions} positions{taken}, and data.max_length is "
            f"{parts.config.data.max_length}"
        )


def check_vocabulary(parts: assemble.Parts, name: str, shape: ModelConfig) -> None:
    """Raises ConfigError where the two read a text as other ids, or tell other numbers of them apart."""
    section, ours = parts.config.distill, parts.model_config
    assert section is not None
    theirs, known = artefact.reader(name)[0].get_vocab(), parts.tokenizer.get_vocab()
    other = next((t for t, i in sorted(known.items(), key=lambda item: item[1]) if theirs.get(t, i) != i), None)
    if other is not None:
        raise errors.ConfigError(
            f"distill.teacher {name} has another tokenizer ({other!r} is {theirs[other]} there, {known[other]} here): "
            "set distill.divergence: uld, or train on what it writes (tunejax distill-generate)"
        )
    labels = parts.config.model.head == "classification"
    same = shape.num_labels == ours.num_labels if labels else shape.vocab_size == ours.vocab_size
    if section.logits and section.divergence != "uld" and not same:
        raise errors.ConfigError(
            f"distill.teacher {name} has a vocabulary of {shape.vocab_size} tokens and {shape.num_labels} labels; the "
            f"student {ours.vocab_size} and {ours.num_labels}: distilling logits needs the same ones"
        )
    token, last = assemble.last_token(parts.tokenizer)
    if shape.vocab_size <= last:
        raise errors.ConfigError(
            f"distill.teacher {name} has a vocabulary of {shape.vocab_size} tokens; the student's tokenizer has "
            f"{token!r} with the id {last}"
        )


def check_labels(name: str, ours: Sequence[str], theirs: Sequence[str]) -> None:
    """Raises ConfigError where the names of two models' classes show that their numbers mean other ones.

    Names that have none in common (numbers here and words there) say nothing, nor do unknown ones. Case is left out.
    """
    a, b = ([label.casefold() for label in labels] for labels in (ours, theirs))
    if a == b or not set(a) & set(b):
        return
    advice = ""
    if sorted(a) == sorted(b):
        advice = f": set data.labels=[{', '.join(ours[a.index(label)] for label in b)}]"
    raise errors.ConfigError(
        f"distill.teacher {name} has the labels [{', '.join(theirs)}], and the student [{', '.join(ours)}]; expected "
        f"the same ones in the same order{advice}"
    )
