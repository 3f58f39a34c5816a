"""Bottleneck adapters in AdapterHub's folders, written and read: one kind, in the same layers at all places."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tunejax.core import errors, portable
from tunejax.interop import found as found_lib
from tunejax.interop import hub_config, hub_part, hub_slots, modules
from tunejax.interop.found import Spec
from tunejax.interop.hub_part import NAME, Folder, Part, Written
from tunejax.interop.hub_slots import PLACES, Slot
from tunejax.interop.modules import Site
from tunejax.methods import registry
from tunejax.models.config import ModelConfig

BY_SITE = ("targets", "layers", "width", "reduction_factor", "drop_first", "drop_random")
"""Arguments that the tensors answer, or that matter in training only: parts of one adapter may differ in them."""


def write(parts: list[Part], starts: dict[str, int], config: ModelConfig, head: str) -> Written:
    """The tensors and the entries of adapters that differ in where they stand and in width alone.

    Raises:
      ConfigError: they differ in more, stand where the library has none, or read what none there reads.
    """
    first = parts[0]
    form = first.form
    assert isinstance(form, portable.Hub)
    gated = hub_part.same(parts, "kind of gate", [p.gates is not None for p in parts])
    fixed = {k: v for k, v in first.arguments.items() if k not in BY_SITE}
    by_slot: dict[Slot, portable.Arrays] = {}
    for part in parts:
        if part.form != form or {k: v for k, v in part.arguments.items() if k not in BY_SITE} != fixed:
            raise errors.ConfigError(
                f"AdapterHub keeps one kind of adapter in a folder; {first.name} and {part.name} of this chain differ"
            )
        if any(not np.array_equal(x, first.shared[k]) for k, x in part.shared.items()):
            raise errors.ConfigError(f"AdapterHub keeps one set of what all sites share; parts of {part.name} differ")
        for slot, arrays in _slots(part, starts):
            if slot in by_slot:
                raise errors.ConfigError(f"AdapterHub keeps one adapter at a place; two are at {slot.site.path}")
            by_slot[slot] = arrays
    there = hub_slots.slots(config, head)
    out = {
        f"{there[slot]}.adapters.{NAME}.{k}": x
        for slot, arrays in by_slot.items()
        for k, x in (_written(form, arrays) | hub_part.gate_to_hub(arrays)).items()
    }
    if form.write_shared is not None:
        prefix = f"{hub_slots.base_prefix(config)}shared_parameters.{NAME}."
        out |= {prefix + k: x for k, x in form.write_shared(first.shared).items()}
    entries = hub_config.written(form, first.arguments, config)
    return out, entries | _standing(by_slot, form, config) | {"use_gating": gated}


def _written(form: portable.Hub, arrays: portable.Arrays) -> dict[str, np.ndarray]:
    return form.write({k: x for k, x in arrays.items() if k not in hub_part.GATE.values()})


def _slots(part: Part, starts: dict[str, int]) -> list[tuple[Slot, portable.Arrays]]:
    """The arrays of each layer of each site, with its gate's."""
    named = {path: place for place, path in PLACES.items()}
    out: list[tuple[Slot, portable.Arrays]] = []
    for path, arrays in part.sites.items():
        ours, first = modules.canonical(path, starts)
        if ours not in named:
            raise errors.ConfigError(
                f"AdapterHub has adapters after attention/o/kernel and mlp/down/kernel; {part.name} has one at {path}"
            )
        arrays = {**arrays, **_gate(part, path)}
        rows = next(iter(arrays.values())).shape[0]
        out += [(Slot(named[ours], first + i), {k: x[i] for k, x in arrays.items()}) for i in range(rows)]
    return out


def _gate(part: Part, path: str) -> portable.Arrays:
    """The gate of one site; empty without one. Raises ConfigError for one that reads what the adapter does not."""
    if part.gates is None:
        return {}
    joined = hub_part.join_of(path)
    if joined not in part.gates and (part.reads != "output" or part.arguments.get("reads", "branch") == "input"):
        raise errors.ConfigError(
            f"AdapterHub's gate reads what its adapter does, and that of {part.name} does not; set reads: output, and "
            "for a parallel_adapter reads: residual"
        )
    return part.gates[joined if joined in part.gates else path]


def _standing(by_slot: Mapping[Slot, portable.Arrays], form: portable.Hub, config: ModelConfig) -> dict[str, Any]:
    """The entries that say in which layers and places adapters stand, and how wide they are."""
    used = {place: {s.layer for s in by_slot if s.place == place} for place in PLACES}
    layers = set().union(*used.values())
    if any(found not in (set(), layers) for found in used.values()):
        raise errors.ConfigError(
            "AdapterHub has adapters in the same layers at both places; here they are in layers "
            + " and ".join(f"{sorted(found)} ({PLACES[place]})" for place, found in used.items())
        )
    widths: dict[int, int] = {}
    for slot, arrays in by_slot.items():
        width = form.width(arrays)
        if widths.setdefault(slot.layer, width) != width:
            raise errors.ConfigError(
                f"AdapterHub has one width in a layer; here are {widths[slot.layer]} and {width} in layer {slot.layer}"
            )
    factors: dict[str, float] = {str(i): hub_config.factor(widths[i], config.embed_dim) for i in sorted(layers)}
    one = len(set(factors.values())) == 1
    return {
        **{place: bool(found) for place, found in used.items()},
        "leave_out": sorted(set(range(config.num_layers)) - layers),
        "reduction_factor": next(iter(factors.values())) if one else factors,
    }


def read(folder: Folder, entries: Mapping[str, Any]) -> list[Spec]:
    """The methods that such entries and tensors are.

    Raises:
      CheckpointError: entries that are not known or have no exact form, missing tensors or ones that do not fit.
    """
    name, form = _method(entries)
    config = folder.config
    given = hub_config.arguments(form, entries, config, legacy=folder.legacy)
    gated = bool({**hub_config.DEFAULTS, **entries}["use_gating"])
    groups: dict[int, dict[Site, dict[str, np.ndarray]]] = {}
    gates = {}
    for slot, tensors in _found(folder, entries).items():
        if gated:
            own = slot.site if given["reads"] == "branch" else hub_part.joined(slot.site)
            gates[own] = folder.gate(tensors, f"layer {slot.layer}, {slot.place},")
        arrays = _arrays(folder, form, tensors, slot)
        groups.setdefault(form.width(arrays), {})[slot.site] = arrays
    specs = [
        part
        for width, sites in groups.items()
        for part in found_lib.by_layers({"name": name, **given, "width": width}, sites, config.num_layers)
    ]
    return hub_part.behind_gates(specs, gates, "output") if gated else specs


def _found(folder: Folder, entries: Mapping[str, Any]) -> dict[Slot, dict[str, np.ndarray]]:
    """The tensors of each slot. Raises CheckpointError where one that the config asks for has none."""
    prefix, found = hub_slots.base_prefix(folder.config), folder.tensors.get("adapters", {})
    there = hub_slots.slots(folder.config, folder.head)
    wanted = set(_wanted(entries, folder.config))
    out = {}
    for slot, module in there.items():
        at = module.removeprefix(prefix)
        if slot in wanted or at in found:
            out[slot] = folder.take("adapters", at, f"{module}.adapters.{folder.adapter}")
    return out


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


def _wanted(entries: Mapping[str, Any], config: ModelConfig) -> Iterator[Slot]:
    for layer in range(config.num_layers):
        if layer not in (entries.get("leave_out") or ()):
            yield from (Slot(place, layer) for place in hub_slots.PLACES if entries.get(place))


def _arrays(folder: Folder, form: portable.Hub, tensors: Mapping[str, np.ndarray], slot: Slot) -> dict[str, np.ndarray]:
    """The arrays of one slot; a trained factor is multiplied into them."""
    arrays = folder.exactly(form, tensors, f"layer {slot.layer}, {slot.place},", ("scaling",))
    return form.scaled(arrays, tensors["scaling"]) if form.scaled and "scaling" in tensors else arrays


def shared(folder: Folder, entries: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What all sites of such an adapter share. Raises CheckpointError where something is missing."""
    form = _method(entries)[1]
    if form.read_shared is None:
        return {}
    try:
        return dict(form.read_shared(folder.tensors.get("shared_parameters", {}).pop("", {})))
    except KeyError as e:
        raise errors.CheckpointError(
            f"{folder.file} has no {e}, which all its adapters share; older versions of the library "
            "left it out, and such a folder does not say what was trained"
        ) from None
