"""LoRA in AdapterHub's folders: written from what trained beside kernels of attention, and read.

Behind a gate the library leaves out the scale alpha / r, so it is multiplied into B.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tunejax.core import errors, portable
from tunejax.interop import found as found_lib
from tunejax.interop import hub_part, modules
from tunejax.interop.found import Spec
from tunejax.interop.hub_part import NAME, Folder, Part, Written
from tunejax.interop.modules import Site
from tunejax.models.config import ModelConfig

MATRICES = {"q": "layers/attention/q/kernel", "k": "layers/attention/k/kernel", "v": "layers/attention/v/kernel"}
"""What the library calls a matrix of attention -> its kernel."""
DEFAULTS: dict[str, Any] = {
    "alpha": 8, "attn_matrices": ["q", "v"], "composition_mode": "add", "dropout": 0.0, "dtype": None,
    "init_weights": "lora", "init_weights_seed": None, "intermediate_lora": False, "leave_out": [],
    "output_lora": False, "r": 8, "selfattn_lora": True, "use_dora": False, "use_gating": False, "vera_b": None,
    "vera_d": None,
}  # fmt: skip
"""Every entry of version 1.3.0, with what it is where a folder lacks it."""
FIXED = {k: DEFAULTS[k] for k in ("composition_mode", "dtype", "intermediate_lora", "output_lora", "selfattn_lora",
                                  "use_dora", "vera_b", "vera_d")}  # fmt: skip
"""What can be read one way only."""


def write(parts: list[Part], starts: dict[str, int], config: ModelConfig, head: str) -> Written:
    """The tensors and the entries of low-rank products.

    Raises:
      ConfigError: parts that differ in rank or scale, kernels that are none of `MATRICES` or not the same in all
        layers, a gate that reads what the kernel gives.
    """
    forms = [p.form for p in parts if isinstance(p.form, portable.HubProduct)]
    gated = hub_part.same(parts, "kind of gate", [p.gates is not None for p in parts])
    scale = hub_part.same(parts, "scale", [f.scale(p.arguments) for f, p in zip(forms, parts, strict=True)])
    by_layer: dict[int, dict[str, portable.Arrays]] = {}
    for part in parts:
        if gated and part.reads != "input":
            raise errors.ConfigError(f"AdapterHub's gate of {part.name} reads the kernel's input; set reads: input")
        for path in part.sites:
            _layers(by_layer, part, path, starts)
    matrices = hub_part.same(parts, "choice of matrices", [sorted(x) for x in by_layer.values()])
    arrays = [x for layer in by_layer.values() for x in layer.values()]
    rank = hub_part.same(parts, "rank", [x["a"].shape[1] for x in arrays])
    tensors: dict[str, np.ndarray] = {}
    for layer, some in by_layer.items():
        tensors |= _tensors(forms[0], some, modules.places(config, head), layer, scale if gated else 1.0)
    return tensors, {
        "architecture": "lora",
        **DEFAULTS,
        "r": rank,
        "alpha": rank if gated else _plain(scale * rank),
        "attn_matrices": [m for m in MATRICES if m in matrices],
        "dropout": float(parts[0].arguments.get("dropout", 0.0)),
        "leave_out": sorted(set(range(config.num_layers)) - set(by_layer)),
        "use_gating": gated,
    }


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _layers(by_layer: dict[int, dict[str, portable.Arrays]], part: Part, path: str, starts: dict[str, int]) -> None:
    """Adds the arrays of one kernel, with its gate's, to those of each layer."""
    named = {kernel: matrix for matrix, kernel in MATRICES.items()}
    ours, first = modules.canonical(path, starts)
    if ours not in named:
        raise errors.ConfigError(
            f"AdapterHub's LoRA is read and written beside the kernels of attention {{q,k,v}}; {part.name} has one at "
            f"{path}"
        )
    arrays = {**part.sites[path], **(part.gates[path] if part.gates else {})}
    for i in range(len(arrays["a"])):
        layer = by_layer.setdefault(first + i, {})
        if named[ours] in layer:
            raise errors.ConfigError(f"AdapterHub keeps one product at a kernel; two are at {path}")
        layer[named[ours]] = {k: x[i] for k, x in arrays.items()}


def _tensors(
    form: portable.HubProduct, some: Mapping[str, portable.Arrays], places: Any, layer: int, scale: float
) -> dict[str, np.ndarray]:
    """The tensors of one layer; kernels that a checkpoint keeps as one share theirs."""
    by_module: dict[str, list[portable.Arrays]] = {}
    for matrix in (m for m in MATRICES if m in some):
        by_module.setdefault(places[Site(MATRICES[matrix], layer)].module, []).append(some[matrix])
    out = {}
    for module, group in by_module.items():
        products = [{"a": x["a"], "b": scale * x["b"]} for x in group]
        made = form.write(form.fuse(products) if len(products) > 1 else products[0])
        gates = [hub_part.gate_to_hub(x) for x in group]
        made |= {k: np.concatenate([g[k] for g in gates]) for k in gates[0]}
        out.update({f"{module}.loras.{NAME}.{k}": x for k, x in made.items()})
    return out


def read(folder: Folder, entries: Mapping[str, Any]) -> list[Spec]:
    """The methods that such entries and tensors are.

    Raises:
      CheckpointError: entries that are not known or have no exact form, missing tensors or ones that do not fit.
    """
    given = hub_part.check(entries, DEFAULTS, FIXED)
    matrices = [m for m in MATRICES if m in given["attn_matrices"]]
    name, form = hub_part.first(portable.HubProduct)
    places, products, gates = modules.places(folder.config, folder.head), {}, {}
    for layer in range(folder.config.num_layers):
        if layer in (given["leave_out"] or ()):
            continue
        sites = [Site(MATRICES[m], layer) for m in matrices]
        by_module: dict[str, list[Site]] = {}
        for site in sites:
            by_module.setdefault(places[site].module, []).append(site)
        for module, group in by_module.items():
            made, opened = _module(folder, form, module, group, given["use_gating"])
            products.update(made)
            gates.update(opened)
    alpha = given["r"] if given["use_gating"] else given["alpha"]
    spec = {"name": name, "rank": given["r"], "alpha": float(alpha)}
    specs = found_lib.by_layers(spec, products, folder.config.num_layers)
    return hub_part.behind_gates(specs, gates, "input") if given["use_gating"] else specs


def _module(
    folder: Folder, form: portable.HubProduct, module: str, group: list[Site], gated: bool
) -> tuple[dict, dict]:
    """(products, gates) by site of one module there."""
    where = f"{module}.loras.{folder.adapter}"
    tensors, of = folder.take("loras", module, where), len(group)
    gates = [{k: tensors[k][i : i + 1] for k in hub_part.GATE if k in tensors} for i in range(of)] if gated else []
    whole = folder.exactly(form, tensors, where, hub_part.GATE if gated else ())
    try:
        products = [form.split(whole, i, of) if of > 1 else whole for i in range(of)]
    except ValueError as e:
        raise errors.CheckpointError(f"{folder.file}: {where} has no {e}; found {', '.join(tensors)}") from None
    opened = {site: folder.gate(gate, where) for site, gate in zip(group, gates, strict=False)}
    return dict(zip(group, products, strict=True)), opened
