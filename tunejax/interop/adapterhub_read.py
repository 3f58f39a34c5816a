"""Adapter folders of AdapterHub's library `adapters`, read: into the methods of a config and the arrays they train."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tunejax.core import errors, portable
from tunejax.interop import found as found_lib
from tunejax.interop import hub_config, hub_slots, modules
from tunejax.interop.found import CONFIG, Found
from tunejax.interop.hub_slots import Slot
from tunejax.interop.modules import Site
from tunejax.methods import registry
from tunejax.models.config import ModelConfig

HEADS = {"ForCausalLM": "lm", "LMHeadModel": "lm", "ForMaskedLM": "mlm", "ForSequenceClassification": "classification"}
"""How the name of a model's class ends -> the head that it has."""
TIED = "lm_head.weight"
"""Where a model's head is its table: that table once more, which the library does not train."""
PICKLES = {hub_slots.WEIGHTS: "pytorch_adapter.bin", hub_slots.HEAD_WEIGHTS: "pytorch_model_head.bin"}
ARCHITECTURES = {
    "lora": "write it as a folder of HF PEFT, which is read",
    "prefix_tuning": "its prefix takes no positions, and here the text's go on from the prefix's length",
    "prompt_tuning": "write it as a folder of HF PEFT, which is read",
    "reft": "it edits chosen positions of a text, and here every position is edited",
    "union": "it joins several methods (mam, unipelt), of which prefixes and gates have no exact form",
}
"""What cannot be read -> why, or what can."""


def is_adapter(settings: Mapping[str, Any]) -> bool:
    """Whether adapter_config.json is of that library; HF PEFT's has a peft_type and no section ``config``."""
    return "peft_type" not in settings and "config" in settings


def base_of(settings: Mapping[str, Any]) -> str:
    """Name of the model that an adapter stands on, or ""."""
    return str(settings.get("model_name") or "")


def head_of(folder: Path) -> str:
    """The head of that model, by its class or by the head beside the adapter; else that of its language model."""
    settings = found_lib.settings(folder)
    name = str(settings.get("model_class") or "")
    default = "mlm" if settings.get("model_type") in hub_slots.ENCODERS else "lm"
    if (_head_config(folder).get("config") or {}).get("head_type") == "classification":
        default = "classification"
    return next((head for end, head in HEADS.items() if name.endswith(end)), default)


def read(folder: Path, config: ModelConfig, *, head: str) -> Found:
    """An adapter on a base of this shape, with the head beside it.

    Raises:
      CheckpointError: a damaged folder, a pickle, a kind that is not known, entries without an exact form here, or a
        tensor that is missing or has no place in this model; each is named.
    """
    found = found_lib.settings(folder)
    if not isinstance(found["config"], Mapping):
        raise errors.CheckpointError(f"{folder / CONFIG}: config is {found['config']!r}, expected a mapping of entries")
    entries = dict(found["config"])
    if (kind := entries.get("architecture")) not in (None, "bottleneck"):
        raise errors.CheckpointError(
            f"{folder / CONFIG}: architecture {kind!r} of AdapterHub has no exact form here"
            + (f": {ARCHITECTURES[kind]}" if kind in ARCHITECTURES else "")
            + f" ({hub_config.DETAILS})"
        )
    name, form = _method(entries)
    given = hub_config.arguments(form, entries, config, legacy="version" not in found)
    by_slot, common = _sorted(folder, found, entries, config, head)
    groups: dict[int, dict[Site, dict[str, np.ndarray]]] = {}
    for slot, tensors in by_slot.items():
        arrays = _arrays(folder, form, tensors, slot)
        groups.setdefault(form.width(arrays), {})[slot.site] = arrays
    parts = [
        part
        for width, sites in groups.items()
        for part in found_lib.by_layers({"name": name, **given, "width": width}, sites, config.num_layers)
    ]
    values, num_labels = _head(folder, config, head)
    parts += found_lib.whole_specs("full", values, config)
    shared = _shared(folder, form, common)
    return Found([s for s, _ in parts], base_of(found), [arrays for _, arrays in parts], shared, num_labels)


def _method(entries: Mapping[str, Any]) -> tuple[str, portable.Hub]:
    """The method whose flags agree; the one with the most flags where several do."""
    every = {**hub_config.DEFAULTS, **entries}
    agreeing = [
        (len(form.flags), name, form)
        for name in registry.NAMES
        if isinstance(form := portable.hub_of(registry.find(name)[1], name), portable.Hub)
        and all(every.get(k) == v for k, v in form.flags.items())
    ]
    _, name, form = max(agreeing, key=lambda x: x[0])
    return name, form


def _tensors(folder: Path, name: str) -> dict[str, np.ndarray]:
    if not (folder / name).is_file() and (folder / PICKLES[name]).is_file():
        raise errors.CheckpointError(
            f"{folder} holds {PICKLES[name]} but no {name}. PyTorch's own files are pickles, which can run code when "
            "they are read, so only safetensors are. Convert it where you trust it: load it with `adapters`, then "
            "save_adapter(..., use_safetensors=True)"
        )
    return found_lib.tensors(folder / name)


def _sorted(
    folder: Path, found: Mapping[str, Any], entries: Mapping[str, Any], config: ModelConfig, head: str
) -> tuple[dict[Slot, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """(tensors of each slot, what is shared), by the ends of their names.

    Raises:
      CheckpointError: tensors that are neither, or a slot that the config asks for and that has none.
    """
    try:
        there = hub_slots.slots(config, head)
    except errors.ConfigError as e:
        raise errors.CheckpointError(str(e)) from None
    prefix, adapter = hub_slots.base_prefix(config), str(found.get("name"))
    owners = {module.removeprefix(prefix): slot for slot, module in there.items()}
    by_slot: dict[Slot, dict[str, np.ndarray]] = {}
    common, strange = {}, []
    for key, array in _tensors(folder, hub_slots.WEIGHTS).items():
        parsed = hub_slots.parse(key, adapter)
        slot = parsed and owners.get(parsed.module.removeprefix(prefix))
        if parsed and not parsed.module:
            common[parsed.end] = array
        elif parsed and slot:
            by_slot.setdefault(slot, {})[parsed.end] = array
        else:
            strange.append(key)
    if strange:
        near = errors.nearest(strange[0], [f"{m}.adapters.{adapter}" for m in there.values()], 1)
        hint = f" The nearest place here is {near[0]!r}." if near else ""
        raise errors.CheckpointError(
            f"{folder / hub_slots.WEIGHTS}: {len(strange)} tensors have no place in this {config.family} model, such "
            f"as {strange[0]!r}.{hint}"
        )
    missing = [s for s in _wanted(entries, config) if s not in by_slot]
    if missing:
        raise errors.CheckpointError(
            f"{folder / hub_slots.WEIGHTS} has nothing for {there[missing[0]]}.adapters.{adapter}, and {CONFIG} asks "
            "for it"
        )
    return by_slot, common


def _wanted(entries: Mapping[str, Any], config: ModelConfig) -> Iterator[Slot]:
    for layer in range(config.num_layers):
        if layer not in (entries.get("leave_out") or ()):
            yield from (Slot(place, layer) for place in hub_slots.PLACES if entries.get(place))


def _arrays(folder: Path, form: portable.Hub, tensors: Mapping[str, np.ndarray], slot: Slot) -> dict[str, np.ndarray]:
    """The arrays of one slot; a trained factor is multiplied into them."""
    rest = {k: x for k, x in tensors.items() if k != "scaling"}
    try:
        arrays = form.read(rest)
        left = rest.keys() - form.write(arrays).keys()
    except KeyError as e:
        raise errors.CheckpointError(
            f"{folder / hub_slots.WEIGHTS}: layer {slot.layer}, {slot.place}, has no {e}; found {', '.join(tensors)}"
        ) from None
    if left:
        raise errors.CheckpointError(
            f"{folder / hub_slots.WEIGHTS}: layer {slot.layer}, {slot.place}, has {min(left)!r}, which no method here "
            "knows"
        )
    return form.scaled(arrays, tensors["scaling"]) if form.scaled and "scaling" in tensors else arrays


def _shared(folder: Path, form: portable.Hub, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if form.read_shared is None:
        return {}
    try:
        return dict(form.read_shared(tensors))
    except KeyError as e:
        raise errors.CheckpointError(
            f"{folder / hub_slots.WEIGHTS} has no {e}, which all its adapters share; older versions of the library "
            "left it out, and such a folder does not say what was trained"
        ) from None


def _head_config(folder: Path) -> dict[str, Any]:
    """What is said of the head beside the adapter; empty where there is none."""
    file = folder / hub_slots.HEAD_CONFIG
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as e:
        raise errors.CheckpointError(f"{file} cannot be read: {e}") from None


def _renamed(about: Mapping[str, Any], config: ModelConfig) -> dict[str, str]:
    """Tensors of a head of the library's own classes -> what transformers' class calls them."""
    own = about.get("config") or {}
    wanted = {"head_type": "classification", "layers": 1, "use_pooler": True, "bias": True}
    if config.kind == "encoder" and all(own.get(k) == v for k, v in wanted.items()):
        return {f"heads.{about.get('name')}.1.{k}": f"classifier.{k}" for k in ("weight", "bias")}
    return {}


def _head(folder: Path, config: ModelConfig, head: str) -> tuple[dict[Site, np.ndarray], int | None]:
    """(parameters of the head beside the adapter, its labels where it says how many).

    Raises:
      CheckpointError: a head of another kind than the model's.
    """
    about = _head_config(folder)
    if not about:
        return {}, None
    places, renamed = modules.places(config, head), _renamed(about, config)
    plain = {f"{p.module}.{p.name}": (s, p) for s, p in places.items()}
    out, strange = {}, []
    for name, array in _tensors(folder, hub_slots.HEAD_WEIGHTS).items():
        key = renamed.get(name, name)
        if key in plain:
            site, place = plain[key]
            out[site] = array.T if place.transpose else array
        elif key != TIED:
            strange.append(name)
    if strange:
        raise errors.CheckpointError(
            f"{folder / hub_slots.HEAD_WEIGHTS}: {strange[0]!r} of a {about.get('model_class')} is no part of this "
            f"model's head ({head}). Heads of transformers' own classes are read, and of the library's those of one "
            f"layer on the pooler. For the adapter alone, take away {hub_slots.HEAD_CONFIG}"
        )
    labels = {**about, **(about.get("config") or {})}.get("num_labels") if head == "classification" else None
    return out, int(labels) if labels else None
