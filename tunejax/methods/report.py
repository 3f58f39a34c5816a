"""The target report: what each method and pattern matched, how much trains there, and what was left out."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from tunejax.core import operators, paths
from tunejax.core.method import Method, Start, split
from tunejax.core.paths import Params, Path


class Entry(NamedTuple):
    """What one pattern of one method matched.

    matched: module of the stack or path -> layers matched (empty outside the stack).
    leaves: how many leaves of the model; parameters: how many entries train there.
    left_out: module -> layers that the pattern names but the method leaves.
    """

    method: str
    pattern: str
    leaves: int
    parameters: int
    matched: dict[str, list[int]]
    left_out: dict[str, list[int]]


class Report(NamedTuple):
    """Entries in order of the chain. warnings: parts of a named set that matched nothing, or only in some layers."""

    entries: list[Entry]
    warnings: list[str]
    trained: int

    def text(self) -> str:
        """The report in plain text, one block a pattern."""
        lines = []
        for e in self.entries:
            lines.append(f"{e.method} {e.pattern}: {e.leaves} leaves, {e.parameters:,} trained parameters")
            lines += [f"  {name}{_span(layers)}" for name, layers in e.matched.items()]
            lines += [f"  left out: {name}{_span(layers)}" for name, layers in e.left_out.items()]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


def describe(method: Method, params: Params, start: Start) -> Report:
    """The report of a method on a model.

    Args:
      method: of `registry.build` or `core.method.chain`.
      params: before edits; arrays or their ShapeDtypeStructs.
      start: what ``method.init`` gave for them.
    """
    flat = paths.flatten(params)
    layer_of = _layers(params)
    entries: list[Entry] = []
    warnings: list[str] = []
    for (part, train), (_, state) in zip(split(method, start.train), split(method, start.state), strict=True):
        # A method that trains nothing is described by what it keeps, or by what it rewrites.
        frozen = _sizes(state, flat) or [p for p, leaf in start.edits.items() if leaf is not None]
        sizes = _sizes(train, flat) or dict.fromkeys(frozen, 0)
        restricted = bool(part.cuts(sum(s.size for s in paths.segments(params))))
        for pattern in part.targets or ("(by itself)",):
            entry = _entry(part.name, pattern, sizes, flat, layer_of)
            entries.append(entry)
            warnings += _unmatched_alternatives(entry, flat)
            if entry.left_out and not restricted:
                warnings += [f"{part.name}: {pattern!r} leaves out {m}{_span(x)}" for m, x in entry.left_out.items()]
    return Report(entries, warnings, _count(start.train))


def _count(train: Any) -> int:
    return sum(paths.size(x) for x in jax.tree.leaves(train))


def _sizes(train: Any, flat: Mapping[Path, Any]) -> dict[Path, int]:
    """Model path -> how many entries train there."""
    if not isinstance(train, Mapping):
        return {}
    out: dict[Path, int] = {}
    for key, value in train.items():
        for path, count in ({key: _count(value)} if key in flat else _sizes(value, flat)).items():
            out[path] = out.get(path, 0) + count
    return out


def _layers(params: Params) -> dict[str, range]:
    return {s.name: range(s.start, s.start + s.size) for s in paths.segments(params)}


def _entry(
    name: str, pattern: str, sizes: Mapping[Path, int], flat: Mapping[Path, Any], layer_of: Mapping[str, range]
) -> Entry:
    by_itself = pattern == "(by itself)"
    hits = [p for p in sizes if by_itself or paths.matches(pattern.lstrip("!"), p)]
    matched = _by_module(hits, layer_of)
    everywhere = _by_module([p for p, x in flat.items() if operators.is_array(x) or p in sizes], layer_of)
    left_out = {m: rest for m, found in matched.items() if found and (rest := sorted(set(everywhere[m]) - set(found)))}
    return Entry(name, pattern, len(hits), sum(sizes[p] for p in hits), matched, left_out)


def _by_module(found: list[Path], layer_of: Mapping[str, range]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for path in found:
        if path.startswith("layers/"):
            _, segment, rest = path.split("/", 2)
            out.setdefault(f"layers/*/{rest}", []).extend(layer_of[segment])
        else:
            out.setdefault(path, [])
    return out


def _unmatched_alternatives(entry: Entry, flat: Mapping[Path, Any]) -> list[str]:
    """Alternatives of a ``{a,b}`` that match nothing while others do."""
    alone = [p for p in expand(entry.pattern) if not any(paths.matches(p.lstrip("!"), q) for q in flat)]
    if not entry.leaves or not alone or "{" not in entry.pattern:
        return []
    return [f"{entry.method}: of {entry.pattern!r}, {p!r} matches nothing in this model" for p in alone]


def expand(pattern: str) -> list[str]:
    """The patterns without braces that ``pattern`` stands for: "{q,v}/kernel" -> ["q/kernel", "v/kernel"]."""
    inner = re.search(r"\{([^{}]*)\}", pattern)
    if inner is None:
        return [pattern]
    before, after = pattern[: inner.start()], pattern[inner.end() :]
    found = [p for choice in inner[1].split(",") for p in expand(before + choice + after)]
    return list(dict.fromkeys(found))


def _span(layers: list[int]) -> str:
    """ " (layers 0-5)": runs of consecutive layers."""
    if not layers:
        return ""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return f" (layers {', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)})"
