"""Adapter folders of HF PEFT, read: into the methods of a config and the arrays that they train."""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tunejax.core import errors, portable
from tunejax.interop import found as found_lib
from tunejax.interop import modules, peft_prompts, peft_tensors
from tunejax.interop.found import CONFIG, Found
from tunejax.interop.modules import Place, Site
from tunejax.interop.peft import BASE, PATTERNS, PREFIX, SHARED_PREFIX, WEIGHTS
from tunejax.methods import registry
from tunejax.models.config import ModelConfig

NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {}, "", 0)
"""Values of entries in adapter_config.json that change nothing."""
IGNORED = {
    "auto_mapping", "bias", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_weights", "layers_pattern", "layers_to_transform", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "save_embedding_layers",
    "target_modules", "task_type", *PATTERNS.values(),
}  # fmt: skip
"""Entries that the tensors themselves answer, or that matter before training only."""
STARTS = ("init_lora_weights", (True, False, None, "gaussian", "eva", "orthogonal", "mica"))
"""The entry that says how an adapter started, and the starts that leave the base as it is; PEFT repeats the others on
the base whenever it loads such a folder."""


class _Seen(dict[str, np.ndarray]):
    """Tensors by name that remember which of them were asked for."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        super().__init__(tensors)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.names.add(name)
        return super().__getitem__(name)


def base_of(settings: Mapping[str, Any]) -> str:
    """Name of the model that an adapter stands on, or ""."""
    return str(settings.get("base_model_name_or_path") or "")


def read(folder: Path, config: ModelConfig, *, head: str) -> Found:
    """An adapter on a base of this shape.

    Raises:
      CheckpointError: a damaged folder, a kind that is not known, an entry that changes something unknown here, or a
        tensor that has no place in this model; each is named.
    """
    found = {k: v for k, v in found_lib.settings(folder).items() if v is not None}  # null is PEFT's default
    peft_tensors.check_task(found)
    every = peft_tensors.read(folder, found, config, head)
    if found.get("peft_type") in peft_prompts.READ:
        return _prompt(folder, found, every, config, head)
    owner = _whole(found)
    if owner is not None:
        return _modules(folder, *owner, found, every, config, head)
    name, form = _method(found)
    assert form.read is not None
    given = _arguments(name, found, form)
    by_module, whole, common = _sorted(folder, every, config, head, form)
    groups: dict[str, tuple[dict[str, Any], dict[Site, dict[str, np.ndarray]]]] = {}
    for key, (site_places, tensors) in by_module.items():
        own = {a: _of(found, p, key, given[a]) for a, p in PATTERNS.items() if form.patterns and a in given}
        sites, follows = _module(folder, name, form, key, site_places, tensors, {**given, **own})
        own |= follows
        groups.setdefault(json.dumps(own, sort_keys=True), (own, {}))[1].update(sites)
    under = {site: x for site, x in whole.items() if any(site in places for places, _ in by_module.values())}
    above = {site: x for site, x in whole.items() if site not in under}
    parts = found_lib.whole_specs("full", under, config)
    for own, sites in groups.values():
        parts += found_lib.by_layers({"name": name, **given, **own}, sites, config.num_layers)
    parts += found_lib.whole_specs("full", above, config)
    specs, arrays = [spec for spec, _ in parts], [some for _, some in parts]
    return Found(specs, base_of(found), arrays, _shared(folder, common, form), found_lib.labels_of(whole, head))


def _module(
    folder: Path,
    name: str,
    form: portable.Form,
    module: str,
    places: Mapping[Site, Place],
    tensors: Mapping[str, np.ndarray],
    arguments: Mapping[str, Any],
) -> tuple[dict[Site, dict[str, np.ndarray]], dict[str, Any]]:
    """(arrays by site, arguments that follow from them) of one adapted module."""
    seen, where = _Seen(tensors), f"{folder / WEIGHTS}: {module}"
    there = ", ".join(f"{k} {x.shape}" for k, x in tensors.items())
    try:
        arrays = form.read(seen, arguments) if form.read is not None else {}
        sites = {site: dict(_split(form, arrays, *place.part, name, module)) for site, place in places.items()}
        follows = form.found(arrays)
    except KeyError as e:
        raise errors.CheckpointError(f"{where} has no {e}; found {there}") from None
    except (AttributeError, IndexError, TypeError, ValueError) as e:
        said = {k: arguments[k] for k in form.entries if k in arguments}
        raise errors.CheckpointError(f"{where} is no {name} of {said}: {e}; found {there}") from None
    more = [k for k in tensors if k not in seen.names]
    if more:
        raise errors.CheckpointError(f"{folder / WEIGHTS}: {name} here knows nothing of {module}.{more[0]}")
    return sites, follows


def _prompt(
    folder: Path, found: dict[str, Any], tensors: dict[str, np.ndarray], config: ModelConfig, head: str
) -> Found:
    """A folder of virtual tokens or of a prefix, perhaps with modules that trained whole."""
    spec, sites = peft_prompts.read(found, tensors, folder / WEIGHTS, config)
    specs, arrays = [spec], [sites]
    whole = _placed(folder, {k: x for k, x in tensors.items() if k != peft_prompts.KEY}, config, head)
    if peft_prompts.looks_up(found) and Site(peft_prompts.TABLE, modules.OUTSIDE) in whole:
        raise errors.CheckpointError(
            f"{folder / WEIGHTS}: its table trained, and PEFT reads that of the base behind a prompt"
        )
    for extra, some in found_lib.whole_specs("full", whole, config):
        specs.append(extra)
        arrays.append(some)
    return Found(specs, base_of(found), arrays, num_labels=found_lib.labels_of(whole, head))


def _whole(settings: Mapping[str, Any]) -> tuple[str, portable.Whole] | None:
    """The method of that type among those that train parameters themselves."""
    every = ((n, portable.whole_of(registry.find(n)[1], n)) for n in registry.NAMES)
    return next(((n, f) for n, f in every if f is not None and f.peft_type == settings.get("peft_type")), None)


def _modules(
    folder: Path,
    name: str,
    form: portable.Whole,
    found: dict[str, Any],
    tensors: dict[str, np.ndarray],
    config: ModelConfig,
    head: str,
) -> Found:
    """A folder of modules that trained whole, those of ``form`` and others."""
    slot = f".{form.slot}."
    own = _placed(folder, {k.replace(slot, "."): x for k, x in tensors.items() if slot in k}, config, head)
    rest = _placed(folder, {k: x for k, x in tensors.items() if slot not in k}, config, head)
    parts = [*found_lib.whole_specs(name, own, config), *found_lib.whole_specs("full", rest, config)]
    labels = found_lib.labels_of({**own, **rest}, head)
    return Found([spec for spec, _ in parts], base_of(found), [arrays for _, arrays in parts], num_labels=labels)


def _placed(folder: Path, tensors: Mapping[str, np.ndarray], config: ModelConfig, head: str) -> dict[Site, np.ndarray]:
    """Parameters that trained whole. Raises CheckpointError on one that this model does not have."""
    plain = modules.by_name(modules.places(config, head))
    strange = [k for k in tensors if k.removeprefix(PREFIX) not in plain]
    if strange:
        raise errors.CheckpointError(f"{folder / WEIGHTS}: {strange[0]!r} has no place in this {config.family} model")
    named = [(plain[k.removeprefix(PREFIX)], x) for k, x in tensors.items()]
    return {site: modules.taken(place, x) for found, x in named for site, place in found.items()}


def _shared(folder: Path, tensors: Mapping[str, np.ndarray], form: portable.Form) -> dict[str, np.ndarray]:
    if form.read_shared is None:
        return {}
    try:
        return dict(form.read_shared(tensors))
    except KeyError as e:
        raise errors.CheckpointError(
            f"{folder / WEIGHTS} has no {e}, which all its modules share; save it together with what they share"
        ) from None


def _method(settings: Mapping[str, Any]) -> tuple[str, portable.Form]:
    """The method of that type whose flags agree; the one with the most flags where several do."""
    kind = settings.get("peft_type")
    all_forms = [(n, portable.form_of(registry.find(n)[1], n)) for n in registry.NAMES]
    own = [(n, f.own or f) for n, f in all_forms if f is not None]
    forms = [(n, f) for n, f in own if f.read is not None]
    agreeing = [
        (len(f.flags), n, f)
        for n, f in forms
        if f.peft_type == kind and all(_agrees(settings.get(k), v) for k, v in f.flags.items())
    ]
    if not agreeing:
        variants = [f"{k}: {settings.get(k)!r}" for _, f in forms if f.peft_type == kind for k in f.flags]
        if variants:
            raise errors.CheckpointError(f"{CONFIG}: {kind} with {', '.join(variants)} is not known here")
        near = errors.did_you_mean(str(kind), sorted({f.peft_type for _, f in forms}))
        raise errors.CheckpointError(f"{CONFIG}: peft_type {kind!r} is not known here. {near}")
    _, name, form = max(agreeing, key=lambda x: x[0])
    return name, form


def _agrees(found: Any, flag: Any) -> bool:
    return any(found is v or found == v for v in (flag if isinstance(flag, tuple) else (flag,)))


def _arguments(name: str, settings: Mapping[str, Any], form: portable.Form) -> dict[str, Any]:
    """The method's arguments but its targets. Raises CheckpointError on an entry that would change what it computes."""
    parameters = inspect.signature(registry.find(name)[0]).parameters
    ours = {theirs: k for k, theirs in form.entries.items()}
    out = {k: p.default for k, p in parameters.items() if k in form.entries and p.default is not p.empty}
    out |= form.absent
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
    exceptions = settings.get(pattern, {})
    try:
        for expression, value in exceptions.items():
            if re.match(rf"(.*\.)?({expression})$", module):
                return type(default)(value)
    except (AttributeError, TypeError, ValueError, re.error) as e:
        raise errors.CheckpointError(
            f"{CONFIG}: {pattern} is {exceptions!r}; expected numbers by regular expressions of modules' names: {e}"
        ) from None
    return default


Sorted = tuple[
    dict[str, tuple[dict[Site, Place], dict[str, np.ndarray]]], dict[Site, np.ndarray], dict[str, np.ndarray]
]


def _sorted(
    folder: Path, tensors: dict[str, np.ndarray], config: ModelConfig, head: str, form: portable.Form
) -> Sorted:
    """(adapted modules: their kernels and tensors; values that trained whole; what is shared).

    Raises:
      CheckpointError: tensors that are none of these.
    """
    places = modules.places(config, head)
    plain = modules.by_name(places)
    kernels: dict[str, dict[Site, Place]] = {}
    for site, place in places.items():
        if place.name == "weight" and not site.path.endswith(("scale", "table")):
            kernels.setdefault(place.module, {})[site] = place
    adapted: dict[str, tuple[dict[Site, Place], dict[str, np.ndarray]]] = {}
    whole, shared, strange = {}, {}, []
    for key, array in tensors.items():
        bare = key.removeprefix(PREFIX).replace(BASE, ".")
        owner = max((m for m in kernels if bare.startswith(m + ".")), key=len, default=None)
        if bare in plain:
            whole.update({site: modules.taken(place, array) for site, place in plain[bare].items()})
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
    if of == 1:
        return arrays
    if form.split is None:
        raise errors.CheckpointError(f"{module} keeps {of} kernels as one, and {name} has no form for a part of it")
    return form.split(arrays, i, of)
