"""Cross-entropy over a large vocabulary whose logits never exist for a whole sequence.

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

from tunejax.core.paths import Params

CHUNK_BYTES = {"cpu": 32 << 20}
"""Float32 logits of one chunk on one device, by platform, unless a caller chooses a chunk size. Smaller chunks are
kinder to caches, larger ones read the head (and add to its gradient) fewer times."""
ELSEWHERE = 512 << 20
"""The same on any other platform: narrow products would starve a matrix unit."""


class Output(NamedTuple):
    """loss: float32 scalar, the weighted sum. correct: float32 scalar, the weights of positions whose target has the
    highest logit (0 unless asked for)."""

    loss: jax.Array
    correct: jax.Array


class _Spec(NamedTuple):
    """What is static: how leaves make a head, how a head makes logits, and the options."""

    logits: Callable[[Params, jax.Array], jax.Array]
    structure: Any
    chunk: int
    label_smoothing: float
    z_loss: float
    accuracy: bool


def cross_entropy(
    logits: Callable[[Params, jax.Array], jax.Array],
    head: Params,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    accuracy: bool = False,
) -> Output:
    """Weighted sum of cross-entropies, softmax in float32.

    Args:
      logits: (head, hidden [..., embed]) -> [..., vocab], position-wise.
      head: parameters that ``logits`` reads; leaves may belong to operators.
      hidden: [batch, length, embed].
      targets: [batch, length] int32. Where the weight is 0 any value will do (-100 too).
      weights: [batch, length].
      vocab_size: entries of the logits, to size the chunks.
      label_smoothing: e of (1 - e) one_hot + e / vocab, as in `torch.nn.functional.cross_entropy`.
      z_loss: adds z * logsumexp(logits)^2 a position (PaLM, arXiv:2204.02311, section 5).
      chunk_size: positions a chunk; by default as many as fit `CHUNK_BYTES` on each device of the current mesh.
      accuracy: also count the targets that have the highest logit; costs one more pass over the logits.
    """
    batch, length, _ = hidden.shape
    leaves, structure = jax.tree.flatten(head)
    chunk = min(chunk_size or default_chunk(batch, vocab_size), length)
    chunks = math.ceil(length / chunk)
    chunk = math.ceil(length / chunks)
    spec = _Spec(logits, structure, chunk, label_smoothing, z_loss, accuracy)
    targets = jnp.clip(targets, 0, vocab_size - 1)
    short = chunks * chunk - length
    if short:
        hidden, targets, weights = (
            jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)) for x in (hidden, targets, weights)
        )
    return Output(*_cross_entropy(spec, leaves, hidden, targets, weights.astype(jnp.float32)))


def default_chunk(batch: int, vocab_size: int) -> int:
    """Positions whose float32 logits [rows, vocab] take `CHUNK_BYTES` on each device of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    budget = CHUNK_BYTES.get(jax.default_backend(), ELSEWHERE)
    return max(1, budget * devices // (4 * batch * vocab_size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(spec: _Spec, leaves: list, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    def one(total: Any, start: jax.Array) -> tuple[Any, None]:
        h, t, w = (_window(x, start, spec.chunk) for x in (hidden, targets, weights))
        stats = _stats(spec, spec.logits(jax.tree.unflatten(spec.structure, leaves), h), t)
        return (total[0] + jnp.sum(w * stats.loss), total[1] + jnp.sum(w * stats.correct)), None

    zero = jnp.zeros((), jnp.float32)
    return _over_chunks(one, (zero, zero), hidden.shape[1], spec.chunk)[0]


class _Stats(NamedTuple):
    x: jax.Array  # float32 logits [rows, vocab]
    lse: jax.Array  # [rows], as are the others
    loss: jax.Array
    correct: jax.Array


def _stats(spec: _Spec, logits: jax.Array, targets: jax.Array) -> _Stats:
    x = logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(x, axis=-1)
    hit = jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0]
    loss = lse - (1 - spec.label_smoothing) * hit
    if spec.label_smoothing:
        loss -= spec.label_smoothing * jnp.mean(x, axis=-1)
    if spec.z_loss:
        loss += spec.z_loss * jnp.square(lse)
    correct = jnp.argmax(x, axis=-1) == targets if spec.accuracy else jnp.zeros_like(lse)
    return _Stats(x, lse, loss, correct.astype(jnp.float32))


def _slope(spec: _Spec, stats: _Stats, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """d (weighted loss) / d logits, float32 [rows, vocab], in one elementwise pass."""
    vocab = stats.x.shape[-1]
    grown = weights * (1 + 2 * spec.z_loss * stats.lse) if spec.z_loss else weights
    slope = jnp.exp(stats.x - stats.lse[..., None]) * grown[..., None]
    at_target = jnp.arange(vocab, dtype=targets.dtype) == targets[..., None]
    slope -= jnp.where(at_target, (1 - spec.label_smoothing) * weights[..., None], 0)
    return slope - spec.label_smoothing / vocab * weights[..., None] if spec.label_smoothing else slope


def _forward(spec: _Spec, leaves: list, hidden: Any, targets: Any, weights: Any) -> tuple[Any, Any]:
    """The loss with the gradients of whatever is perturbed; they are the residuals."""
    values = [x.value for x in leaves]
    wanted = [i for i, x in enumerate(leaves) if x.perturbed]
    to_hidden, to_weights = hidden.perturbed, weights.perturbed
    h_all, t_all, w_all = hidden.value, targets.value, weights.value

    def one(total: Any, start: jax.Array) -> tuple[Any, Any]:
        h, t, w = (_window(x, start, spec.chunk) for x in (h_all, t_all, w_all))

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
        stats = _stats(spec, logits, t)
        back = pull(_slope(spec, stats, t, w).astype(logits.dtype)) if pull else ([],)
        loss, correct, sums = total
        sums = [s + g.astype(jnp.float32) for s, g in zip(sums, back[0], strict=True)]
        out = (back[1] if to_hidden else None, stats.loss if to_weights else None)
        return (loss + jnp.sum(w * stats.loss), correct + jnp.sum(w * stats.correct), sums), out

    zero = jnp.zeros((), jnp.float32)
    sums = [jnp.zeros(values[i].shape, jnp.float32) for i in wanted]
    (loss, correct, sums), outs = _over_chunks(one, (zero, zero, sums), h_all.shape[1], spec.chunk)
    outs = jax.tree.map(lambda x: _joined(x, h_all.shape[:2], spec.chunk), outs)
    grads: list = [None] * len(values)
    for i, g in zip(wanted, sums, strict=True):
        grads[i] = g.astype(values[i].dtype)
    return (loss, correct), (grads, *outs)


def _backward(spec: _Spec, residuals: Any, slopes: Any) -> tuple[Any, ...]:
    scale = slopes[0]
    if type(scale) is jax.custom_derivatives.SymbolicZero:
        scale = jnp.zeros((), jnp.float32)
    leaves, hidden, weights = jax.tree.map(lambda g: (g * scale).astype(g.dtype), residuals)
    return list(leaves), hidden, None, weights


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _window(x: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    """Positions start to start + chunk as rows [batch * chunk, ...]: with one row axis no product needs a transpose."""
    part = x if x.shape[1] == chunk else jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
    return part.reshape(-1, *x.shape[2:])


def _over_chunks(one: Callable, init: Any, length: int, chunk: int) -> tuple[Any, Any]:
    """``one`` over the starts of the chunks; what it returns a chunk comes stacked."""
    if length == chunk:
        total, outs = one(init, 0)
        return total, jax.tree.map(lambda x: x[None], outs)
    return jax.lax.scan(one, init, jnp.arange(0, length, chunk))


def _joined(x: jax.Array, shape: tuple[int, int], chunk: int) -> jax.Array:
    """[chunks, batch * chunk, ...] -> [batch, length, ...]."""
    x = x.reshape(-1, shape[0], chunk, *x.shape[2:])
    return jnp.moveaxis(x, 0, 1).reshape(*shape, *x.shape[3:])
