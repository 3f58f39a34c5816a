"""A tiny functional language model and three tiny methods, so that these tests need no other part of the package."""

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import method as method_lib
from tunejax.core import model as model_lib
from tunejax.core import operators, paths, sites

VOCAB, EMBED, MLP, LAYERS = 32, 16, 32, 2


def model(dtype=jnp.float32, constrain=lambda x, axes: x) -> model_lib.Model:
    """Mean-so-far attention and an MLP a layer, scanned; enough for every leaf to have a gradient."""
    axes = {
        "embed/table": ("vocab", "embed"),
        "layers/0/mlp/norm/scale": ("layers", "embed"),
        "layers/0/mlp/up/kernel": ("layers", "embed", "mlp"),
        "layers/0/mlp/up/bias": ("layers", "mlp"),
        "layers/0/mlp/down/kernel": ("layers", "mlp", "embed"),
        "layers/0/mlp/down/bias": None,
        "head/kernel": ("embed", "vocab"),
    }

    def init(key):
        k = jax.random.split(key, 4)
        normal = jax.random.normal
        return paths.unflatten({
            "embed/table": normal(k[0], (VOCAB, EMBED)) * 0.3,
            "layers/0/mlp/norm/scale": jnp.ones((LAYERS, EMBED)),
            "layers/0/mlp/up/kernel": normal(k[1], (LAYERS, EMBED, MLP)) * 0.2,
            "layers/0/mlp/up/bias": jnp.zeros((LAYERS, MLP)),
            "layers/0/mlp/down/kernel": normal(k[2], (LAYERS, MLP, EMBED)) * 0.2,
            "layers/0/mlp/down/bias": None,
            "head/kernel": normal(k[3], (EMBED, VOCAB)) * 0.2,
        })  # fmt: skip

    def hidden(params, batch, *, cache=None, taps=(), key=None):
        x = constrain(sites.lookup(params["embed"]["table"], batch["tokens"], dtype), ("batch", "length", "embed"))
        segments = batch["segment_ids"]
        seen = jnp.tril(jnp.ones((x.shape[1],) * 2, bool)) & (segments[:, :, None] == segments[:, None, :])
        mix = (seen / seen.sum(-1, keepdims=True)).astype(dtype)

        def layer(x, p):
            y = x + mix @ x
            y = y * jax.lax.rsqrt(jnp.mean(y.astype(jnp.float32) ** 2, -1, keepdims=True) + 1e-6).astype(dtype)
            up = sites.linear(p["up"]["kernel"], y * p["norm"]["scale"].astype(dtype), p["up"]["bias"])
            return x + sites.linear(p["down"]["kernel"], jax.nn.gelu(up), p["down"]["bias"]), None

        return jax.lax.scan(layer, x, params["layers"]["0"]["mlp"])[0], {}

    def head(params):
        return {"head": params["head"]}

    def logits(params, h):
        return sites.linear(params["head"]["kernel"], h)

    return model_lib.Model(init, hidden, head, logits, None, axes, VOCAB, LAYERS)


def full(targets="**") -> method_lib.Method:
    """The matched leaves move into train and leave holes."""

    def init(key, params):
        chosen = paths.select(params, targets).leaves
        return method_lib.Start(dict.fromkeys(chosen), {p: x.astype(jnp.float32) for p, x in chosen.items()})

    def bind(params, train, state, ctx):
        return paths.replace(params, train)

    return method_lib.method("toyfull", init, bind)


@operators.operator
class LowRank:
    """x W + (x a) b."""

    base: jax.Array
    a: jax.Array
    b: jax.Array

    def __call__(self, x, bias=None):
        out = operators.apply(self.base, x, bias)
        return out + (x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype)

    def dense(self):
        return self.base + self.a @ self.b

    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)


def low_rank(rank=2, targets="kernel") -> method_lib.Method:
    """Low-rank products beside frozen kernels."""

    def new(key, kernel):
        *lead, first, last = kernel.shape
        return {"a": jax.random.normal(key, (*lead, first, rank)) * 0.1, "b": jnp.zeros((*lead, rank, last))}

    return method_lib.per_site(
        "toylowrank", targets, new, lambda k, x, ctx: LowRank(k, **x), axes={"a": ("in", None), "b": (None, "out")}
    )


def batch(seed: int, rows: int = 8, length: int = 12) -> dict[str, np.ndarray]:
    """A packed-looking batch of ragged rows: some padding, some positions out of the loss."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (rows, length), dtype=np.int32)
    lengths = rng.integers(3, length + 1, rows)
    segments = (np.arange(length) < lengths[:, None]).astype(np.int32)
    tokens *= segments
    weights = segments.astype(np.float32) * (rng.random((rows, length)) < 0.8)
    targets = np.roll(tokens, -1, axis=1) * 3 % VOCAB
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape) * segments
    return {"tokens": tokens, "targets": targets, "loss_weights": weights.astype(np.float32), "positions": positions,
            "segment_ids": segments}  # fmt: skip


class Loader:
    """An endless or finite stream of `batch`es whose state is a count."""

    def __init__(self, rows: int = 8, total: int | None = None, poison: tuple[int, ...] = (), shard=(0, 1)):
        self.rows, self.total, self.poison, self.at, self.shard = rows, total, poison, 0, shard

    def __iter__(self):
        return self

    def __next__(self):
        if self.total is not None and self.at >= self.total:
            raise StopIteration
        out = batch(self.at, self.rows)
        if self.at in self.poison:
            out["loss_weights"] = out["loss_weights"] * np.float32(np.nan)
        self.at += 1
        index, shards = self.shard
        return {k: x[index * len(x) // shards : (index + 1) * len(x) // shards] for k, x in out.items()}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]
