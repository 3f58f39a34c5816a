"""A few training steps on a tiny model, with virtual tokens or a prefix, on one device and on eight."""

import numpy as np
import trains


def batch(prompt, rows=8, length=6):
    """Next-token rows, each after ``prompt`` virtual tokens without loss."""
    first = np.broadcast_to(np.arange(31, 31 + prompt), (rows, prompt))
    tokens = np.concatenate([first, np.random.default_rng(0).integers(0, 31, (rows, length + 1))], 1).astype(np.int32)
    weights = np.broadcast_to(np.arange(prompt + length) >= prompt, (rows, prompt + length)).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": np.where(weights > 0, tokens[:, 1:], 0),
        "loss_weights": weights,
        "positions": np.broadcast_to(np.arange(prompt + length, dtype=np.int32), weights.shape),
        "segment_ids": np.ones(weights.shape, np.int32),
    }


def losses(method, shape):
    """The loss before each of four steps; asserts that the base comes out bit-identical."""
    return trains.run(method, steps=4, learning_rate=3e-2, shape=shape, batch=batch(method.prompt))[0]


def check(method):
    """The loss falls at each of three steps, in the same way on one device and on eight."""
    one = losses(method, (1, 1, 1))
    assert one == sorted(one, reverse=True)
    assert one[-1] < one[0] - 1e-3
    np.testing.assert_allclose(losses(method, (2, 2, 2)), one, atol=1e-5)
