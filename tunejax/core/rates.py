"""What of a method trains, and how fast."""

import jax

from tunejax.core import method as methods
from tunejax.core import table
from tunejax.core.method import Method, PyTree, Start
from tunejax.core.paths import Params

SCALE = "learning_rate_scale"
"""What any method's description may say: what the learning rate of all that it trains is multiplied by."""


def counts(tuned: Method, params: Params, start: Start) -> table.Table:
    """How many parameters there are, and what of them trains. params, start: arrays, or their ShapeDtypeStructs."""
    return table.table(params, learning(tuned, start.train), start.edits)


def learning(tuned: Method, train: PyTree) -> PyTree:
    """What of ``train`` counts as trained, as `core.table` wants it.

    Leaves whose rate is 0 do not: probes, there for their gradients alone. Of a masked difference only what the mask
    lets through does, as `table.Entries`.
    """
    if tuned.parts:
        return {k: learning(m, train[k]) for k, m in zip(methods.keys(tuned.parts), tuned.parts, strict=True)}
    if tuned.density is not None:
        return {p: table.Entries(tuned.density * jax.tree.leaves(x)[0].size) for p, x in train.items()}
    return jax.tree.map(lambda x, rate: x if rate else None, train, tuned.rates(train))


def at_rate(tuned: Method, scale: float) -> Method:
    """``tuned`` with every learning rate multiplied by ``scale``, decay included (arXiv:1801.06146, section 3.2)."""
    if scale == 1:
        return tuned
    if tuned.parts:
        return methods.chain(*(at_rate(m, scale) for m in tuned.parts))
    return tuned._replace(rates=lambda train: jax.tree.map(lambda rate: scale * rate, tuned.rates(train)))
