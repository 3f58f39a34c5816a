"""What an adapter folder of another library holds, in the terms of methods here: what its readers share."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tunejax.core import errors, operators, paths
from tunejax.core.method import SHARED, Method, keys
from tunejax.interop import modules
from tunejax.interop.modules import Site
from tunejax.models.config import ModelConfig

CONFIG = "adapter_config.json"
"""What every adapter folder has, whichever library wrote it."""

Spec = tuple[dict[str, Any], dict[Site, dict[str, np.ndarray]]]
"""(a method, as in a config; what it trains by site)"""


class Found(NamedTuple):
    """An adapter. specs: its methods, as in a config; base: name of its base model; arrays: for `trained`.

    arrays: one mapping a spec: (path without segment, layer) -> arrays by name, or a whole value under "".
    shared: arrays that all sites share, as large as any of them needs. num_labels: of its own head, where it says so.
    """

    specs: list[dict[str, Any]]
    base: str
    arrays: list[dict[Site, dict[str, np.ndarray]]]
    shared: dict[str, np.ndarray] = {}  # noqa: RUF012
    num_labels: int | None = None


def labels_of(whole: Mapping[Site, np.ndarray], head: str) -> int | None:
    """How many classes a head among values that trained whole tells apart; None where there is none."""
    heads = (x for s, x in whole.items() if s.path in ("classifier/kernel", "classifier/bias", "head/kernel"))
    found = next(heads, None) if head == "classification" else None
    return None if found is None else found.shape[-1]


def settings(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises CheckpointError where it cannot be read."""
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise errors.CheckpointError(f"{folder / CONFIG} cannot be read: {e}") from None


def tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, by name. Raises CheckpointError where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors

    try:
        return dict(safetensors.load_file(file))
    except (OSError, SafetensorError) as e:
        raise errors.CheckpointError(f"{file} cannot be read: {e}") from None


def whole_specs(name: str, values: Mapping[Site, np.ndarray], config: ModelConfig) -> list[Spec]:
    """What trains those parameters themselves, by a method that does."""
    return by_layers({"name": name}, {s: {"": x} for s, x in values.items()}, config.num_layers)


def by_layers(given: Mapping[str, Any], sites: Mapping[Site, dict[str, np.ndarray]], depth: int) -> list[Spec]:
    """A spec of those arguments, and its sites, for each run of layers that the sites cover."""
    layers: dict[str, list[int]] = {}
    for site in sites:
        layers.setdefault(site.path, []).append(site.layer)
    runs: dict[tuple[int, int] | None, dict[Site, dict[str, np.ndarray]]] = {}
    for site, arrays in sites.items():
        run = _run(sorted(layers[site.path]), site.layer)
        every = site.layer < 0 or run == (0, depth)
        runs.setdefault(None if every else run, {})[site] = arrays
    return [
        ({**given, "targets": _globs(some), **({"layers": f"{run[0]}:{run[1]}"} if run else {})}, some)
        for run, some in runs.items()
    ]


def _run(layers: list[int], layer: int) -> tuple[int, int]:
    """[start, stop) of the unbroken run of layers that ``layer`` lies in."""
    start = stop = layer
    while start - 1 in layers:
        start -= 1
    while stop + 1 in layers:
        stop += 1
    return start, stop + 1


def _globs(sites: Mapping[Site, Any]) -> list[str]:
    return sorted({f"/{s.path.replace('layers/', 'layers/*/', 1)}" for s in sites})


def trained(found: Found, method: Method, train: Any, cuts: tuple[int, ...]) -> Any:
    """What an adapter trained, in the structure of ``train`` (shapes will do) of the method that its specs build.

    cuts: of the stack that ``method`` was begun on.
    """
    starts = paths.starts(cuts)

    def one(arrays: dict[Site, dict[str, np.ndarray]], part: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for path, like in part.items():
            if path == SHARED:
                out[path] = _cut(found.shared, like)
                continue
            if isinstance(like, Mapping) and any(isinstance(x, Mapping) for x in like.values()):
                out[path] = one(arrays, like)  # what a method within a method trains
                continue
            ours, first = modules.canonical(path, starts)
            fields = {"": like} if operators.is_array(like) else like
            made = {k: _stacked(arrays, ours, first, k, x) for k, x in fields.items()}
            out[path] = made[""] if operators.is_array(like) else made
        return out

    if not method.parts:
        return one(found.arrays[0], train)
    names = keys(method.parts)
    return {k: one(arrays, train[k]) for k, arrays in zip(names, found.arrays, strict=True)}


def state_of(found: Found, method: Method, state: Any) -> Any:
    """``state``, as the method's start has it, with what all sites share as the adapter has it."""

    def one(part: Any) -> Any:
        shared = isinstance(part, Mapping) and part.get(SHARED)
        return {**part, SHARED: _cut(found.shared, shared)} if shared else part

    return {k: one(part) for k, part in state.items()} if method.parts else one(state)


def _cut(shared: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What all of a folder's sites share, as large as these sites need."""
    cut = {k: shared[k][tuple(slice(n) for n in x.shape)] for k, x in like.items()}
    for k, x in like.items():
        if cut[k].shape != tuple(x.shape):
            raise errors.CheckpointError(f"the adapter's shared {k} has shape {shared[k].shape}, needed is {x.shape}")
    return {k: jax.numpy.asarray(cut[k], x.dtype) for k, x in like.items()}


def _stacked(arrays: Mapping[Site, Mapping[str, np.ndarray]], path: str, first: int, name: str, like: Any) -> jax.Array:
    outside = first < 0
    layers = [modules.OUTSIDE] if outside else range(first, first + like.shape[0])
    sites, expected = [arrays[Site(path, i)] for i in layers], tuple(like.shape[0 if outside else 1 :])
    for site in sites:
        if name not in site:
            raise errors.CheckpointError(
                f"the adapter's {path} has {', '.join(site)}; its settings make it need {name}"
            )
        if site[name].shape != expected:
            what = f"{name} at {path}" if name else path
            raise errors.CheckpointError(f"the adapter's {what} has shape {site[name].shape}, expected {expected}")
    value = sites[0][name] if outside else np.stack([site[name] for site in sites])
    return jax.numpy.asarray(value, like.dtype)
