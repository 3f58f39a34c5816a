"""What the families' declarations share: reading config.json with clear errors, and writing back what was not read."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunejax.core import errors
from tunejax.core.activations import HUGGING_FACE
from tunejax.models import rope
from tunejax.models.config import ModelConfig

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
LABELS = ("num_labels", "id2label", "label2id", "problem_type")


class Frozen(dict):
    """A dict of JSON values that can be hashed, so that `ModelConfig.extra` can."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def freeze(value: Any) -> Any:
    """A JSON value with its lists as tuples and its dicts `Frozen`; json.dumps writes it as it was."""
    if isinstance(value, Mapping):
        return Frozen({k: freeze(v) for k, v in value.items()})
    return tuple(map(freeze, value)) if isinstance(value, list | tuple) else value


class Reader:
    """config.json read key by key; what was not read becomes `ModelConfig.extra`.

    A key whose value is null counts as absent.
    """

    def __init__(self, contents: Mapping[str, Any], model_type: str) -> None:
        self.contents, self.model_type = contents, model_type
        self.seen = {"model_type", "architectures"}
        self.refuse("quantization_config", None, "load the checkpoint that it was quantised from")
        for key in EXPERTS:
            self.refuse(key, None, "mixtures of experts have no family here")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, or ``default``, which transformers takes too."""
        self.seen.add(key)
        value = self.contents.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value of ``key``. Raises CheckpointError where there is none."""
        value = self.get(key)
        if value is None:
            near = errors.did_you_mean(key, self.contents)
            raise errors.CheckpointError(f"config.json of a {self.model_type} model lacks {key!r}. {near}")
        return value

    def refuse(self, key: str, allowed: Any, why: str) -> None:
        """Raises CheckpointError where ``key`` is there with another value than ``allowed``."""
        value = self.contents.get(key)
        if value is not None and value != allowed:
            raise errors.CheckpointError(f"config.json: {key}={value!r} of a {self.model_type} model: {why}")

    def activation(self, key: str, default: str) -> str:
        """The activation's name here."""
        name = self.get(key, default)
        if name not in HUGGING_FACE:
            near = errors.did_you_mean(name, HUGGING_FACE)
            raise errors.CheckpointError(f"config.json: {key}={name!r} is not supported. {near}")
        return HUGGING_FACE[name]

    def rope(self, theta: float) -> dict[str, Any]:
        """`ModelConfig` fields rope_theta and rope_scaling, from ``rope_parameters`` or the two older keys."""
        self.refuse("partial_rotary_factor", 1.0, "rotating a part of a head only is not supported")
        found = dict(self.get("rope_parameters", self.get("rope_scaling", {})))
        theta = float(found.pop("rope_theta", self.get("rope_theta", theta)))
        self.seen.add("rope_scaling")
        rope.check(found)
        plain = found.get("rope_type", found.get("type", "default")) == "default"
        return {"rope_theta": theta, "rope_scaling": None if plain else tuple(sorted(freeze(found).items()))}

    def num_labels(self) -> int:
        """Labels of the classification head: 0 where the checkpoint never had one."""
        classifies = any("ForSequenceClassification" in a for a in self.contents.get("architectures") or ())
        labels = self.contents.get("id2label")
        return int(self.contents.get("num_labels") or len(labels or ()) or (2 if classifies else 0))

    def extra(self) -> tuple[tuple[str, Any], ...]:
        """The keys that were not read."""
        return tuple(sorted((k, freeze(v)) for k, v in self.contents.items() if k not in self.seen))


def name_of(activation: str, original: Any, table: Mapping[str, str] = HUGGING_FACE) -> str:
    """What config.json calls ``activation``: ``original`` where that means the same."""
    return original if table.get(original) == activation else next(k for k, v in table.items() if v == activation)


def all_or_none(config: ModelConfig) -> bool:
    """Whether attention has biases; config.json has one key for all. Raises CheckpointError where some lack it."""
    if len(set(config.attention_bias)) > 1:
        have = [k for k, bias in zip("qkvo", config.attention_bias, strict=True) if bias]
        raise errors.CheckpointError(
            f"attention: biases on {', '.join(have)} alone cannot be saved; attention_bias of a {config.family} "
            "config.json says yes or no for q, k, v and o together"
        )
    return config.attention_bias[0]


def with_labels(config: ModelConfig, labels: Sequence[str]) -> ModelConfig:
    """``config`` whose classes have these names, as config.json will say; as it is where they are not one a class."""
    if len(labels) != config.num_labels:
        return config
    return with_extra(config, id2label=Frozen({str(i): name for i, name in enumerate(labels)}))


def with_extra(config: ModelConfig, **values: Any) -> ModelConfig:
    """``config`` whose config.json will have these values of keys that no model here reads."""
    return dataclasses.replace(config, extra=tuple(sorted({**dict(config.extra), **values}.items())))


def labels_of(config: ModelConfig) -> tuple[str, ...]:
    """The names of the classes in a checkpoint's config.json; empty where it has none."""
    found = dict(config.extra).get("id2label")
    if not isinstance(found, Mapping) or not all(str(i).isdigit() for i in found):
        return ()
    return tuple(str(found[i]) for i in sorted(found, key=int))


def class_names(config: ModelConfig) -> tuple[str, ...]:
    """A name for each class: those of config.json, or, where these are not one a class, `unnamed`."""
    found = labels_of(config)
    if len(found) == len(set(found)) == config.num_labels:
        return found
    return unnamed(config.num_labels)


def unnamed(count: int) -> tuple[str, ...]:
    """What transformers calls so many classes that have no names."""
    return tuple(f"LABEL_{i}" for i in range(count))


def written(
    extra: Iterable[tuple[str, Any]], model_type: str, architecture: str, num_labels: int, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of config.json: what was read and never used, under what the model is now."""
    out = {k: v for k, v in extra if k not in LABELS}
    if "dtype" not in out:
        out.setdefault("torch_dtype", "float32")
    layers = next((fields[k] for k in ("num_hidden_layers", "n_layer") if k in fields), 0)
    if len(out.get("layer_types") or ()) != layers:
        out.pop("layer_types", None)
    if num_labels:
        kept = dict(extra).get("id2label") or {}
        names = kept if len(kept) == num_labels else {str(i): name for i, name in enumerate(unnamed(num_labels))}
        out["id2label"] = dict(names)
        out["label2id"] = {name: int(i) for i, name in names.items()}
        if "problem_type" in dict(extra):
            out["problem_type"] = dict(extra)["problem_type"]
    return {"architectures": [architecture], "model_type": model_type, **out, **fields}
