"""Paths into a parameter pytree, and the one language that selects among them.

Parameters are a nested dict; a path joins its keys by ``/``: ``layers/0/attention/q/kernel``. A leaf is an
array, an operator (`core.operators`) or None: an empty slot of the model, or a hole whose value trains.

Patterns are globs over paths. ``*`` stands for any part of one key, ``**`` for any number of keys, ``{a,b}``
for alternatives, and, as in .gitignore, a pattern without a leading ``/`` may start at any depth. They choose
targets, what is frozen, learning-rate groups, sharding and loading.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tunejax.core import errors

Path = str
Leaf = Any
Params = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[Path, Leaf]:
    """The leaves of a nested dict by path, in the order of the dict. Operators and None are leaves."""
    flat: dict[Path, Leaf] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[Path, Leaf]) -> Params:
    """The nested dict whose leaves lie at these paths; the inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def get(tree: Mapping[str, Any], path: Path) -> Leaf:
    """The leaf (or subtree) at ``path``. Raises KeyError where there is none."""
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


def replace(tree: Params, updates: Mapping[Path, Leaf]) -> Params:
    """``tree`` with the leaves at these paths replaced; untouched subtrees are shared, nothing is written in place.

    Raises:
      TargetError: a path is not in the tree.
    """
    if not updates:
        return tree
    grouped: dict[str, dict[Path, Leaf]] = {}
    out = dict(tree)
    for path, leaf in updates.items():
        head, _, rest = path.partition("/")
        if head not in tree:
            raise errors.TargetError(f"no parameter at {path!r}. {errors.did_you_mean(head, tree)}")
        if rest:
            grouped.setdefault(head, {})[rest] = leaf
        else:
            out[head] = leaf
    for head, inner in grouped.items():
        out[head] = replace(tree[head], inner)
    return out


@functools.lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob over paths (this module's docstring gives the language)."""
    anchored, text = pattern.startswith("/"), pattern.lstrip("/")
    out, depth, i = "", 0, 0
    while i < len(text):
        char = text[i]
        if text.startswith("**/", i):
            out, i = out + "(?:[^/]+/)*", i + 3
            continue
        if text.startswith("**", i):
            out, i = out + ".*", i + 2
            continue
        if char == "*":
            out += "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "{":
            out, depth = out + "(?:", depth + 1
        elif char == "}" and depth:
            out, depth = out + ")", depth - 1
        elif char == "," and depth:
            out += "|"
        else:
            out += re.escape(char)
        i += 1
    if depth:
        raise errors.TargetError(f"pattern {pattern!r}: a '{{' is not closed")
    return re.compile(out if anchored else f"(?:.*/)?{out}")


def matches(pattern: str, path: Path) -> bool:
    """Whether ``pattern`` selects ``path``."""
    return compile_pattern(pattern).fullmatch(path) is not None


def chosen(patterns: Iterable[str], path: Path) -> bool:
    """Whether ``patterns`` select ``path``, as in `select`: one with a leading ``!`` takes away what came before."""
    found = False
    for pattern in patterns:
        if matches(pattern.lstrip("!"), path):
            found = not pattern.startswith("!")
    return found


def is_kernel(path: Path, leaf: Leaf) -> bool:
    """Whether a leaf is the kernel of a linear layer, [in, out] or, in the stack, [layers, in, out]."""
    return path.rpartition("/")[2] == "kernel" and len(leaf.shape) >= 2 + path.startswith("layers/")


def check_kernels(name: str, leaves: Mapping[Path, Leaf]) -> None:
    """Raises TargetError where a method of that name targets what is no kernel."""
    for path, leaf in leaves.items():
        if not is_kernel(path, leaf):
            shape = tuple(leaf.shape)[path.startswith("layers/") :]
            raise errors.TargetError(f"{name} targets {path} of shape {shape}; it needs a kernel, as in mlp/**/kernel")


class Segment(NamedTuple):
    """One run of layers stored stacked under ``layers/<name>``: layers ``start`` to ``start + size - 1``."""

    name: str
    start: int
    size: int

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and path.startswith(f"layers/{self.name}/")


def segments(params: Mapping[str, Any]) -> list[Segment]:
    """The segments of the stack in order, read off the leading axis of their leaves. Empty without ``layers``."""
    found, start = [], 0
    for name, stack in sorted(params.get("layers", {}).items(), key=lambda item: int(item[0])):
        size = next(leaf.shape[0] for leaf in flatten(stack).values() if leaf is not None)
        found.append(Segment(name, start, size))
        start += size
    return found


def starts(cuts: Iterable[int]) -> dict[str, int]:
    """The first layer of each segment, by its name, of a stack that is cut before these layers."""
    return {str(i): cut for i, cut in enumerate(sorted({0, *cuts}))}


class Selection(NamedTuple):
    """The paths that some patterns chose, as a value to count, print and log. ``by_pattern`` says which chose what."""

    leaves: dict[Path, Leaf]
    by_pattern: dict[str, list[Path]]

    def report(self) -> str:
        """One line a pattern: how many leaves and parameters it selected."""
        lines = []
        for pattern, chosen in self.by_pattern.items():
            sizes = [size(self.leaves[p]) for p in chosen if p in self.leaves]
            lines.append(f"{pattern}: {len(chosen)} leaves, {sum(sizes):,} parameters")
        return "\n".join(lines)


def size(leaf: Leaf) -> int:
    """The number of entries of an array (or of the kernel that an operator stands for); 0 for None."""
    return 0 if leaf is None else math.prod(getattr(leaf, "shape", ()))


BOUND = r"-?\d+|\d+/[1-9]\d*"


def _bound(text: str, depth: int) -> int:
    part, _, whole = text.partition("/")
    return (2 * int(part) * depth + int(whole)) // (2 * int(whole)) if whole else int(part)


def layer_range(text: str | int | tuple[int, int], depth: int) -> tuple[int, int]:
    """(start, stop) of a slice of layers written as Python writes it: "6:", ":4", "-2:", "3", 3.

    A bound may be a part of the depth, rounded to a whole layer: "1/2:" is the upper half.

    Raises:
      ConfigError: not of that form, or it selects no layer of a stack of ``depth``.
    """
    if isinstance(text, tuple):
        start, stop = text
    else:
        found = re.fullmatch(rf"\s*({BOUND})?\s*(:)?\s*({BOUND})?\s*", str(text))
        if not found or (found[2] is None and (found[1] is None or "/" in found[1])):
            raise errors.ConfigError(f"layers: {text!r} is not a slice such as '-2:', ':4', '3:5' or '1/2:'")
        first, last = (_bound(x, depth) if x is not None else None for x in (found[1], found[3]))
        if found[2] is None:
            last = None if first == -1 else first + 1  # type: ignore[operator]
        start, stop, _ = slice(first, last).indices(depth)
    if not 0 <= start < stop <= depth:
        raise errors.ConfigError(f"layers: {text!r} selects no layer of a stack of {depth}")
    return start, stop


def _outside(params: Mapping[str, Any], layers: str | int | tuple[int, int]) -> list[Segment]:
    """The segments that ``layers`` leaves out, which the stack must have been cut for."""
    parts = segments(params)
    start, stop = layer_range(layers, sum(s.size for s in parts))
    for s in parts:
        if s.start < start < s.start + s.size or s.start < stop < s.start + s.size:
            raise errors.TargetError(
                f"layers {start}:{stop} cut through segment layers/{s.name} (layers {s.start} to "
                f"{s.start + s.size - 1}); build the model with cuts=({start}, {stop})"
            )
    return [s for s in parts if s.start + s.size <= start or s.start >= stop]


def select(
    params: Mapping[str, Any],
    patterns: str | Iterable[str],
    *,
    layers: str | int | tuple[int, int] | None = None,
    empty: bool = False,
) -> Selection:
    """The leaves that any of ``patterns`` matches, in the order of ``params``.

    Args:
      params: nested dict of arrays or operators (or their ShapeDtypeStructs).
      patterns: one glob or several; a leading ``!`` takes away from what the ones before it chose.
      layers: only leaves of these layers of the stack (see `layer_range`); the stack must be cut there.
      empty: select empty slots (None) instead of filled ones.

    Raises:
      TargetError: a pattern matches nothing, with the nearest paths; or nothing is left, or there is no pattern.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise errors.TargetError(
            "the list of targets is empty; name what is to be matched, such as '/layers/**/kernel'"
        )
    flat = {p: leaf for p, leaf in flatten(params).items() if (leaf is None) == empty}
    if layers is not None:
        left_out = _outside(params, layers)
        flat = {p: x for p, x in flat.items() if p.startswith("layers/") and not any(p in s for s in left_out)}
    by_pattern: dict[str, list[Path]] = {}
    for pattern in patterns:
        hits = [p for p in flat if matches(pattern.lstrip("!"), p)]
        if not hits and not empty:
            raise errors.TargetError(
                f"target {pattern!r} matches none of {len(flat)} parameters. {_nearest_paths(pattern, flat)}"
            )
        by_pattern[pattern] = hits
    leaves = {p: x for p, x in flat.items() if chosen(patterns, p)}
    if not leaves and not empty:
        raise errors.TargetError(f"targets {', '.join(map(repr, patterns))} take away all that they match")
    return Selection(leaves, by_pattern)


def _nearest_paths(pattern: str, flat: Mapping[Path, Leaf]) -> str:
    wanted = re.sub(r"[*{}!]+", "", pattern).strip("/")
    tails: dict[str, Path] = {}
    for p in flat:
        tails.setdefault("/".join(p.split("/")[2:]) if p.startswith("layers/") else p, p)
    close = errors.nearest(wanted, tails)
    shown = [tails[c] for c in close] or list(tails.values())[:8]
    return "The nearest paths are:\n  " + "\n  ".join(shown)
