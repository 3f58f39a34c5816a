"""Adapter folders of AdapterHub's library `adapters`, written: adapter_config.json, adapter.safetensors, head files.

What a method's arrays are called there its module says in ``ADAPTERHUB`` (`core.portable.Hub`), so a method of a
user's own file is written too. Keys are "<module>.adapters.<name>.<tensor>", in torch's layout (`hub_slots`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tunejax.core import errors, operators, paths, portable
from tunejax.core.method import SHARED
from tunejax.core.paths import Params
from tunejax.interop import hub_config, hub_slots, modules, tensors
from tunejax.interop.found import CONFIG
from tunejax.interop.hub_slots import PLACES, Slot
from tunejax.interop.modules import Site
from tunejax.interop.peft import HEADS, Tuned, links
from tunejax.methods import registry
from tunejax.models.config import ModelConfig
from tunejax.models.families import registry as families

NAME = "tunejax"
"""Of the adapter, in every key."""
BY_SITE = ("targets", "layers", "width", "reduction_factor", "drop_first", "drop_random")
"""Arguments that the tensors answer, or that matter in training only: parts of one adapter may differ in them."""


def write(folder: Path, tuned: Tuned, config: ModelConfig, *, head: str, base_name: str) -> None:
    """Writes an adapter that `load_adapter(folder, use_safetensors=True)` loads: the whole folder or nothing.

    Raises:
      ConfigError: the library has no such method or family, or no place for this combination; the folder holds
        something.
    """
    parts, whole = _parts(tuned)
    arrays, entries = _adapter(parts, paths.starts(tuned.method.cuts(config.num_layers)), config, head)
    values = _head(whole, tuned.base, config, head)
    written = families.get(config.family).write_config(config, head)
    about = {
        "hidden_size": config.embed_dim,
        "model_class": written["architectures"][0],
        "model_name": base_name,
        "model_type": config.family,
        "version": hub_slots.VERSION,
    }
    with tensors.whole_folder(folder) as new:
        tensors.write_arrays(new / hub_slots.WEIGHTS, arrays)
        if values:
            tensors.write_arrays(new / hub_slots.HEAD_WEIGHTS, values)
            labels = {k: written[k] for k in ("label2id",) if k in written}
            labels |= {"num_labels": config.num_labels} if labels else {}
            tensors.write_json(new / hub_slots.HEAD_CONFIG, {**about, **labels, "name": None, "config": None})
        tensors.write_json(new / CONFIG, {**about, "name": NAME, "config": entries})


class _Part(NamedTuple):
    """A method of the chain with a form there. sites, shared: what it trained, by path and by name."""

    name: str
    form: portable.Hub
    arguments: dict[str, Any]
    sites: Mapping[str, portable.Arrays]
    shared: portable.Arrays


def _parts(tuned: Tuned) -> tuple[list[_Part], dict[str, Any]]:
    """The chain's adapters, and the values by path that train whole."""
    adapters: list[_Part] = []
    whole: dict[str, Any] = {}
    for spec in tuned.specs:
        name, _, module = registry.resolved(spec)
        refused = portable.hub_of(module, name)
        if isinstance(refused, portable.NoForm):
            raise errors.ConfigError(f"AdapterHub has no exact form for {name}: {refused.why} ({hub_config.DETAILS})")
    for name, arguments, module, train, state in links(tuned, "AdapterHub"):
        form = portable.hub_of(module, name)
        if isinstance(form, portable.Hub):
            sites = {p: {k: np.asarray(x, np.float32) for k, x in arrays.items()} for p, arrays in train.items()}
            shared = sites.pop(SHARED, {})
            adapters.append(_Part(name, form, arguments, sites, shared))
        elif isinstance(train, Mapping) and all(operators.is_array(x) for x in train.values()) and not state:
            whole.update(train)
        else:
            raise errors.ConfigError(f"AdapterHub has no form for {name}; {hub_config.DETAILS}")
    if not adapters:
        raise errors.ConfigError(f"{tuned.method.name} has no adapter that AdapterHub knows; {hub_config.DETAILS}")
    return adapters, whole


def _adapter(
    parts: list[_Part], starts: dict[str, int], config: ModelConfig, head: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors by name, entries of the config) of adapters that differ in where they stand and in width alone."""
    first = parts[0]
    fixed = {k: v for k, v in first.arguments.items() if k not in BY_SITE}
    by_slot: dict[Slot, portable.Arrays] = {}
    for part in parts:
        if part.form != first.form or {k: v for k, v in part.arguments.items() if k not in BY_SITE} != fixed:
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
        for k, x in first.form.write(arrays).items()
    }
    if first.form.write_shared is not None:
        prefix = f"{hub_slots.base_prefix(config)}shared_parameters.{NAME}."
        out |= {prefix + k: x for k, x in first.form.write_shared(first.shared).items()}
    entries = hub_config.written(first.form, first.arguments, config)
    return out, entries | _standing(by_slot, first.form, config)


def _slots(part: _Part, starts: dict[str, int]) -> list[tuple[Slot, portable.Arrays]]:
    """The arrays of each layer of each site."""
    named = {path: place for place, path in PLACES.items()}
    out: list[tuple[Slot, portable.Arrays]] = []
    for path, arrays in part.sites.items():
        ours, first = modules.canonical(path, starts)
        if ours not in named:
            raise errors.ConfigError(
                f"AdapterHub has adapters after attention/o/kernel and mlp/down/kernel; {part.name} has one at {path}"
            )
        rows = next(iter(arrays.values())).shape[0]
        out += [(Slot(named[ours], first + i), {k: x[i] for k, x in arrays.items()}) for i in range(rows)]
    return out


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


def _head(whole: Mapping[str, Any], base: Params, config: ModelConfig, head: str) -> dict[str, np.ndarray]:
    """Tensors of the task's head, and of what trains whole where the library keeps it with the head."""
    flat = {**paths.flatten(base), **whole}
    places, inner = modules.places(config, head), hub_slots.base_prefix(config)
    out, wrong = {}, []
    for path, leaf in flat.items():
        always = any(paths.matches(g, path) for g in HEADS.get(head, ()))
        if leaf is None or not (always or path in whole):
            continue
        place = places.get(Site(path, modules.OUTSIDE))
        name = f"{place.module}.{place.name}" if place else inner
        if place is None or name.startswith(inner):
            wrong.append(path)
            continue
        out[name] = np.asarray(leaf, np.float32).T if place.transpose else np.asarray(leaf, np.float32)
    if wrong:
        raise errors.ConfigError(
            f"AdapterHub keeps an adapter and a head in a folder, and {wrong[0]}, which trains whole, is of neither"
        )
    return out
