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

BUFFERS = ("position_ids", "rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Endings of what older checkpoints store though it is computed: not worth a word that nothing read it."""


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
    kept: tuple[int, ...] | None = None,
) -> Plan:
    """Finds every leaf of ``shapes`` in a checkpoint; shapes that disagree are problems, leaves not found absent.

    kept: the checkpoint's layers that make the stack, where it is not all of them.
    """
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
        layers: list[int | None] = [None]
        if segment is not None:
            at = range(starts[segment], starts[segment] + like.shape[0])
            layers = [i if kept is None else kept[i] for i in at]
        want = tuple(like.shape[1:] if segment is not None else like.shape)
        rows = []
        for layer in layers:
            name = entry.theirs if layer is None else entry.theirs.replace("{i}", str(layer))
            found = find(name, family, stored)
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
    left = [n for n in sorted(set(stored) - used) if not n.endswith(BUFFERS)]
    return Plan(sources, absent, problems, left)


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


def find(name: str, family: Family, stored: Mapping[str, tensors.Stored]) -> tensors.Stored | None:
    """The tensor of that name, with or without a prefix that the family's checkpoints carry, or by an older name."""
    bare = next((name.removeprefix(p) for p in family.prefixes if name.startswith(p)), name)
    tried = [name, bare, *(p + name for p in family.prefixes)]
    tried += [n.removesuffix(new) + old for n in tried for old, new in family.aliases if n.endswith(new)]
    return next((stored[n] for n in tried if n in stored), None)


def _near(name: str, stored: Mapping[str, Any]) -> str:
    close = errors.nearest(name, stored, 1)
    return f"The nearest is {close[0]!r}." if close else ""


def with_biases(config: ModelConfig, params: Params) -> ModelConfig:
    """``config`` with the biases that a method filled; a config.json says yes or no for a whole attention or mlp."""

    def filled(part: str, site: str) -> bool:
        stacks = params["layers"].values()
        return any(s[part].get(site, {}).get("bias") is not None for s in stacks)

    new = any(filled("attention", s) and not had for s, had in zip("qkvo", config.attention_bias, strict=True))
    attention = (True,) * 4 if new else config.attention_bias
    mlp = config.mlp_bias or any(filled("mlp", s) for s in ("gate", "up", "down"))
    return dataclasses.replace(config, attention_bias=attention, mlp_bias=mlp)


def outputs(
    family: Family, config: ModelConfig, before: ModelConfig, head: str, params: Params, dtype: Any
) -> list[tensors.Out]:
    """The checkpoint's tensors, each made when it is written.

    Args:
      config: as a reader of the written config.json will see it.
      before: as the model was built. A bias that only ``config`` expects and that the parameters lack (a method filled
        those of other sites) is written as zeros, which is the same function.

    Raises:
      CheckpointError: every leaf that is missing, or that the format has no place for.
    """
    layered = _by_layer(params)
    table = family.tensors(config, head)
    known = {t.ours for t in table}
    had = {t.ours for t in family.tensors(before, head) if not t.optional}
    problems = [f"{p}: {family.model_type} checkpoints have no place for it" for p in layered if p not in known]
    for t in table:
        found = layered.setdefault(t.ours, {})
        lacking = [i for i in _layers(t, config) if i not in found]
        beside = layered.get(t.ours.removesuffix("bias") + "kernel", {})
        if t.optional and not found:
            continue
        if lacking and t.ours.endswith("/bias") and t.ours not in had and all(i in beside for i in lacking):
            found.update({i: Row(beside[i].leaf, beside[i].row, zeros=True) for i in lacking})
        elif lacking:
            problems.append(f"{t.ours}: missing" + (f" in {len(lacking)} layers" if lacking != [OUTSIDE] else ""))
    if problems:
        raise errors.CheckpointError(
            f"these parameters cannot be saved as a {family.model_type} checkpoint:\n  " + "\n  ".join(problems)
        )
    grouped: dict[str, list[tuple[Tensor, Row]]] = {}
    for t in table:
        for layer, row in sorted(layered[t.ours].items()):
            grouped.setdefault(t.theirs.replace("{i}", str(layer)), []).append((t, row))
    return [_out(name, parts, dtype) for name, parts in grouped.items()]


OUTSIDE = -1


class Row(NamedTuple):
    """One layer of a leaf (row), or all of a leaf outside the stack (None). zeros: a bias for that kernel instead."""

    leaf: Any
    row: int | None
    zeros: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        shape = tuple(self.leaf.shape if self.row is None else self.leaf.shape[1:])
        return shape[-1:] if self.zeros else shape

    def array(self) -> np.ndarray:
        """The array, fetched now."""
        if self.zeros:
            return np.zeros(self.shape, self.leaf.dtype)
        whole = np.asarray(self.leaf)
        return whole if self.row is None else whole[self.row]


def _by_layer(params: Params) -> dict[Path, dict[int, Row]]:
    """Path without its segment -> absolute layer (or OUTSIDE) -> where it lies."""
    flat = paths.flatten(params)
    starts = _starts(flat)
    out: dict[Path, dict[int, Row]] = {}
    for path, leaf in flat.items():
        segment, ours = _canonical(path)
        if leaf is None:
            continue
        found = out.setdefault(ours, {})
        if segment is None:
            found[OUTSIDE] = Row(leaf, None)
        else:
            found.update({starts[segment] + i: Row(leaf, i) for i in range(leaf.shape[0])})
    return out


def _layers(t: Tensor, config: ModelConfig) -> list[int]:
    return list(range(config.num_layers)) if "{i}" in t.theirs else [OUTSIDE]


def _out(name: str, parts: list[tuple[Tensor, Row]], dtype: Any) -> tensors.Out:
    parts = sorted(parts, key=lambda p: p[0].part[0])
    kind = np.dtype(parts[0][1].leaf.dtype if dtype is None else dtype)

    def make() -> np.ndarray:
        arrays = [row.array().T if t.transpose else row.array() for t, row in parts]
        return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)).astype(kind)

    first, row = parts[0]
    stored = row.shape[::-1] if first.transpose else row.shape
    return tensors.Out(name, kind, (*stored[:-1], stored[-1] * len(parts)), make)
