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
from tunejax.interop import modules, peft_prompts
from tunejax.interop.found import CONFIG, Found
from tunejax.interop.modules import Place, Site
from tunejax.interop.peft import BASE_BIAS, PATTERNS, PREFIX, SHARED_PREFIX, WEIGHTS
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
OWN, ORIGINAL = ".modules_to_save.", ".original_module."
"""In names of biases, where all of them are saved, a second time: of a module that trains whole, and of the base's."""
STARTS = ("init_lora_weights", (True, False, None, "gaussian", "eva", "orthogonal"))
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
    found = found_lib.settings(folder)
    if found.get("peft_type") in peft_prompts.READ:
        return _prompt(folder, found, config, head)
    owner = _whole(found)
    if owner is not None:
        return _modules(folder, *owner, found, config, head)
    name, form = _method(found)
    assert form.read is not None
    given = _arguments(name, found, form)
    by_module, whole, common = _sorted(folder, config, head, form)
    groups: dict[str, tuple[dict[str, Any], dict[Site, dict[str, np.ndarray]]]] = {}
    for key, (site_places, tensors) in by_module.items():
        own = {a: _of(found, p, key, given[a]) for a, p in PATTERNS.items() if form.patterns and a in given}
        seen = _Seen(tensors)
        try:
            arrays = form.read(seen, {**given, **own})
        except KeyError as e:
            raise errors.CheckpointError(f"{folder / WEIGHTS}: {key} has no {e}; found {', '.join(tensors)}") from None
        more = [k for k in tensors if k not in seen.names and not k.startswith("base_layer.")]
        if more:
            raise errors.CheckpointError(f"{folder / WEIGHTS}: {name} here knows nothing of {key}.{more[0]}")
        own |= form.found(arrays)
        for site, place in site_places.items():
            i, of = place.part
            split = arrays if of == 1 else _split(form, arrays, i, of, name, key)
            groups.setdefault(json.dumps(own, sort_keys=True), (own, {}))[1][site] = dict(split)
    specs, out = [], []
    for own, sites in groups.values():
        for spec, some in found_lib.by_layers({"name": name, **given, **own}, sites, config.num_layers):
            specs.append(spec)
            out.append(some)
    for spec, some in found_lib.whole_specs("full", whole, config):
        specs.append(spec)
        out.append(some)
    return Found(specs, base_of(found), out, _shared(folder, common, form), found_lib.labels_of(whole, head))


def _prompt(folder: Path, found: dict[str, Any], config: ModelConfig, head: str) -> Found:
    """A folder of virtual tokens or of a prefix, perhaps with modules that trained whole."""
    tensors = _tensors(folder, config, head, SHARED_PREFIX)
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
    folder: Path, name: str, form: portable.Whole, found: dict[str, Any], config: ModelConfig, head: str
) -> Found:
    """A folder of modules that trained whole, those of ``form`` and others."""
    tensors, slot = _tensors(folder, config, head), f".{form.slot}."
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
    forms = [(n, f) for n, f in all_forms if f is not None and f.read is not None]
    agreeing = [
        (len(f.flags), n, f)
        for n, f in forms
        if f.peft_type == kind and all(settings.get(k) == v for k, v in f.flags.items())
    ]
    if not agreeing:
        variants = [f"{k}: {settings[k]!r}" for _, f in forms if f.peft_type == kind for k in f.flags if k in settings]
        if variants:
            raise errors.CheckpointError(f"{CONFIG}: {kind} with {', '.join(variants)} is not known here")
        near = errors.did_you_mean(str(kind), sorted({f.peft_type for _, f in forms}))
        raise errors.CheckpointError(f"{CONFIG}: peft_type {kind!r} is not known here. {near}")
    _, name, form = max(agreeing, key=lambda x: x[0])
    return name, form


def _arguments(name: str, settings: Mapping[str, Any], form: portable.Form) -> dict[str, Any]:
    """The method's arguments but its targets. Raises CheckpointError on an entry that would change what it computes."""
    parameters = inspect.signature(registry.find(name)[0]).parameters
    ours = {theirs: k for k, theirs in form.entries.items()}
    out: dict[str, Any] = dict(form.absent)
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
    tensors = _tensors(folder, config, head)
    places = modules.places(config, head)
    plain = modules.by_name(places)
    kernels: dict[str, dict[Site, Place]] = {}
    for site, place in places.items():
        if place.name == "weight" and not site.path.endswith(("scale", "table")):
            kernels.setdefault(place.module, {})[site] = place
    adapted: dict[str, tuple[dict[Site, Place], dict[str, np.ndarray]]] = {}
    whole, shared, strange = {}, {}, []
    for key, array in tensors.items():
        bare = key.removeprefix(PREFIX)
        if bare.endswith(BASE_BIAS):
            bare = bare.removesuffix(BASE_BIAS) + ".bias"
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


def _tensors(folder: Path, config: ModelConfig, head: str, prefix: str = PREFIX) -> dict[str, np.ndarray]:
    """The tensors of a folder, without a tied head's, which PEFT saves beside the table.

    prefix: of modules' tensors there; here they have `PREFIX`.

    Raises:
      CheckpointError: as `found.tensors`; table and head trained apart: a model that ties them can hold one.
    """
    tensors = found_lib.tensors(folder / WEIGHTS)
    tensors = {PREFIX + k.removeprefix(prefix) if k.startswith(prefix) else k: x for k, x in tensors.items()}
    tensors = {k.replace(OWN, "."): x for k, x in tensors.items() if ORIGINAL not in k}
    tied = modules.tied_head(config, head)
    place = modules.places(config, head).get(Site(peft_prompts.TABLE, modules.OUTSIDE))
    if tied is None or place is None:
        return tensors
    one, other = tensors.get(f"{PREFIX}{place.module}.{place.name}"), tensors.get(f"{PREFIX}{tied}.weight")
    if one is None and other is None:
        return tensors
    if one is None or other is None or not np.array_equal(one, other):
        there = place.module if one is not None else tied
        raise errors.CheckpointError(
            f"{folder / WEIGHTS}: {there} trained apart from {tied if one is not None else place.module}, which shares "
            "its weights in this model"
        )
    return {k: x for k, x in tensors.items() if k != f"{PREFIX}{tied}.weight"}


def _split(form: portable.Form, arrays: portable.Arrays, i: int, of: int, name: str, module: str) -> portable.Arrays:
    if form.split is None:
        raise errors.CheckpointError(f"{module} keeps {of} kernels as one, and {name} has no form for a part of it")
    return form.split(arrays, i, of)
