import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import Doubled

from tunejax.core import digest, paths


def test_segmentation_does_not_count():
    assert digest.digest(tiny.params()) == digest.digest(tiny.params(cuts=(1,)))
    one, two = digest.leaf_digests(tiny.params()), digest.leaf_digests(tiny.params(cuts=(1, 2)))
    assert one == two
    assert "layers/2/mlp/up/kernel" in one


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int32"])
def test_one_bit_counts(dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 100, (2, 5, 3)).astype(jnp.dtype(dtype))
    flipped = x.copy()
    flipped.view(np.uint8).reshape(-1)[17] ^= 1
    a, b = ({"layers": {"0": {"w": jnp.asarray(v)}}} for v in (x, flipped))
    assert digest.digest(a) != digest.digest(b)
    assert digest.digest(a) == digest.digest({"layers": {"0": {"w": jnp.asarray(x.copy()), "b": None}}})


def test_place_path_type_and_layer_count():
    x = jnp.arange(6.0).reshape(2, 3)
    variants = [
        {"a": {"w": x}},
        {"b": {"w": x}},
        {"a": {"w": x[::-1]}},
        {"a": {"w": x.T}},
        {"a": {"w": x.reshape(3, 2)}},
        {"a": {"w": x.astype(jnp.int32)}},
        {"a": {"w": jnp.where(x == 0, -0.0, x)}},
        {"layers": {"0": {"w": x}}},
        {"layers": {"0": {"w": x[::-1]}}},
    ]
    assert len({digest.digest(v) for v in variants}) == len(variants)


def test_sharding_does_not_count():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(None, "fsdp", "tensor")
    p = {
        "embed": {"table": jnp.arange(64.0).reshape(8, 8)},
        "layers": {"0": {"w": jnp.sin(jnp.arange(96.0)).reshape(3, 8, 4)}},
    }
    spread = {
        "embed": {"table": jax.device_put(p["embed"]["table"], NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))},
        "layers": {"0": {"w": jax.device_put(p["layers"]["0"]["w"], NamedSharding(mesh, spec))}},
    }
    assert digest.leaf_digests(p) == digest.leaf_digests(spread)


def test_operators_and_empty_trees():
    assert digest.digest({}) == digest.digest({"a": None})
    k = jnp.ones((2, 2))
    assert digest.digest({"a": Doubled(k)}) != digest.digest({"a": k})


def test_against_numpy():
    """The fingerprint of one array, written once more with Python's integers."""

    def mix(h):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    x = np.linspace(-1, 1, 10, dtype=np.float32).reshape(5, 2)
    bits = [int(b) for b in x.reshape(-1).view(np.uint32)]
    lanes = [sum(mix(b ^ mix((i * m + c) % 2**32)) for i, b in enumerate(bits)) % 2**32 for m, c in digest.LANES]
    found = digest.leaf_digests(paths.unflatten({"a/w": jnp.asarray(x)}))
    assert found == {"a/w": "float32 5x2 " + "".join(f"{v:08x}" for v in lanes)}
