"""Where arrays live: a mesh of devices, and one table from logical axes to mesh axes.

The mesh is in Auto mode: the program is written for whole arrays, shardings stand on its inputs and outputs and on
a few activations, and XLA puts the collectives in. (Explicit mode would have every model and method spell out the
sharding of each product.)
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tunejax.core import errors, paths
from tunejax.core.method import Axes
from tunejax.core.paths import Params, Path

MeshAxis = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxis]

BATCH = ("data", "fsdp")
RULES: Rules = {
    "batch": BATCH,
    "vocab": "tensor",
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
}
"""Logical axis -> mesh axis. An axis that is not named here is whole on every device."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor. One of the sizes may be -1: whatever devices are left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or fixed < 1 or (free and len(devices) % fixed):
        raise errors.ConfigError(f"mesh {sizes} does not divide {len(devices)} devices; one size at most may be -1")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise errors.ConfigError(f"mesh {sizes} needs {math.prod(sizes.values())} devices; there are {len(devices)}")
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def param_sharding(mesh: Mesh, rules: Rules, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array with these logical axes.

    A dimension that its mesh axes do not divide stays whole, as does one whose mesh axis an earlier one took.
    """
    spec: list[MeshAxis] = []
    taken: set[str] = set()
    for name, size in zip(axes, shape, strict=True):
        to = rules.get(name) if name is not None else None
        wanted = tuple(a for a in ((to,) if isinstance(to, str) else to or ()) if a not in taken and mesh.shape[a] > 1)
        if wanted and size % math.prod(mesh.shape[a] for a in wanted) == 0:
            taken.update(wanted)
            spec.append(wanted if len(wanted) > 1 else wanted[0])
        else:
            spec.append(None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def params_shardings(mesh: Mesh, rules: Rules, axes: Mapping[Path, Axes], params: Params) -> Params:
    """A sharding for each array of ``params``; the arrays of an operator follow the kernel that it stands for."""

    def leaf(path: Path, value: Any) -> Any:
        names = axes.get(path)

        def array(x: Any) -> NamedSharding:
            fits = names is not None and len(names) == len(x.shape)
            return param_sharding(mesh, rules, names if fits else (None,) * len(x.shape), x.shape)  # type: ignore[arg-type]

        return jax.tree.map(array, value)

    flat = paths.flatten(params)
    return paths.unflatten({p: None if x is None else leaf(p, x) for p, x in flat.items()})


def train_shardings(mesh: Mesh, rules: Rules, axes: Any, train: Any) -> Any:
    """Shardings of ``train`` from the logical axes that ``method.axes`` gives (a tree of tuples)."""
    return jax.tree.map(lambda x, names: param_sharding(mesh, rules, names, x.shape), train, axes)


def like_train(mesh: Mesh, tree: Any, train: Any, shardings: Any) -> Any:
    """Shardings for a tree that holds copies of ``train`` (an optimiser's moments).

    A leaf whose key path ends in the path of a train leaf of the same shape takes its sharding; others are whole.
    """
    found = {}
    places = jax.tree.leaves(shardings, is_leaf=lambda s: isinstance(s, NamedSharding))
    for (path, x), place in zip(jax.tree.leaves_with_path(train), places, strict=True):
        found[path, x.shape] = place
    depths = sorted({len(path) for path, _ in found}, reverse=True)

    def leaf(path: tuple, x: Any) -> NamedSharding:
        ends = (found.get((path[len(path) - d :], x.shape)) for d in depths if d <= len(path))
        return next((place for place in ends if place is not None), replicated(mesh))

    return jax.tree.map_with_path(leaf, tree)


def constrainer(mesh: Mesh, rules: Rules = RULES) -> Callable[[jax.Array, Axes], jax.Array]:
    """For `models.build`: pins an activation with these logical axes ("batch" first) to its place on the mesh."""
    if mesh.size == 1:
        return lambda x, axes: x
    return lambda x, axes: jax.lax.with_sharding_constraint(x, param_sharding(mesh, rules, axes, x.shape))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[a] for a in BATCH)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch from this process's rows [rows, ...], laid over the mesh without a copy through one host.

    Raises:
      ConfigError: the rows of all processes do not divide over data x fsdp.
    """
    rows = next(iter(batch.values())).shape[0] * jax.process_count()
    if rows % batch_shards(mesh):
        raise errors.ConfigError(
            f"a batch of {rows} rows does not divide over data x fsdp = {batch_shards(mesh)} devices; "
            "choose a batch size that is a multiple of it"
        )
    place = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(place, np.asarray(v)) for k, v in batch.items()}


def abstract(tree: Any, places: Any) -> Any:
    """The shapes of ``tree`` (arrays or shapes) with these shardings, a tree like it, to lower a program for."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def abstract_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes that `put_batch` would make of this process's rows."""
    count = jax.process_count()
    whole = {k: jax.ShapeDtypeStruct((v.shape[0] * count, *v.shape[1:]), v.dtype) for k, v in batch.items()}
    return abstract(whole, dict.fromkeys(whole, batch_sharding(mesh)))


def shard_params(mesh: Mesh, rules: Rules, axes: Mapping[Path, Axes], params: Params) -> Params:
    """``params`` laid over the mesh. Arrays that already lie right are kept, not copied."""
    return jax.tree.map(jax.device_put, params, params_shardings(mesh, rules, axes, params))
