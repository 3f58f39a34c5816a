"""The digest of a parameter pytree: equal for equal bits, whatever the segmentation and the sharding.

Each layer of each leaf gets an integer fingerprint where it lies: every entry's bits are mixed with its place by a
bijection, and the results are added modulo 2^32, twice with different constants. Addition is exact and commutative,
so the sum does not depend on how the array is split over devices; one changed bit always changes it. The
fingerprints are then hashed with SHA-256, with path, shape and type. It finds accidents; it is no defence
against a forger.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tunejax.core import paths

LANES = ((0x9E3779B9, 0x85EBCA6B), (0xC2B2AE35, 0x27D4EB2F))
"""Per lane: the multiplier of an entry's place, and the lane's own constant. All odd."""


def digest(params: Mapping[str, Any]) -> str:
    """64 hexadecimal digits for all arrays of ``params``; empty slots (None) count for nothing."""
    return of_leaves(leaf_digests(params))


def of_leaves(prints: Mapping[str, str]) -> str:
    """The `digest` of the parameters whose `leaf_digests` these are."""
    lines = [f"{path} {print_}" for path, print_ in sorted(prints.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def leaf_digests(params: Mapping[str, Any], starts: Mapping[str, int] | None = None) -> dict[str, str]:
    """Absolute path -> "type shape fingerprint"; a stacked leaf has one entry a layer, "layers/7/mlp/up/kernel".

    starts: first layer of each segment; by default counted, which needs an array in each of them.
    """
    arrays = _arrays(params)
    if not arrays:
        return {}
    prints = jax.device_get(_fingerprint_all(arrays))
    starts = {s.name: s.start for s in paths.segments(params)} if starts is None else starts
    out: dict[str, str] = {}
    for path, array in arrays.items():
        kind, found = np.dtype(array.dtype).name, prints[path]
        if not path.startswith("layers/"):
            out[path] = _line(kind, array.shape, found[0])
            continue
        _, segment, rest = path.split("/", 2)
        for i, lanes in enumerate(found):
            out[f"layers/{starts[segment] + i}/{rest}"] = _line(kind, array.shape[1:], lanes)
    return out


def _line(kind: str, shape: tuple[int, ...], lanes: Any) -> str:
    return f"{kind} {'x'.join(map(str, shape))} {''.join(f'{int(x):08x}' for x in lanes)}"


def _arrays(params: Mapping[str, Any]) -> dict[str, Any]:
    """Every array by path; those of an operator by its path and field."""
    out = {}
    for path, leaf in paths.flatten(params).items():
        for where, array in jax.tree_util.tree_leaves_with_path(leaf):
            out[path + jax.tree_util.keystr(where)] = array
    return out


def _fingerprint_all(arrays: dict[str, Any]) -> dict[str, jax.Array]:
    """path -> uint32 [layers or 1, lanes], replicated so that every process can read it."""
    shardings = (getattr(x, "sharding", None) for x in arrays.values())
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
    out = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(_fingerprints, out_shardings=out)(arrays)


def _fingerprints(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _fingerprint(x, stacked=path.startswith("layers/")) for path, x in arrays.items()}


@functools.partial(jax.jit, static_argnames="stacked")  # leaves of one shape are traced once
def _fingerprint(x: jax.Array, stacked: bool) -> jax.Array:
    bits = _bits(x)
    bits = bits if stacked else bits[None]
    place = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in range(bits.ndim - 1, 0, -1):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    over = tuple(range(1, bits.ndim))
    lanes = [_mix(bits ^ _mix(place * np.uint32(a) + np.uint32(b))) for a, b in LANES]
    return jnp.stack([jnp.sum(lane, axis=over, dtype=jnp.uint32) for lane in lanes], axis=-1)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of each entry as uint32; an 8-byte entry becomes two."""
    if x.dtype == jnp.bool_ or x.dtype.itemsize < 1:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finaliser: a bijection in which each input bit moves about half of the output bits."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
