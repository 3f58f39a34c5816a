"""What the tests of adapters share: what the branches of a tiny model give, and noise to put into an adapter."""

import jax
import numpy as np
import tiny

DOWN, OUT = "layers/0/mlp/down/kernel", "layers/0/attention/o/kernel"


def noisy(tree, size=0.3):
    """Each array of ``tree`` plus normal noise of its own."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return structure.unflatten([x + size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


_COMPILED = {}
TAPS = ("attention", "mlp", "hidden")


def of(m, p):
    """Outputs of attention, of the MLP and of the whole of each layer: [layers, rows, length, embed] by name."""
    run = _COMPILED.setdefault(m.hidden, jax.jit(lambda p: m.hidden(p, tiny.batch(), taps=TAPS)[1]))
    return jax.tree.map(np.asarray, run(p))


def normed(x, scale, bias=None, eps=1e-6):
    """A root-mean-square norm, or with a bias a layer norm, in numpy."""
    x = x - x.mean(-1, keepdims=True) if bias is not None else x
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
    return y if bias is None else y + bias


def entrance(p, config):
    """What enters the stack, by hand: [rows, length, embed]."""
    e = jax.tree.map(np.asarray, {k: x for k, x in p.items() if k in ("embed", "types", "positions", "embed_norm")})
    tokens = tiny.batch()["tokens"]
    if config.kind == "decoder":
        return e["embed"]["table"][tokens]
    x = e["embed"]["table"][tokens] + e["types"]["table"][0] + e["positions"]["table"][: tokens.shape[1]]
    return normed(x, e["embed_norm"]["scale"], e["embed_norm"]["bias"], config.norm_eps)


def block_norm(p, config, part, x):
    """The norm of a part ("attention", "mlp") of the first block."""
    norm = {k: np.asarray(v)[0] for k, v in p["layers"]["0"][part]["norm"].items()}
    return normed(x, norm["scale"], norm.get("bias"), config.norm_eps)
