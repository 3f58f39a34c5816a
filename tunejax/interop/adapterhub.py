"""Adapter folders of AdapterHub's library `adapters`, written: adapter_config.json, adapter.safetensors, head files.

What a method's arrays are called there its module says in ``ADAPTERHUB`` (`core.portable.Hub`), so a method of a
user's own file is written too. Keys are "<module>.adapters.<name>.<tensor>", in torch's layout (`hub_slots`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tunejax.core import errors, paths, portable
from tunejax.core.paths import Params
from tunejax.interop import hub_bottleneck, hub_part, hub_prefix, hub_product, hub_slots, modules, tensors
from tunejax.interop.found import CONFIG
from tunejax.interop.hub_part import NAME, Part, Written
from tunejax.interop.modules import Site
from tunejax.interop.peft import HEADS, Tuned
from tunejax.models.config import ModelConfig
from tunejax.models.families import registry as families

WRITERS = {
    portable.HubPrefix: hub_prefix.write,
    portable.Hub: hub_bottleneck.write,
    portable.HubProduct: hub_product.write,
}
"""Form of a method -> what writes all of that form, in the order in which the library lists them."""


def write(folder: Path, tuned: Tuned, config: ModelConfig, *, head: str, base_name: str) -> None:
    """Writes an adapter that `load_adapter(folder, use_safetensors=True)` loads: the whole folder or nothing.

    Raises:
      ConfigError: the library has no such method or family, or no place for this combination; the folder holds
        something.
    """
    hub_slots.check(config)
    parts, whole = hub_part.of(tuned)
    arrays, entries = _adapters(parts, paths.starts(tuned.method.cuts(config.num_layers)), config, head)
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


def _adapters(parts: list[Part], starts: dict[str, int], config: ModelConfig, head: str) -> Written:
    """The tensors and the config of all adapters: a union where they are of several kinds."""
    kinds = {write: [p for p in parts if isinstance(p.form, form)] for form, write in WRITERS.items()}
    made = [write(some, starts, config, head) for write, some in kinds.items() if some]
    tensors = {k: x for some, _ in made for k, x in some.items()}
    configs = [entries for _, entries in made]
    return tensors, configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}


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
