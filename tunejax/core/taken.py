"""Bottleneck adapters that finished runs trained, taken into a method that keeps them frozen.

Their paths say layers, not segments: of "layers/4/mlp/down/kernel" the arrays [n, ...] are those of layers 4 to
4 + n - 1, however the stack of the model that they meet is cut. Of a stack in one piece that is the model's own path.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tunejax.core import bottleneck, errors, paths
from tunejax.core.paths import Params, Path

Adapter = Mapping[Path, Mapping[str, Any]]
"""What one bottleneck adapter trained: {path of a kernel: {down, down_bias, up, up_bias}} (`core.bottleneck`)."""


def check(name: str, adapters: Sequence[Any], least: int, why: str) -> None:
    """Raises ConfigError: fewer than ``least`` (the message says ``why``), or one that is no bottleneck adapter.

    name: of the method that takes them.
    """
    if len(adapters) < least:
        raise errors.ConfigError(f"{name}: there must be {why}; found {len(adapters)}")
    for i, adapter in enumerate(adapters):
        arrays = list(adapter.values()) if isinstance(adapter, Mapping) else []
        if not arrays or not all(isinstance(a, Mapping) and set(a) == set(bottleneck.AXES) for a in arrays):
            raise errors.ConfigError(
                f"{name}: adapter {i} is not what a bottleneck adapter trains, {{path: {{down, down_bias, up, "
                "up_bias}}; train each with houlsby or pfeiffer, and nothing else but what lies below it"
            )


def joined(adapter: Adapter) -> dict[Path, dict[str, Any]]:
    """The same adapter with layers that follow each other in one piece, however the stack of its run was cut."""
    out: dict[Path, dict[str, Any]] = {}
    ends: dict[tuple[str, int], Path] = {}  # (kernel, the layer after a piece's last) -> where that piece is kept
    for path in sorted(adapter, key=_first):
        arrays, place = dict(adapter[path]), path
        if span := _span(path, arrays):
            rest, (first, stop) = path.split("/", 2)[2], span
            place = ends.pop((rest, first), path)
            ends[rest, stop] = place
        out[place] = {k: np.concatenate([out[place][k], x]) for k, x in arrays.items()} if place in out else arrays
    return out


def at_segments(name: str, adapter: Adapter, params: Params) -> dict[Path, dict[str, Any]]:
    """The arrays at the paths of a model, whose stack may be cut more finely than that of the adapter's run.

    Args:
      name: of the method that takes it.
      adapter: each array with the layer axis first; other axes may stand between that and its own.
      params: of the model; leaves may be shapes or operators.

    Raises:
      TargetError: the model has no kernel at some site, one of another width, not that many layers, or its stack is
        not cut where the adapter's layers begin and end.
    """
    out, flat = {}, paths.flatten(params)
    for path, arrays in adapter.items():
        for place, own in _pieces(name, path, arrays, params).items():
            found, dim = flat.get(place), own["up_bias"].shape[-1]
            lead = own["up_bias"].shape[: place.startswith("layers/")]
            if found is None or found.shape[-1] != dim or tuple(found.shape[:-2]) != tuple(lead):
                there = "nothing" if found is None else f"a kernel of shape {tuple(found.shape)}"
                raise errors.TargetError(
                    f"{name}: the adapters at {place} are of shape {(*lead, dim)}; the model has {there} there"
                )
            out[place] = own
    return out


def cuts(adapters: Sequence[Adapter]) -> Callable[[int], tuple[int, ...]]:
    """The `Method.cuts` that lets each of these stand at whole segments."""
    ends = {end for a in adapters for path, arrays in a.items() for end in _span(path, arrays)}
    return lambda depth: tuple(sorted(e for e in ends if 0 < e < depth))


def targets(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Patterns of the kernels where they stand, for reports."""
    ends = (p.split("/", 2)[2] if p.startswith("layers/") else None for a in adapters for p in a)
    everywhere = (p for a in adapters for p in a if not p.startswith("layers/"))
    return tuple(dict.fromkeys([*(f"/layers/*/{e}" for e in ends if e), *(f"/{p}" for p in everywhere)]))


def _first(path: Path) -> int:
    return int(path.split("/")[1]) if path.startswith("layers/") else 0


def _span(path: Path, arrays: Mapping[str, Any]) -> tuple[int, ...]:
    """The first layer and the one after the last; empty outside the stack."""
    if not path.startswith("layers/"):
        return ()
    return _first(path), _first(path) + arrays["up_bias"].shape[0]


def _pieces(name: str, path: Path, arrays: Mapping[str, Any], params: Params) -> dict[Path, dict[str, Any]]:
    """One site's arrays by the paths of the segments over which its layers lie."""
    span = _span(path, arrays)
    if not span:
        return {path: dict(arrays)}
    (first, stop), rest, segments = span, path.split("/", 2)[2], paths.segments(params)
    within = [s for s in segments if s.start < stop and s.start + s.size > first]
    depth = sum(s.size for s in segments)
    if stop > depth:
        raise errors.TargetError(f"{name}: an adapter is of layers {first} to {stop - 1}; the model has {depth}")
    if within[0].start < first or within[-1].start + within[-1].size > stop:
        raise errors.TargetError(
            f"{name}: an adapter is of layers {first} to {stop - 1}, within a segment of the stack; build the model "
            f"with cuts=({first}, {stop})"
        )
    if len(within) == 1:
        return {f"layers/{within[0].name}/{rest}": dict(arrays)}
    spans = {s.name: slice(s.start - first, s.start - first + s.size) for s in within}
    return {f"layers/{s}/{rest}": {k: x[where] for k, x in arrays.items()} for s, where in spans.items()}
