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
