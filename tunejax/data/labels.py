"""Labels and the numbers of their classes: which classes there are, in which order, and which of them a row has."""

from collections.abc import Collection, Sequence
from typing import Any

from tunejax.core import errors
from tunejax.data.class_labels import ClassName
from tunejax.data.files import Row


def names(rows: Sequence[Row], known: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes of the rows, in order: those of the model's head, else of the data set, else the rows' own.

    Their own are sorted, as numbers where all are. An empty label is none.

    Args:
      known: names of the classes of a trained head, which are taken where they cover the rows' labels (case aside).
        Numbers among the head's outputs are those outputs, whatever they are called.

    Raises:
      DataError: there are fewer than two.
    """
    values = [v for r in rows if isinstance(v := r.fields.get("label"), str | int) and _is_class(v)]
    found = {str(v) for v in values}
    where = rows[0].source if rows else "no rows"
    if rows and not any("label" in r.fields for r in rows):
        there = rows[0].fields
        raise errors.DataError(
            f"{where}: missing key 'label', as in all rows; found {', '.join(there)}. "
            f"{errors.did_you_mean('label', there)} Rename it by data.columns={{label: theirs}}."
        )
    order = _of_head(found, known) or _of_data_set(values)
    if order is not None and found and len(order) > 1:
        return order
    if len(found) < 2:
        raise errors.DataError(f"{where}: expected at least two different labels, found {sorted(found)}")
    return tuple(sorted(found, key=(lambda v: (int(v), v)) if all(map(_is_number, found)) else str))


def _is_class(value: str | int) -> bool:
    return value.labelled if isinstance(value, ClassName) else bool(str(value).strip())


def _of_head(found: Collection[str], known: Sequence[str]) -> tuple[str, ...] | None:
    """The head's classes as the rows spell them; None where one of the rows' is not among them."""
    if set(found) <= set(known):
        return tuple(known) or None
    spelt = {v.casefold(): v for v in found}
    folded = [name.casefold() for name in known]
    if len(spelt) == len(found) and len(set(folded)) == len(folded) and set(spelt) <= set(folded):
        return tuple(spelt.get(f, name) for f, name in zip(folded, known, strict=True))
    outputs = tuple(str(i) for i in range(len(known)))
    return outputs if set(found) <= set(outputs) else None


def _of_data_set(values: Sequence[Any]) -> tuple[str, ...] | None:
    """The classes of the data set that the labels are from; None where they are from none, or from several."""
    orders = {v.names if isinstance(v, ClassName) else None for v in values}
    return orders.pop() if len(orders) == 1 else None


def number(value: str | int, names: Sequence[str]) -> int | None:
    """Which of the classes a label is; None where it is none of them.

    A number that is no name is the place of a name, but among names that are numbers: 0 is then the label 0, which is
    none of them, and not the first of them.
    """
    if str(value) in names:
        return list(names).index(str(value))
    place: Any = value
    if isinstance(value, ClassName) and not set(value.names) & set(names):  # the config calls its classes otherwise
        place = value.number
        if str(place) in names:
            return list(names).index(str(place))
    counts = isinstance(place, int) and not isinstance(place, bool) and not all(map(_is_number, names))
    return place if counts and 0 <= place < len(names) else None


def check_order(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigError where the classes' numbers are not those that the model's head was trained on.

    Names are compared, case aside. Those that are numbers say something only where all of them are the head's too.

    Args:
      names: of the classes, in the order of the run.
      known: names of the classes of a trained head; empty where there is none.
    """
    ours, theirs = ([name.casefold() for name in some] for some in (names, known))
    moved = [n for i, n in enumerate(ours) if n in theirs and theirs.index(n) != i]
    same = sorted(ours) == sorted(theirs)
    if tuple(names) == tuple(known) or not moved or (not same and all(map(_is_number, moved))):
        return
    advice = "set data.labels in the order of the head"
    if same:
        advice = f"set data.labels=[{', '.join(names[ours.index(n)] for n in theirs)}], or leave it out"
    raise errors.ConfigError(
        f"the labels are [{', '.join(names)}], and the checkpoint's classification head was trained on "
        f"[{', '.join(known)}]: {names[ours.index(moved[0])]!r} has another number there; {advice}"
    )


def _is_number(value: str) -> bool:
    return value.lstrip("-").isdigit()
