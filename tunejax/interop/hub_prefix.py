"""Prefixes in AdapterHub's folders: keys and values of all layers in one tensor, or the network that makes them.

The library cannot save one as safetensors itself, since each layer's module names the same tensors once more
(".pool."). Here they are written once, and read whether or not they stand there again.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tunejax.core import activations, errors, portable
from tunejax.interop import found as found_lib
from tunejax.interop import hub_config, hub_part, hub_slots, modules
from tunejax.interop.found import Spec
from tunejax.interop.hub_part import NAME, Folder, Part, Written
from tunejax.interop.modules import Site
from tunejax.models.config import ModelConfig

SLOT, QUERY = "layers/attention/prefix", "layers/attention/q/kernel"
LOCATION = "self_prefix"
"""What the library calls the prefix of a model's own attention."""
DEFAULTS: dict[str, Any] = {
    "bottleneck_size": 512, "cross_prefix": True, "dropout": 0.0, "encoder_prefix": True, "flat": False,
    "init_weights_seed": None, "leave_out": [], "non_linearity": "tanh", "prefix_length": 30, "shared_gating": True,
    "use_gating": False,
}  # fmt: skip
"""Every entry of version 1.3.0, with what it is where a folder lacks it."""
PAIR = ("key", "value")


def write(parts: list[Part], starts: dict[str, int], config: ModelConfig, head: str) -> Written:
    """The tensors and the entries of prefixes, with their network where there is one that the library can have.

    Raises:
      ConfigError: a prefix that takes positions, parts that differ in length.
    """
    taking = [p.name for p in parts if p.arguments.get("positions", True)]
    if taking:
        raise errors.ConfigError(
            f"{taking[0]}: AdapterHub's prefix takes no positions: the text counts from 0 behind it, and here on from "
            f"the prefix's length; train with positions: false ({hub_config.DETAILS})"
        )
    gated = hub_part.same(parts, "kind of gate", [p.gates is not None for p in parts])
    pairs: dict[int, portable.Arrays] = {}
    gates: dict[int, portable.Arrays] = {}
    for part in parts:
        assert isinstance(part.form, portable.HubPrefix)
        pairs |= _layers(part.form.pairs(part.train), starts)
        gates |= _layers(part.gates or {}, starts)
    length = hub_part.same(parts, "length of a prefix", [len(x["key"]) for x in pairs.values()])
    tensors, entries = _network(parts, starts, config) or _flat(pairs)
    prefix = f"{hub_slots.base_prefix(config)}prefix_tuning.prefix_tunings.{NAME}.{LOCATION}."
    out = {prefix + k: x for k, x in tensors.items()}
    for layer, arrays in gates.items():
        module = f"{_attention(config, head, layer)}.prefix_tuning.prefix_gates.{NAME}."
        out |= {module + k.removeprefix("gate."): x for k, x in hub_part.gate_to_hub(arrays).items()}
    left_out = sorted(set(range(config.num_layers)) - set(pairs))
    chosen = {"prefix_length": length, "leave_out": left_out, "use_gating": gated}
    return out, {"architecture": "prefix_tuning", **DEFAULTS, **entries, **chosen}


def _layers(found: Mapping[str, portable.Arrays], starts: dict[str, int]) -> dict[int, portable.Arrays]:
    """Arrays by path, with the layers first -> those of each layer."""
    out: dict[int, portable.Arrays] = {}
    for path, arrays in found.items():
        first = modules.canonical(path, starts)[1]
        rows = {k: np.asarray(x, np.float32) for k, x in arrays.items()}
        out.update({first + i: {k: x[i] for k, x in rows.items()} for i in range(len(next(iter(rows.values()))))})
    return out


def _attention(config: ModelConfig, head: str, layer: int) -> str:
    """The module of attention that holds the query's."""
    return modules.places(config, head)[Site(QUERY, layer)].module.rpartition(".")[0]


def _flat(pairs: Mapping[int, portable.Arrays]) -> Written:
    """One long tensor in the order (position, layer, key or value, kv)."""
    stacked = np.stack([np.stack([pairs[i][k] for k in PAIR]) for i in sorted(pairs)])  # [layers, 2, length, kv]
    return {"control_trans": stacked.transpose(2, 0, 1, 3).reshape(-1)}, {"flat": True}


def _network(parts: list[Part], starts: dict[str, int], config: ModelConfig) -> Written | None:
    """The network, where there is one that all layers share. Rows narrower than the model are filled up with zeros."""
    form = parts[0].form
    made = form.network(parts[0].train) if isinstance(form, portable.HubPrefix) and len(parts) == 1 else None
    if made is None or made["shared"]["rows"].shape[1] > config.embed_dim:
        return None
    first = {k: np.asarray(x, np.float32) for k, x in made["shared"].items()}
    more = config.embed_dim - first["rows"].shape[1]
    first |= {"rows": np.pad(first["rows"], ((0, 0), (0, more))), "w": np.pad(first["w"], ((0, more), (0, 0)))}
    last = _layers({p: x for p, x in made.items() if p != "shared"}, starts)
    each = [(last[i][f"{k}_w"], last[i][f"{k}_b"]) for i in sorted(last) for k in PAIR]
    return {
        "wte.weight": first["rows"],
        "control_trans.0.weight": first["w"].T,
        "control_trans.0.bias": first["b"],
        "control_trans.2.weight": np.concatenate([w for w, _ in each], axis=1).T,
        "control_trans.2.bias": np.concatenate([b for _, b in each]),
    }, {"bottleneck_size": first["w"].shape[1]}


def read(folder: Folder, entries: Mapping[str, Any]) -> list[Spec]:
    """The methods that such entries and tensors are; the network is run and done with.

    Raises:
      CheckpointError: entries that are not known or have no exact form, missing tensors or ones that do not fit.
    """
    gating = entries.get("use_gating", False)
    given = hub_part.check(entries, DEFAULTS, {"shared_gating": True} if gating else {})
    config = folder.config
    layers = [i for i in range(config.num_layers) if i not in (given["leave_out"] or ())]
    rows = _rows(folder, given)
    wanted = (given["prefix_length"], len(layers), 2, config.num_kv_heads * config.head_dim)
    if rows.size != np.prod(wanted):
        raise errors.CheckpointError(
            f"{folder.file}: the prefix has {rows.size} entries; {given['prefix_length']} keys and values in "
            f"{len(layers)} layers of this model have {np.prod(wanted)}"
        )
    pairs = rows.reshape(wanted)
    sites = {Site(SLOT, i): {k: pairs[:, n, j] for j, k in enumerate(PAIR)} for n, i in enumerate(layers)}
    spec = {"name": hub_part.first(portable.HubPrefix)[0], "length": given["prefix_length"], "positions": False}
    specs = found_lib.by_layers(spec, sites, config.num_layers)
    specs = [({k: v for k, v in s.items() if k != "targets"}, some) for s, some in specs]
    if not gating:
        return specs
    gates = {}
    for layer in layers:
        module = _attention(config, folder.head, layer)
        tensors = {f"gate.{k}": x for k, x in folder.take("prefix_gates", module, module).items()}
        gates[Site(SLOT, layer)] = folder.gate(tensors, module)
    return hub_part.behind_gates(specs, gates, "input")


def _rows(folder: Folder, given: Mapping[str, Any]) -> np.ndarray:
    """Keys and values of all layers, in the order of `_flat`."""
    found = folder.take("prefix_tunings", "", f"a prefix of {folder.adapter}")
    tensors = {k.removeprefix(f"{LOCATION}."): x for k, x in found.items()}
    names = ["control_trans"] if given["flat"] else [
        "wte.weight", "control_trans.0.weight", "control_trans.0.bias", "control_trans.2.weight", "control_trans.2.bias"
    ]  # fmt: skip
    if set(tensors) != set(names):
        raise errors.CheckpointError(
            f"{folder.file}: expected {', '.join(names)} of the prefix {LOCATION}; found {', '.join(found)}"
        )
    if given["flat"]:
        return tensors["control_trans"]
    rows, w, b, w2, b2 = (tensors[k] for k in names)
    act = activations.named(hub_config.activation(str(given["non_linearity"]).lower(), folder.legacy))
    try:
        return np.asarray(act(jnp.asarray(rows @ w.T + b))) @ w2.T + b2
    except ValueError as e:
        raise errors.CheckpointError(f"{folder.file}: the prefix's network does not fit together: {e}") from None
