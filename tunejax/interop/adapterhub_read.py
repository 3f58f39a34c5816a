"""Adapter folders of AdapterHub's library `adapters`, read: into the methods of a config and the arrays they train."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tunejax.core import errors
from tunejax.interop import found as found_lib
from tunejax.interop import hub_bottleneck, hub_config, hub_prefix, hub_product, hub_slots, modules
from tunejax.interop.found import CONFIG, Found
from tunejax.interop.hub_part import Folder
from tunejax.interop.modules import Site
from tunejax.models.config import ModelConfig

HEADS = {"ForCausalLM": "lm", "LMHeadModel": "lm", "ForMaskedLM": "mlm", "ForSequenceClassification": "classification"}
"""How the name of a model's class ends -> the head that it has."""
TIED = "lm_head.weight"
"""Where a model's head is its table: that table once more, which the library does not train."""
PICKLES = {hub_slots.WEIGHTS: "pytorch_adapter.bin", hub_slots.HEAD_WEIGHTS: "pytorch_model_head.bin"}
BOTTLENECK = "bottleneck"
"""The architecture of a config that names none."""
READERS = {BOTTLENECK: hub_bottleneck.read, "prefix_tuning": hub_prefix.read, "lora": hub_product.read}
"""Architecture -> what reads it."""
ARCHITECTURES = {
    "prompt_tuning": "write it as a folder of HF PEFT, which is read",
    "reft": "it edits chosen positions of a text, and here every position is edited",
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
    members = _members(folder, dict(found["config"]))
    opened = _opened(folder, found, config, head)
    parts = [part for entries in members for part in READERS[_kind(entries)](opened, entries)]
    bottleneck = [e for e in members if _kind(e) == BOTTLENECK]
    shared = hub_bottleneck.shared(opened, bottleneck[0]) if bottleneck else {}
    _nothing_left(opened)
    values, num_labels = _head(folder, config, head)
    parts += found_lib.whole_specs("full", values, config)
    return Found([s for s, _ in parts], base_of(found), [arrays for _, arrays in parts], shared, num_labels)


def _kind(entries: Mapping[str, Any]) -> str:
    return str(entries.get("architecture") or BOTTLENECK)


def _members(folder: Path, entries: dict[str, Any]) -> list[dict[str, Any]]:
    """The configs of a union, or the one there is.

    Raises:
      CheckpointError: one of a kind that has no exact form here, or two of one kind.
    """
    members = list(entries.get("configs") or []) if _kind(entries) == "union" else [entries]
    for kind in map(_kind, members):
        if kind not in READERS:
            raise errors.CheckpointError(
                f"{folder / CONFIG}: architecture {kind!r} of AdapterHub has no exact form here"
                + (f": {ARCHITECTURES[kind]}" if kind in ARCHITECTURES else "")
                + f" ({hub_config.DETAILS})"
            )
    if len(set(map(_kind, members))) != len(members) or not members:
        raise errors.CheckpointError(
            f"{folder / CONFIG}: a union of {', '.join(map(_kind, members)) or 'nothing'}; one of each kind can be read"
        )
    return members


def _opened(folder: Path, found: Mapping[str, Any], config: ModelConfig, head: str) -> Folder:
    """The tensors of the folder by kind and module. Raises CheckpointError for one that is of neither."""
    try:
        hub_slots.check(config)
    except errors.ConfigError as e:
        raise errors.CheckpointError(str(e)) from None
    adapter, prefix = str(found.get("name")), hub_slots.base_prefix(config)
    kinds: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, array in _tensors(folder, hub_slots.WEIGHTS).items():
        key = hub_slots.parse(name, adapter) or hub_slots.Key("", name, "")
        module = key.module.removeprefix(prefix) if key.kind in hub_slots.KINDS else name
        # A prefix stands in the file once more for each layer, and is one all the same.
        kinds.setdefault(key.kind, {}).setdefault(module, {}).setdefault(key.end, array)
    return Folder(folder / hub_slots.WEIGHTS, config, head, adapter, kinds, "version" not in found)


def _nothing_left(folder: Folder) -> None:
    """Raises CheckpointError where no reader has taken some tensors."""
    left = [
        f"{module}.{kind}.{folder.adapter}.{end}" if kind else module
        for kind, modules_ in folder.tensors.items()
        for module, tensors in modules_.items()
        for end in tensors
    ]
    if left:
        known = [f"{m}.adapters.{folder.adapter}" for m in hub_slots.slots(folder.config, folder.head).values()]
        near = errors.nearest(left[0], known, 1)
        hint = f" The nearest place here is {near[0]!r}." if near else ""
        raise errors.CheckpointError(
            f"{folder.file}: {len(left)} tensors have no place in this {folder.config.family} model, such as "
            f"{left[0]!r}.{hint}"
        )


def _tensors(folder: Path, name: str) -> dict[str, np.ndarray]:
    if not (folder / name).is_file() and (folder / PICKLES[name]).is_file():
        raise errors.CheckpointError(
            f"{folder} holds {PICKLES[name]} but no {name}. PyTorch's own files are pickles, which can run code when "
            "they are read, so only safetensors are. Convert it where you trust it: load it with `adapters`, then "
            "save_adapter(..., use_safetensors=True). The library cannot save a prefix so: docs/adapterhub.md has how"
        )
    return found_lib.tensors(folder / name)


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
