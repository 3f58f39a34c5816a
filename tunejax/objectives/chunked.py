"""Losses over a large vocabulary whose logits never exist for a whole sequence.

The loss walks the length axis in chunks and forms the gradient of each chunk while its logits are at hand, so the
backward pass multiplies by one scalar. Memory grows with ``batch * chunk * vocab``, not with the length, and each
float32 logit is read a few times while it is in cache. Only what is perturbed costs gradient work: a frozen head
has no [vocab, embed] gradient anywhere in the program.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core.paths import Params

CHUNK_BYTES = {"cpu": 32 << 20}
"""Float32 logits of one chunk on one device, by platform, unless a caller chooses a chunk size. Smaller chunks are
kinder to caches, larger ones read the head (and add to its gradient) fewer times."""
ELSEWHERE = 512 << 20
"""The same on any other platform: narrow products would starve a matrix unit."""

Metrics = dict[str, jax.Array]


class Given(NamedTuple):
    """What a loss reads beside the logits, and has no gradient to.

    rows: any pytree of arrays, one row a position: [batch, length, ...] for a caller, [rows, ...] for a `Loss`.
    whole: any pytree, the same for every position: a teacher's head, say.
    """

    rows: Any
    whole: Any = None


class Loss(NamedTuple):
    """A loss of each row of float32 logits x [rows, vocab]. Static: compared by its functions.

    value: (x, given) -> (loss [rows], saved, metrics by name, each [rows]).
    slope: (x, saved, given, weights [rows]) -> the gradient of ``sum(weights * loss)`` to x.
    """

    value: Callable[[jax.Array, Given], tuple[jax.Array, Any, Metrics]]
    slope: Callable[[jax.Array, Any, Given, jax.Array], jax.Array]


def differentiated(value: Callable[[jax.Array, Given], tuple[jax.Array, Metrics]]) -> Loss:
    """The `Loss` of (x, given) -> (loss [rows], metrics), with the slope that JAX finds."""

    def slope(x: jax.Array, saved: Any, given: Given, weights: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: value(x, given)[0], x)[1](weights)[0]

    def with_saved(x: jax.Array, given: Given) -> tuple[jax.Array, Any, Metrics]:
        loss, metrics = value(x, given)
        return loss, None, metrics

    return Loss(with_saved, slope)


class _Spec(NamedTuple):
    """What is static: the loss, how leaves make a head, and how a head makes logits."""

    loss: Loss
    logits: Callable[[Params, jax.Array], jax.Array]
    structure: Any
    chunk: int


def weighted_sum(
    loss: Loss,
    logits: Callable[[Params, jax.Array], jax.Array],
    head: Params,
    hidden: jax.Array,
    given: Given,
    weights: jax.Array,
    *,
    vocab_size: int,
    chunk_size: int | None = None,
) -> tuple[jax.Array, Metrics]:
    """The weighted sums, float32 scalars, of a loss and of its metrics over all positions.

    Args:
      loss: of rows of logits.
      logits: (head, hidden [..., embed]) -> [..., vocab], position-wise.
      head: parameters that ``logits`` reads; leaves may belong to operators.
      hidden: [batch, length, embed].
      given: what else the loss reads. Nothing flows back to it.
      weights: [batch, length].
      vocab_size: entries of the logits (of the teacher's too, if the loss makes them), to size the chunks.
      chunk_size: positions a chunk; by default as many as fit `CHUNK_BYTES` on each device of the current mesh.
    """
    batch, length, _ = hidden.shape
    leaves, structure = jax.tree.flatten(head)
    chunk = min(chunk_size or default_chunk(batch, vocab_size), length)
    chunks = math.ceil(length / chunk)
    chunk = math.ceil(length / chunks)
    short = chunks * chunk - length
    rows, whole = jax.lax.stop_gradient(tuple(given))
    if short:
        hidden, rows, weights = jax.tree.map(
            lambda x: jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)), (hidden, rows, weights)
        )
    spec = _Spec(loss, logits, structure, chunk)
    return _weighted_sum(spec, leaves, hidden, rows, whole, weights.astype(jnp.float32))


def default_chunk(batch: int, vocab_size: int) -> int:
    """Positions whose float32 logits [rows, vocab] take `CHUNK_BYTES` on each device of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    budget = CHUNK_BYTES.get(jax.default_backend(), ELSEWHERE)
    return max(1, budget * devices // (4 * batch * vocab_size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(spec: _Spec, leaves: list, hidden: jax.Array, rows: Any, whole: Any, weights: jax.Array) -> Any:
    def one(total: Any, start: jax.Array) -> tuple[Any, None]:
        h, r, w = jax.tree.map(lambda x: _window(x, start, spec.chunk), (hidden, rows, weights))
        x = spec.logits(jax.tree.unflatten(spec.structure, leaves), h).astype(jnp.float32)
        losses, _, metrics = spec.loss.value(x, Given(r, whole))
        return jax.tree.map(lambda t, x: t + jnp.sum(w * x), total, (losses, metrics)), None

    return _over_chunks(one, _zeros(spec, leaves, hidden, rows, whole), hidden.shape[1], spec.chunk)[0]


def _zeros(spec: _Spec, leaves: list, hidden: jax.Array, rows: Any, whole: Any) -> Any:
    """(0, a 0 for every metric): where the sums begin."""

    def names(leaves: list, hidden: jax.Array, rows: Any, whole: Any) -> Any:
        x = spec.logits(jax.tree.unflatten(spec.structure, leaves), hidden[:, 0]).astype(jnp.float32)
        losses, _, metrics = spec.loss.value(x, Given(jax.tree.map(lambda x: x[:, 0], rows), whole))
        return losses, metrics

    shapes = jax.eval_shape(names, leaves, hidden, rows, whole)
    return jax.tree.map(lambda x: jnp.zeros((), jnp.float32), shapes)


def _forward(spec: _Spec, leaves: list, hidden: Any, rows: Any, whole: Any, weights: Any) -> tuple[Any, Any]:
    """The loss with the gradients of whatever is perturbed; they are the residuals."""
    values = [x.value for x in leaves]
    wanted = [i for i, x in enumerate(leaves) if x.perturbed]
    to_hidden, to_weights = hidden.perturbed, weights.perturbed
    rows, whole = jax.tree.map(lambda x: x.value, (rows, whole), is_leaf=_is_primal)

    def one(total: Any, start: jax.Array) -> tuple[Any, Any]:
        h, r, w = jax.tree.map(lambda x: _window(x, start, spec.chunk), (hidden.value, rows, weights.value))

        def head(some: list, h: jax.Array) -> jax.Array:
            full = list(values)
            for i, x in zip(wanted, some, strict=True):
                full[i] = x
            return spec.logits(jax.tree.unflatten(spec.structure, full), h)

        some = [values[i] for i in wanted]
        if to_hidden:
            logits, pull = jax.vjp(head, some, h)
        elif wanted:
            logits, pull = jax.vjp(lambda s: head(s, h), some)
        else:
            logits, pull = head(some, h), None
        x, given = logits.astype(jnp.float32), Given(r, whole)
        losses, saved, metrics = spec.loss.value(x, given)
        back = pull(spec.loss.slope(x, saved, given, w).astype(logits.dtype)) if pull else ([],)
        totals, sums = total
        totals = jax.tree.map(lambda t, x: t + jnp.sum(w * x), totals, (losses, metrics))
        sums = [s + g.astype(jnp.float32) for s, g in zip(sums, back[0], strict=True)]
        return (totals, sums), (back[1] if to_hidden else None, losses if to_weights else None)

    zeros = _zeros(spec, values, hidden.value, rows, whole)
    sums = [jnp.zeros(values[i].shape, jnp.float32) for i in wanted]
    (totals, sums), outs = _over_chunks(one, (zeros, sums), hidden.value.shape[1], spec.chunk)
    outs = jax.tree.map(lambda x: _joined(x, hidden.value.shape[:2], spec.chunk), outs)
    grads: list = [None] * len(values)
    for i, g in zip(wanted, sums, strict=True):
        grads[i] = g.astype(values[i].dtype)
    return totals, (grads, *outs)


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _backward(spec: _Spec, residuals: Any, slopes: Any) -> tuple[Any, ...]:
    scale = slopes[0]
    if type(scale) is jax.custom_derivatives.SymbolicZero:
        scale = jnp.zeros((), jnp.float32)
    leaves, hidden, weights = jax.tree.map(lambda g: (g * scale).astype(g.dtype), residuals)
    return list(leaves), hidden, None, None, weights


_weighted_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _window(x: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    """Positions start to start + chunk as rows [batch * chunk, ...]: with one row axis no product needs a transpose."""
    part = x if x.shape[1] == chunk else jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
    return part.reshape(-1, *x.shape[2:])


def _over_chunks(one: Callable, init: Any, length: int, chunk: int) -> tuple[Any, Any]:
    """``one`` over the starts of the chunks; what it returns a chunk comes stacked."""
    if length == chunk:
        total, outs = one(init, 0)
        return total, jax.tree.map(lambda x: x[None], outs)
    return jax.lax.scan(one, init, np.arange(0, length, chunk, dtype=np.int32))


def _joined(x: jax.Array, shape: tuple[int, int], chunk: int) -> jax.Array:
    """[chunks, batch * chunk, ...] -> [batch, length, ...]."""
    x = x.reshape(-1, shape[0], chunk, *x.shape[2:])
    return jnp.moveaxis(x, 0, 1).reshape(*shape, *x.shape[3:])
