"""How many parameters a model has, by module, and what share of them trains."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from tunejax.core import operators, paths


class Row(NamedTuple):
    """One module: "layers/attention/q". parameters: of the model; trained: of the method, there."""

    module: str
    parameters: int
    trained: int


class Entries(NamedTuple):
    """So many of a model leaf's own entries, where what trains is a difference from them and a mask says of which."""

    number: float


class Table(NamedTuple):
    """Counts by module. total: of the model; trained: of the method; added: what the method adds to the model."""

    rows: list[Row]
    total: int
    trained: int
    added: int

    @property
    def share(self) -> float:
        """Trained parameters over all, those that the method adds included."""
        return self.trained / max(self.total + self.added, 1)

    def text(self) -> str:
        """The table in plain text, right-aligned."""
        cells = [(r.module, f"{r.parameters:,}", f"{r.trained:,}" if r.trained else "-") for r in self.rows]
        cells = [("module", "parameters", "trained"), *cells, ("all", f"{self.total:,}", f"{self.trained:,}")]
        widths = [max(len(c[i]) for c in cells) for i in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in cells]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line, in the words that PEFT prints."""
        every = self.total + self.added
        return f"trainable params: {self.trained:,} || all params: {every:,} || trainable%: {100 * self.share:.4f}"


def table(params: Mapping[str, Any], train: Any = None, edits: Mapping[str, Any] | None = None) -> Table:
    """The counts of ``params`` (before edits) and of what trains.

    Args:
      params: nested dict of arrays, or of their ShapeDtypeStructs.
      train, edits: of the method's `Start`, the former as `core.rates.learning` gives it. A leaf of train kept under
        a model path counts there; others are "other".
    """
    flat = paths.flatten(params)
    holes = {p for p, leaf in (edits or {}).items() if leaf is None}
    counts: dict[str, list[float]] = {}
    for path, leaf in flat.items():
        counts.setdefault(module(path), [0, 0])[0] += paths.size(leaf)
    added = 0
    for where, n, own in _trained(train, flat):
        counts.setdefault(module(where) if where else "other", [0, 0])[1] += n
        added += 0 if own or where in holes else int(n)
    rows = [Row(name, int(p), round(t)) for name, (p, t) in counts.items() if p or t]
    return Table(rows, sum(r.parameters for r in rows), round(sum(t for _, t in counts.values())), added)


def module(path: paths.Path) -> str:
    """The module of a path, all layers as one: layers/0/attention/q/kernel -> layers/attention/q."""
    keys = path.split("/")[:-1] or [path]
    return "/".join(["layers", *keys[2:]]) if keys[0] == "layers" else "/".join(keys)


def _trained(train: Any, flat: Mapping[paths.Path, Any], at: paths.Path = "") -> list[tuple[paths.Path, float, bool]]:
    """(path or "", how many, whether they are the model's own) of each leaf of ``train``."""
    if isinstance(train, Entries):
        return [(at, train.number, True)]
    if isinstance(train, Mapping):
        return [found for k, v in train.items() for found in _trained(v, flat, k if k in flat else at)]
    leaves = [x for x in jax.tree.leaves(train) if operators.is_array(x)]
    return [(at, paths.size(x), False) for x in leaves]
