"""Between the names and layouts of a family's checkpoints and the paths here, in both directions from one table."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tunejax.core import errors, paths
from tunejax.core.paths import Params, Path
from tunejax.interop import tensors
from tunejax.models.config import ModelConfig
from tunejax.models.family import Family, Tensor


class Source(NamedTuple):
    """Where one layer of a leaf is read from: a stored tensor, or a part of one, perhaps transposed."""

    stored: tensors.Stored
    transpose: bool
    part: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is here: after taking the part and transposing."""
        *lead, last = self.stored.shape
        shape = (*lead, last // self.part[1])
        return shape[::-1] if self.transpose else shape

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The values at ``index`` of the tensor as it is here; only these are read from disk."""
        view = self.stored.view()
        i, of = self.part
        if of > 1:
            width = view.shape[-1] // of
            view = view[..., i * width : (i + 1) * width]
        view = view.T if self.transpose else view
        return view[index]


class Plan(NamedTuple):
    """How to load. sources: path -> one Source a layer, or one alone. absent: path -> why it cannot be read."""

    sources: dict[Path, list[Source]]
    absent: dict[Path, str]
    problems: list[str]
    unused: list[str]


def plan(
    family: Family,
    config: ModelConfig,
    head: str,
    shapes: Mapping[Path, Any],
    stored: Mapping[str, tensors.Stored],
) -> Plan:
    """Finds every leaf of ``shapes`` in a checkpoint; shapes that disagree are problems, leaves not found absent."""
    table = {t.ours: t for t in family.tensors(config, head)}
    starts, sources, absent, problems, used = _starts(shapes), {}, {}, [], set()
    for path, like in shapes.items():
        if like is None:
            continue
        segment, ours = _canonical(path)
        if ours not in table:
            absent[path] = f"{path}: {family.model_type} checkpoints have no such tensor"
            continue
        entry = table[ours]
        layers = [starts[segment] + i for i in range(like.shape[0])] if segment is not None else [None]
        want = tuple(like.shape[1:] if segment is not None else like.shape)
        rows = []
        for layer in layers:
            name = entry.theirs if layer is None else entry.theirs.replace("{i}", str(layer))
            found = find(name, family.prefixes, stored)
            if found is None:
                absent.setdefault(path, f"tensor {name!r} is missing. {_near(name, stored)}".rstrip())
                continue
            used.add(found.name)
            expected = _stored_shape(want, entry)
            if found.shape != expected:
                problems.append(
                    f"tensor {found.name!r} in {found.file.name} has shape {found.shape}, expected {expected}"
                )
            rows.append(Source(found, entry.transpose, entry.part))
        if path not in absent:
            sources[path] = rows
    return Plan(sources, absent, problems, sorted(set(stored) - used))


def _starts(flat: Mapping[Path, Any]) -> dict[str, int]:
    return {s.name: s.start for s in paths.segments(paths.unflatten(flat))}


def _canonical(path: Path) -> tuple[str | None, Path]:
    """("0", "layers/attention/q/kernel") of "layers/0/attention/q/kernel"; (None, path) outside the stack."""
    if not path.startswith("layers/"):
        return None, path
    _, segment, rest = path.split("/", 2)
    return segment, f"layers/{rest}"


def _stored_shape(shape: tuple[int, ...], entry: Tensor) -> tuple[int, ...]:
    shape = shape[::-1] if entry.transpose else shape
    return (*shape[:-1], shape[-1] * entry.part[1])


def find(name: str, prefixes: tuple[str, ...], stored: Mapping[str, tensors.Stored]) -> tensors.Stored | None:
    """The tensor of that name, with or without a prefix that the family's checkpoints may carry."""
    bare = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
    return next((stored[n] for n in (name, bare, *(p + name for p in prefixes)) if n in stored), None)


def _near(name: str, stored: Mapping[str, Any]) -> str:
    close = errors.nearest(name, stored, 1)
    return f"The nearest is {close[0]!r}." if close else ""


def with_biases(config: ModelConfig, params: Params) -> ModelConfig:
    """``config`` with the biases that the parameters really have (a method may have filled slots).

    Raises:
      CheckpointError: some gate or up or down has one and another has none.
    """
    stack = next(iter(params["layers"].values()))
    attention = tuple(_has_bias(stack["attention"][s]) for s in ("q", "k", "v", "o"))
    mlp = {s: _has_bias(stack["mlp"][s]) for s in ("gate", "up", "down") if s in stack["mlp"]}
    if len(set(mlp.values())) > 1:
        raise errors.CheckpointError(
            f"mlp: biases on {', '.join(s for s, b in mlp.items() if b)} alone cannot be saved; a config.json says yes "
            "or no for the whole mlp"
        )
    return dataclasses.replace(config, attention_bias=attention, mlp_bias=all(mlp.values()))


def _has_bias(site: Mapping[str, Any]) -> bool:
    return site.get("bias") is not None


def outputs(family: Family, config: ModelConfig, head: str, params: Params, dtype: Any) -> list[tensors.Out]:
    """The checkpoint's tensors in the order of the family's table, each made when it is written.

    Raises:
      CheckpointError: every leaf that is a hole, or that the format has no place for.
    """
    flat = paths.flatten(params)
    by_ours: dict[Path, dict[int, tuple[Any, int]]] = {}
    starts = _starts(flat)
    for path, leaf in flat.items():
        segment, ours = _canonical(path)
        if leaf is None:
            continue
        rows = range(leaf.shape[0]) if segment is not None else [None]
        for row in rows:
            at = -1 if row is None else starts[segment] + row
            by_ours.setdefault(ours, {})[at] = (leaf, row)
    table = family.tensors(config, head)
    known = {t.ours for t in table}
    problems = [f"{p}: {family.model_type} checkpoints have no place for it" for p in by_ours if p not in known]
    problems += [f"{t.ours}: missing" for t in table if t.ours not in by_ours and not t.optional]
    for ours, found in by_ours.items():
        if ours.startswith("layers/") and len(found) != config.num_layers:
            problems.append(f"{ours}: in {len(found)} of {config.num_layers} layers only")
    if problems:
        raise errors.CheckpointError(
            f"these parameters cannot be saved as a {family.model_type} checkpoint:\n  " + "\n  ".join(problems)
        )
    grouped: dict[str, list[tuple[Tensor, int]]] = {}
    for layer in range(-1, config.num_layers):
        for t in table:
            if t.ours in by_ours and ("{i}" in t.theirs) == (layer >= 0):
                grouped.setdefault(t.theirs.replace("{i}", str(layer)), []).append((t, layer))
    return [_out(name, parts, by_ours, dtype) for name, parts in grouped.items()]


def _out(name: str, parts: list[tuple[Tensor, int]], leaves: Mapping[Path, Any], dtype: Any) -> tensors.Out:
    parts = sorted(parts, key=lambda p: p[0].part[0])
    kept = [leaves[t.ours][layer] for t, layer in parts]
    shapes = [leaf.shape if row is None else leaf.shape[1:] for leaf, row in kept]
    kind = np.dtype(kept[0][0].dtype if dtype is None else dtype)

    def make() -> np.ndarray:
        arrays = [np.asarray(leaf if row is None else leaf[row]) for leaf, row in kept]
        turned = [a.T if t.transpose else a for a, (t, _) in zip(arrays, parts, strict=True)]
        return (turned[0] if len(turned) == 1 else np.concatenate(turned, axis=-1)).astype(kind)

    stored = shapes[0][::-1] if parts[0][0].transpose else shapes[0]
    return tensors.Out(name, kind, (*stored[:-1], stored[-1] * len(parts)), make)
