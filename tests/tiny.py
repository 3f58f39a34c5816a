"""What many tests share: a decoder and an encoder that compile in a moment, and small operators and methods."""

import functools
import itertools

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

QWEN3 = ModelConfig(family="qwen3", **SIZES, qk_norm=True, tie_embeddings=True)
GPT2 = ModelConfig(
    family="gpt2",
    **{**SIZES, "num_kv_heads": 4},
    activation="gelu_tanh",
    gated_mlp=False,
    norm="layer",
    position="learned",
    attention_bias=(True,) * 4,
    mlp_bias=True,
    tie_embeddings=True,
)


@functools.cache
def model(config=LLAMA, head="lm", cuts=()):
    """The model, built once."""
    return build.build(config, head=head, cuts=cuts)


@functools.cache
def params(config=LLAMA, head="lm", cuts=()):
    """Parameters of it, small normal numbers; the same however the stack is cut. Nothing is compiled."""
    rng = np.random.default_rng(1)
    shapes = paths.flatten(jax.eval_shape(model(config, head).init, jax.random.key(0)))
    whole = {p: None if x is None else 0.2 * rng.standard_normal(x.shape, np.float32) for p, x in shapes.items()}
    out = {p: x for p, x in whole.items() if not p.startswith("layers/")}
    for i, (start, stop) in enumerate(itertools.pairwise([0, *cuts, config.num_layers])):
        for path, x in whole.items():
            if path.startswith("layers/0/"):
                out[path.replace("/0/", f"/{i}/", 1)] = None if x is None else x[start:stop]
    return jax.tree.map(jnp.asarray, paths.unflatten(out))


def batch(rows=2, length=7):
    """Tokens of a ragged batch, padded on the right."""
    rng = np.random.default_rng(0)
    mask = (np.arange(length) < np.array([[length], [length - 3]])[:rows]).astype(np.int32)
    return {"tokens": rng.integers(0, 31, (rows, length)).astype(np.int32) * mask, "segment_ids": mask}


def lm_batch(rows=2, length=7):
    """Full rows of random tokens, each the target of the one before it, as a causal model trains on."""
    tokens = np.random.default_rng(0).integers(0, 31, (rows, length + 1)).astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": ones.astype(np.float32),
        "segment_ids": ones,
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
    }


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
