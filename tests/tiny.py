"""What many tests share: a decoder and an encoder that compile in a moment, and small operators and methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, operators, paths
from tunejax.core import method as methods
from tunejax.core.method import Start
from tunejax.models import build
from tunejax.models.config import ModelConfig

SIZES = {
    "vocab_size": 31,
    "embed_dim": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "mlp_dim": 24,
    "max_positions": 32,
}
LLAMA = ModelConfig(family="llama", **SIZES)
BERT = ModelConfig(
    family="bert",
    **{**SIZES, "num_kv_heads": 4},
    kind="encoder",
    activation="gelu",
    gated_mlp=False,
    norm="layer",
    position="learned",
    attention_bias=(True,) * 4,
    mlp_bias=True,
    tie_embeddings=True,
    type_vocab_size=2,
    num_labels=3,
)


@functools.cache
def model(config=LLAMA, head="lm", cuts=()):
    """The model, built once."""
    return build.build(config, head=head, cuts=cuts)


@functools.cache
def _whole(config, head):
    return jax.device_get(jax.jit(model(config, head).init)(jax.random.key(1)))


@functools.cache
def params(config=LLAMA, head="lm", cuts=()):
    """Its parameters; the same values however the stack is cut."""
    whole = _whole(config, head)
    edges = [0, *cuts, config.num_layers]
    spans = list(zip(edges, edges[1:], strict=False))
    layers = {str(i): jax.tree.map(lambda x: x[a:b], whole["layers"]["0"]) for i, (a, b) in enumerate(spans)}
    return jax.tree.map(jnp.asarray, {**whole, "layers": layers})


def batch(rows=2, length=7):
    """Tokens of a ragged batch, padded on the right."""
    rng = np.random.default_rng(0)
    mask = (np.arange(length) < np.array([[length], [length - 3]])[:rows]).astype(np.int32)
    return {"tokens": rng.integers(0, 31, (rows, length)).astype(np.int32) * mask, "segment_ids": mask}


_COMPILED = {}


def outputs(m, p):
    """Logits [rows, length, vocab or labels] of the fixed batch."""
    run = _COMPILED.setdefault(m.hidden, jax.jit(lambda p: m.logits(m.head(p), m.hidden(p, batch())[0])))
    return run(p)


@operators.operator
class Doubled:
    """Twice a kernel."""

    base: jax.Array
    factor: float = operators.static(default=2.0)

    def __call__(self, x, bias=None):
        return operators.apply(self.base, self.factor * x, bias)

    def dense(self):
        return self.factor * operators.dense(self.base)

    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)


@operators.operator
class Squared:
    """Not linear."""

    base: jax.Array

    def __call__(self, x, bias=None):
        return operators.apply(self.base, x, bias) ** 2

    def dense(self):
        raise errors.NotLinear("a square is no kernel")

    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)


@operators.operator
class Shifted:
    base: jax.Array
    s: jax.Array

    def __call__(self, x, bias=None):
        return operators.apply(self.base, x, bias) + self.s[0] * jnp.sum(x, -1, keepdims=True)

    def dense(self):
        return operators.dense(self.base) + self.s

    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)


def wrapper(name, cls, targets="attention/q/kernel"):
    return methods.per_site(name, targets, lambda key, k: {}, lambda k, arrays, ctx: cls(k))


def shift(name, targets="attention/{q,v}/kernel"):
    """Adds a trained vector to what a kernel gives: identity at the start."""

    def new(key, k):
        return {"s": jnp.zeros((*k.shape[:-2], 1, k.shape[-1]))}

    return methods.per_site(name, targets, new, lambda k, a, ctx: Shifted(k, a["s"]), axes={"s": (None, "out")})


def hole(name, targets):
    def init(key, params):
        chosen = paths.select(params, targets).leaves
        return Start(dict.fromkeys(chosen), dict(chosen))

    return methods.method(name, init, lambda p, train, state, ctx: paths.replace(p, train))
