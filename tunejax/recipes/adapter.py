"""The adapter folder: what a run trained, and the digest of the base that it belongs to."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tunejax.core import errors, paths

FORMAT = 1
ARRAYS, SPEC = "adapter.safetensors", "adapter.json"


class Base(NamedTuple):
    """The model that an adapter was trained on. digest: of the parameters that its checkpoint holds."""

    name: str
    digest: str


class Source(NamedTuple):
    """Where a run stands that others take from. head: of its model, whose arrays are part of the digest."""

    base: Base
    head: str | None


class Adapter(NamedTuple):
    """What `read` found. arrays: by name ("train|0:lora|...")."""

    arrays: dict[str, np.ndarray]
    base: Base
    info: dict[str, Any]


def save(folder: Path, trees: dict[str, Any], base: Base, info: dict[str, Any]) -> None:
    """Writes arrays and spec, each whole or not at all. Every process calls it; the first one writes.

    Args:
      trees: pytrees by name: train, state, fresh (a head that the checkpoint lacks).
      info: what rebuilds the method and the head (JSON).
    """
    from safetensors import numpy as safetensors

    arrays = {f"{tree}|{k}": on_host(x) for tree, values in trees.items() for k, x in named(values).items()}
    if jax.process_index():
        return
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f".{ARRAYS}"
    safetensors.save_file({k: np.require(x, requirements="C") for k, x in arrays.items()}, half)
    half.replace(folder / ARRAYS)
    spec = {"format": FORMAT, "base": base._asdict(), **info}
    half = folder / f".{SPEC}"
    half.write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
    half.replace(folder / SPEC)


def on_host(x: Any) -> np.ndarray:
    """The whole array, also where other processes hold parts of it (all of them must then call this)."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def read(folder: Path) -> Adapter:
    """Reads an adapter folder. Raises CheckpointError: missing, damaged, or of a later format."""
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors

    for name in (SPEC, ARRAYS):
        if not (folder / name).is_file():
            raise errors.CheckpointError(f"{folder} is no adapter: it has no {name} (has the run finished?)")
    try:
        spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        base = Base(**spec.pop("base"))
        arrays = safetensors.load_file(folder / ARRAYS)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
        raise errors.CheckpointError(f"{folder / SPEC} is damaged: {e}") from None
    except SafetensorError as e:
        raise errors.CheckpointError(f"{folder / ARRAYS} is damaged: {e}") from None
    if spec.get("format") != FORMAT:
        raise errors.CheckpointError(f"{folder} has format {spec.get('format')}; this version reads {FORMAT}")
    return Adapter(arrays, base, spec)


def trained(run: str, sources: dict[str, Source] | None = None) -> tuple[dict[str, Any], Any]:
    """What a finished run trained, as its method's ``train``, and that method's description, as in its config.

    Paths in it say layers instead of segments (`by_layer`), since its stack may be cut elsewhere than another run's.

    run: its folder; sources: where to note what it stands on. Raises CheckpointError as `read`.
    """
    found = read(Path(run) / "adapter")
    if sources is not None:
        sources[run] = Source(found.base, found.info.get("head"))
    return by_layer(found, "train"), found.info.get("method")


def by_layer(adapter: Adapter, tree: str) -> dict[str, Any]:
    """`nested`, with the first of its layers in a path instead of the segment: "layers/4/..." for "layers/1/...".

    Raises:
      CheckpointError: the stack was cut, and the folder, of an earlier version, does not say where.
    """
    return at_layers(nested(adapter, tree), adapter.info.get("cuts", ()))


def at_layers(tree: Mapping[str, Any], cuts: Iterable[int]) -> dict[str, Any]:
    """A tree of dicts whose keys may be paths, as of `by_layer`. cuts: of the stack (`paths.starts`)."""
    starts, out = paths.starts(cuts), {}
    for key, value in tree.items():
        place = key
        if key.startswith("layers/"):
            _, segment, rest = key.split("/", 2)
            if segment not in starts:
                raise errors.CheckpointError(f"{key}: the adapter does not say where its stack was cut; train it again")
            place = f"layers/{starts[segment]}/{rest}"
        out[place] = at_layers(value, cuts) if isinstance(value, Mapping) else value
    return out


def nested(adapter: Adapter, tree: str) -> dict[str, Any]:
    """The arrays of one tree, whose nodes are all dicts."""
    out: dict[str, Any] = {}
    for name, array in adapter.arrays.items():
        of, *keys = name.split("|")
        node = out
        for key in keys[:-1] if of == tree else ():
            node = node.setdefault(key, {})
        if of == tree:
            node[keys[-1]] = array
    return out


def check_sources(sources: Mapping[str, Source]) -> None:
    """Raises CheckpointError, naming both, where two of them have one head and bases of other digests."""
    first: dict[str | None, str] = {}
    for name, source in sources.items():
        other = first.setdefault(source.head, name)
        base, wanted = source.base, sources[other].base
        if base.digest != wanted.digest:
            raise errors.CheckpointError(
                f"{other} is on {wanted.name} (digest {wanted.digest[:16]}), and {name} on {base.name} (digest "
                f"{base.digest[:16]}): what runs trained goes together on one base, in one model.param_dtype"
            )


def check_base(adapter: Adapter, base: Base) -> None:
    """Raises CheckpointError, naming both, where the adapter belongs to another base."""
    if adapter.base.digest != base.digest:
        raise errors.CheckpointError(
            f"this adapter was trained on {adapter.base.name} (digest {adapter.base.digest[:16]}), and the model given "
            f"is {base.name} (digest {base.digest[:16]}); give it the base that it was trained on"
        )


def restore(adapter: Adapter, tree: str, like: Any) -> Any:
    """The arrays of one tree in the structure of ``like`` (ShapeDtypeStructs will do).

    Raises:
      CheckpointError: an array is missing, left over, or of another shape; every such one is named.
    """
    wanted = {f"{tree}|{k}": x for k, x in named(like).items()}
    found = {k: x for k, x in adapter.arrays.items() if k.startswith(f"{tree}|")}
    problems = [f"{k} is missing" for k in wanted if k not in found]
    problems += [f"{k} is not of this method" for k in found if k not in wanted]
    problems += [
        f"{k} has shape {found[k].shape}, expected {tuple(x.shape)}"
        for k, x in wanted.items()
        if k in found and found[k].shape != tuple(x.shape)
    ]
    if problems:
        raise errors.CheckpointError("the adapter does not fit the method:\n  " + "\n  ".join(problems[:20]))
    leaves = [jax.numpy.asarray(found[k], x.dtype) for k, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def named(tree: Any) -> dict[str, Any]:
    """The arrays of a pytree by key path, in its own order."""
    return {
        jax.tree_util.keystr(p, simple=True, separator="|"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }
