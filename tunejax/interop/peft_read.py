"""Adapter folders of HF PEFT, read: into the methods of a config and the arrays that they train."""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tunejax.core import errors, operators, portable
from tunejax.core.method import SHARED, Method
from tunejax.interop import modules, peft_prompts
from tunejax.interop.modules import Place, Site
from tunejax.interop.peft import CONFIG, PATTERNS, PREFIX, SHARED_PREFIX, WEIGHTS
from tunejax.methods import registry
from tunejax.models.config import ModelConfig

NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {}, "", 0)
"""Values of entries in adapter_config.json that change nothing."""
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "init_weights",
    "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "revision", "save_embedding_layers", "target_modules", "task_type", "lora_bias", "exclude_modules", "megatron_core",
    *PATTERNS.values(),
}  # fmt: skip
"""Entries that the tensors themselves answer, or that matter before training only."""
STARTS = ("init_lora_weights", (True, False, None, "gaussian", "eva", "orthogonal"))
"""The entry that says how an adapter started, and the starts that leave the base as it is; PEFT repeats the others on
the base whenever it loads such a folder."""


class Found(NamedTuple):
    """An adapter. specs: its methods, as in a config; base: name of its base model; arrays: for `trained`.

    arrays: one mapping a spec: (path without segment, layer) -> arrays by name, or a whole value under "".
    shared: arrays that all sites share, as large as any of them needs.
    """

    specs: list[dict[str, Any]]
    base: str
    arrays: list[dict[Site, dict[str, np.ndarray]]]
    shared: dict[str, np.ndarray] = {}  # noqa: RUF012


def is_adapter(folder: str | Path) -> bool:
    """Whether PEFT wrote it."""
    return (Path(folder) / CONFIG).is_file()


def read(folder: Path, config: ModelConfig, *, head: str) -> Found:
    """An adapter on a base of this shape.

    Raises:
      CheckpointError: a damaged folder, a kind that is not known, an entry that changes something unknown here, or a
        tensor that has no place in this model; each is named.
    """
    found = settings(folder)
    if found.get("peft_type") in peft_prompts.READ:
        return _prompt(folder, found, config, head)
    name, form = _method(found)
    assert form.read is not None
    given = _arguments(name, found, form)
    by_module, whole, common = _sorted(folder, config, head, form)
    groups: dict[str, tuple[dict[str, Any], dict[Site, dict[str, np.ndarray]]]] = {}
    for key, (site_places, tensors) in by_module.items():
        own = {a: _of(found, p, key, given[a]) for a, p in PATTERNS.items() if form.patterns and a in given}
        try:
            arrays = form.read(tensors, {**given, **own})
        except KeyError as e:
            raise errors.CheckpointError(f"{folder / WEIGHTS}: {key} has no {e}; found {', '.join(tensors)}") from None
        own |= form.found(arrays)
        for site, place in site_places.items():
            i, of = place.part
            split = arrays if of == 1 else _split(form, arrays, i, of, name, key)
            groups.setdefault(json.dumps(own, sort_keys=True), (own, {}))[1][site] = dict(split)
    specs, out = [], []
    for own, sites in groups.values():
        for layers, some in _by_layers(sites, config.num_layers).items():
            targets = _globs(some)
            where = {"layers": f"{layers[0]}:{layers[1]}"} if layers not in (None, (0, config.num_layers)) else {}
            specs.append({"name": name, **given, **own, "targets": targets, **where})
            out.append(some)
    if whole:
        specs.append({"name": "full", "targets": _globs(whole)})
        out.append({s: {"": x} for s, x in whole.items()})
    return Found(specs, str(found.get("base_model_name_or_path") or ""), out, _shared(folder, common, form))


def _prompt(folder: Path, found: dict[str, Any], config: ModelConfig, head: str) -> Found:
    """A folder of virtual tokens or of a prefix, perhaps with modules that trained whole."""
    tensors = _tensors(folder)
    spec, sites = peft_prompts.read(found, tensors, folder / WEIGHTS, config)
    specs, arrays = [spec], [sites]
    places = modules.places(config, head)
    plain = {f"{PREFIX}{p.module}.{p.name}": (s, p) for s, p in places.items()}
    strange = [k for k in tensors if k not in plain and k != peft_prompts.KEY]
    if strange:
        raise errors.CheckpointError(f"{folder / WEIGHTS}: {strange[0]!r} has no place in this {config.family} model")
    whole = {plain[k][0]: x.T if plain[k][1].transpose else x for k, x in tensors.items() if k in plain}
    if whole:
        specs.append({"name": "full", "targets": _globs(whole)})
        arrays.append({s: {"": x} for s, x in whole.items()})
    return Found(specs, str(found.get("base_model_name_or_path") or ""), arrays)


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors

    try:
        return dict(safetensors.load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as e:
        raise errors.CheckpointError(f"{folder / WEIGHTS} cannot be read: {e}") from None


def _shared(folder: Path, tensors: Mapping[str, np.ndarray], form: portable.Form) -> dict[str, np.ndarray]:
    if form.read_shared is None:
        return {}
    try:
        return dict(form.read_shared(tensors))
    except KeyError as e:
        raise errors.CheckpointError(
            f"{folder / WEIGHTS} has no {e}, which all its modules share; save it together with what they share"
        ) from None


def _globs(sites: Mapping[Site, Any]) -> list[str]:
    return sorted({f"/{s.path.replace('layers/', 'layers/*/', 1)}" for s in sites})


def trained(found: Found, method: Method, train: Any, cuts: tuple[int, ...]) -> Any:
    """What an adapter trained, in the structure of ``train`` (shapes will do) of the method that its specs build.

    cuts: of the stack that ``method`` was begun on.
    """
    starts = {str(i): c for i, c in enumerate(sorted({0, *cuts}))}

    def one(arrays: dict[Site, dict[str, np.ndarray]], part: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for path, like in part.items():
            if path == SHARED:
                out[path] = _cut(found.shared, like)
                continue
            ours, first = modules.canonical(path, starts)
            fields = {"": like} if operators.is_array(like) else like
            made = {k: _stacked(arrays, ours, first, k, x) for k, x in fields.items()}
            out[path] = made[""] if operators.is_array(like) else made
        return out

    if not method.parts:
        return one(found.arrays[0], train)
    keys = [f"{i}:{m.name}" for i, m in enumerate(method.parts)]
    return {k: one(arrays, train[k]) for k, arrays in zip(keys, found.arrays, strict=True)}


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
    layers = [modules.OUTSIDE] if first < 0 else range(first, first + like.shape[0])
    rows = [arrays[Site(path, i)][name] for i in layers]
    value = rows[0] if first < 0 else np.stack(rows)
    if value.shape != tuple(like.shape):
        raise errors.CheckpointError(f"the adapter's {name} at {path} has shape {value.shape}, expected {like.shape}")
    return jax.numpy.asarray(value, like.dtype)


def settings(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises CheckpointError where it cannot be read."""
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise errors.CheckpointError(f"{folder / CONFIG} cannot be read: {e}") from None


def _method(settings: Mapping[str, Any]) -> tuple[str, portable.Form]:
    """The method of that type whose flags agree; the one with the most flags where several do."""
    kind = settings.get("peft_type")
    all_forms = [(n, portable.form_of(registry.find(n)[1], n)) for n in registry.NAMES]
    forms = [(n, f) for n, f in all_forms if f is not None and f.read is not None]
    agreeing = [
        (len(f.flags), n, f)
        for n, f in forms
        if f.peft_type == kind and all(settings.get(k) == v for k, v in f.flags.items())
    ]
    if not agreeing:
        near = errors.did_you_mean(str(kind), sorted({f.peft_type for _, f in forms}))
        raise errors.CheckpointError(f"{CONFIG}: peft_type {kind!r} is not known here. {near}")
    _, name, form = max(agreeing, key=lambda x: x[0])
    return name, form


def _arguments(name: str, settings: Mapping[str, Any], form: portable.Form) -> dict[str, Any]:
    """The method's arguments but its targets. Raises CheckpointError on an entry that would change what it computes."""
    parameters = inspect.signature(registry.find(name)[0]).parameters
    ours = {theirs: k for k, theirs in form.entries.items()}
    out: dict[str, Any] = {}
    strange = []
    for key, value in settings.items():
        if key in IGNORED or key in form.flags or key in form.ignored or (key == STARTS[0] and value in STARTS[1]):
            continue
        if key in ours:
            fractional = isinstance(parameters[ours[key]].default, float) and isinstance(value, int)
            out[ours[key]] = float(value) if fractional else value
        elif value not in NEUTRAL:
            strange.append(f"{key}: {value!r}")
    if strange:
        raise errors.CheckpointError(f"{CONFIG}: {name} here knows nothing of {'; '.join(strange)}")
    return out


def _of(settings: Mapping[str, Any], pattern: str, module: str, default: Any) -> Any:
    """An argument for one module: PEFT's exceptions are regular expressions for the end of its name."""
    for expression, value in (settings.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({expression})$", module):
            return type(default)(value)
    return default


Sorted = tuple[
    dict[str, tuple[dict[Site, Place], dict[str, np.ndarray]]], dict[Site, np.ndarray], dict[str, np.ndarray]
]


def _sorted(folder: Path, config: ModelConfig, head: str, form: portable.Form) -> Sorted:
    """(adapted modules: their kernels and tensors; values that trained whole; what is shared).

    Raises:
      CheckpointError: tensors that are none of these.
    """
    tensors = _tensors(folder)
    places = modules.places(config, head)
    plain = {f"{p.module}.{p.name}": (s, p) for s, p in places.items()}
    kernels: dict[str, dict[Site, Place]] = {}
    for site, place in places.items():
        if place.name == "weight" and not site.path.endswith(("scale", "table")):
            kernels.setdefault(place.module, {})[site] = place
    adapted: dict[str, tuple[dict[Site, Place], dict[str, np.ndarray]]] = {}
    whole, shared, strange = {}, {}, []
    for key, array in tensors.items():
        bare = key.removeprefix(PREFIX)
        owner = max((m for m in kernels if bare.startswith(m + ".")), key=len, default=None)
        if bare in plain:
            site, place = plain[bare]
            whole[site] = array.T if place.transpose else array
        elif form.read_shared is not None and key.startswith(SHARED_PREFIX) and not key.startswith(PREFIX):
            shared[key.removeprefix(SHARED_PREFIX)] = array
        elif owner is not None:
            adapted.setdefault(owner, (kernels[owner], {}))[1][bare.removeprefix(owner + ".")] = array
        else:
            strange.append(key)
    if strange:
        near = errors.nearest(strange[0].removeprefix(PREFIX), kernels, 1)
        hint = f" The nearest module here is {near[0]!r}." if near else ""
        raise errors.CheckpointError(
            f"{folder / WEIGHTS}: {len(strange)} tensors have no place in this {config.family} model, such as "
            f"{strange[0]!r}.{hint}"
        )
    return adapted, whole, shared


def _split(form: portable.Form, arrays: portable.Arrays, i: int, of: int, name: str, module: str) -> portable.Arrays:
    if form.split is None:
        raise errors.CheckpointError(f"{module} keeps {of} kernels as one, and {name} has no form for a part of it")
    return form.split(arrays, i, of)


def _by_layers(
    sites: Mapping[Site, dict[str, np.ndarray]], depth: int
) -> dict[tuple[int, int] | None, dict[Site, dict[str, np.ndarray]]]:
    """The sites by the runs of layers that they cover: one method each."""
    layers: dict[str, list[int]] = {}
    for site in sites:
        layers.setdefault(site.path, []).append(site.layer)
    out: dict[tuple[int, int] | None, dict[Site, dict[str, np.ndarray]]] = {}
    for site, arrays in sites.items():
        covered = sorted(layers[site.path])
        run = _run(covered, site.layer)
        out.setdefault(None if run[0] < 0 else run, {})[site] = arrays
    return out


def _run(layers: list[int], layer: int) -> tuple[int, int]:
    """[start, stop) of the unbroken run of layers that ``layer`` lies in."""
    start = stop = layer
    while start - 1 in layers:
        start -= 1
    while stop + 1 in layers:
        stop += 1
    return start, stop + 1
