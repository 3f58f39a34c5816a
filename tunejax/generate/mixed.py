"""One batch, several adapters: each row is computed by what one of them makes of the shared base.

A `jax.vmap` over rows of bind and forward: products with the base stay one product of all rows, since the base has no
rows' axis; what a method adds becomes a product a row. Any method whose arrays stack can be served so; the model that
comes out decodes, scores and samples like any other (`generate.decode`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import errors
from tunejax.core.method import Context, Method
from tunejax.core.model import Batch, Model
from tunejax.core.paths import Params

PyTree = Any


class Adapters(NamedTuple):
    """Adapters of one method on one base, each leaf of train and state with the adapters' axis in front.

    base: after the method's edits.
    """

    base: Params
    train: PyTree
    state: PyTree


def stacked(base: Params, trains: Sequence[PyTree], states: Sequence[PyTree]) -> Adapters:
    """The adapters in this order. Raises ConfigError where their arrays differ in name or shape."""
    shapes = [jax.tree.map(jnp.shape, both) for both in zip(trains, states, strict=True)]
    if any(s != shapes[0] for s in shapes):
        raise errors.ConfigError("adapters in one batch must hold arrays of the same names and shapes")
    train, state = (jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for trees in (trains, states))
    return Adapters(base, train, state)


def chosen(adapters: Adapters, ids: Any) -> Params:
    """What the model of `model_of` reads where row i is computed by adapter ``ids[i]``; ids int [rows].

    Raises:
      ConfigError: no such adapter.
    """
    leaves = jax.tree.leaves((adapters.train, adapters.state))
    count = leaves[0].shape[0] if leaves else 1
    wrong = [int(i) for i in ids if not 0 <= int(i) < count]
    if wrong:
        raise errors.ConfigError(f"there is no adapter {wrong[0]}: they count from 0 to {count - 1}")
    rows = jnp.asarray(ids, jnp.int32)
    take = lambda x: jnp.take(x, rows, axis=0)  # noqa: E731
    train, state = (jax.tree.map(take, t) for t in (adapters.train, adapters.state))
    return {"base": adapters.base, "train": train, "state": state, "rows": rows}


def model_of(model: Model, method: Method) -> Model:
    """The model whose parameters are those of `chosen`; a batch must have as many rows as were chosen.

    ``head`` keeps all of the parameters, since a row's head may be its own; there is no ``init``.
    """

    def bound(params: Params, train: PyTree, state: PyTree) -> Params:
        return method.bind(params["base"], train, state, Context(rows=True))

    def hidden(
        params: Params, batch: Batch, *, cache: Any = None, taps: Sequence[str] = (), key: Any = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        if key is not None:
            raise errors.ConfigError("rows with adapters of their own are for use, not for training: no dropout")

        def row(train: PyTree, state: PyTree, batch: Batch, cache: Any) -> Any:
            one = {k: x[None] for k, x in batch.items()}
            out, aux = model.hidden(bound(params, train, state), one, cache=cache, taps=taps)
            kept = aux.get("cache")
            return out[0], {t: aux[t][:, 0] for t in taps}, kept

        args = (params["train"], params["state"], dict(batch), cache)
        shared = jax.tree.map(lambda x: None if x.ndim == 0 else 0, cache)  # where the next slot is, all rows agree

        def mapped(kept_axes: Any) -> Any:
            return jax.vmap(row, (0, 0, 0, shared), (0, 1, kept_axes), axis_size=params["rows"].shape[0])

        shapes = jax.eval_shape(mapped(0), *args)[2]
        out = mapped(jax.tree.map(lambda x: None if x.ndim == 1 else 0, shapes))
        found, tapped, kept = out(*args)
        return found, {**tapped, **({} if kept is None else {"cache": kept})}

    def logits(params: Params, hidden: jax.Array) -> jax.Array:
        def row(train: PyTree, state: PyTree, hidden: jax.Array) -> jax.Array:
            return model.logits(model.head(bound(params, train, state)), hidden)

        return jax.vmap(row, axis_size=params["rows"].shape[0])(params["train"], params["state"], hidden)

    def cache(batch: int, length: int, dtype: Any) -> Any:
        assert model.cache is not None
        spread = lambda x: x if x.ndim == 0 else jnp.broadcast_to(x, (batch, *x.shape))  # noqa: E731
        return jax.tree.map(spread, model.cache(1, length, dtype))

    return model._replace(
        init=_no_init, hidden=hidden, head=lambda params: params, logits=logits,
        cache=None if model.cache is None else cache, axes={},
    )  # fmt: skip


def _no_init(key: Any) -> Params:
    raise errors.ConfigError("a model of several adapters has no parameters of its own: see mixed.chosen")
