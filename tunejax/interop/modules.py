"""Which module of a Hugging Face model a path here belongs to, and back."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tunejax.core.paths import Path
from tunejax.models import family as families
from tunejax.models.config import ModelConfig
from tunejax.models.families import registry

OUTSIDE = -1
"""The layer of what lies outside the stack."""


class Place(NamedTuple):
    """A parameter there. module: "model.layers.3.self_attn.q_proj"; name: "weight"; part: as of `Tensor`."""

    module: str
    name: str
    transpose: bool
    part: tuple[int, int]


class Site(NamedTuple):
    """A parameter here. path: without its segment, "layers/attention/q/kernel"; layer: from 0, or `OUTSIDE`."""

    path: Path
    layer: int


def places(config: ModelConfig, head: str) -> dict[Site, Place]:
    """Every parameter of a model in both worlds."""
    out = {}
    for tensor in registry.get(config.family).tensors(config, head):
        layers = range(config.num_layers) if "{i}" in tensor.theirs else [OUTSIDE]
        out.update({Site(tensor.ours, i): _place(tensor, i) for i in layers})
    return out


def _place(tensor: families.Tensor, layer: int) -> Place:
    module, _, name = tensor.theirs.replace("{i}", str(layer)).rpartition(".")
    return Place(module, name, tensor.transpose, tensor.part)


def missing_biases(config: ModelConfig, head: str) -> set[Path]:
    """Biases of the stack that a model here may have (`bitfit` adds them) and Hugging Face's of this config has not."""
    listed = registry.get(config.family).tensors(config, head)
    return {t.ours for t in listed if t.optional and t.ours.startswith("layers/") and t.ours.endswith("/bias")}


def by_name(placed: Mapping[Site, Place]) -> dict[str, dict[Site, Place]]:
    """Parameters by their names there; several have one where a checkpoint keeps kernels as one."""
    out: dict[str, dict[Site, Place]] = {}
    for site, place in placed.items():
        out.setdefault(f"{place.module}.{place.name}", {})[site] = place
    return out


def taken(place: Place, array: np.ndarray) -> np.ndarray:
    """What a parameter there holds for the one here, as it is kept here."""
    i, of = place.part
    width = array.shape[-1] // of
    part = array[..., i * width : (i + 1) * width]
    return part.T if place.transpose else part


def tied_head(config: ModelConfig, head: str) -> str | None:
    """The module in Hugging Face's model whose weight is the embedding table's, or None."""
    if head == "mlm":
        return "cls.predictions.decoder"
    return "lm_head" if head == "lm" and config.tie_embeddings else None


def canonical(path: Path, starts: dict[str, int]) -> tuple[Path, int]:
    """("layers/attention/q/kernel", first layer) of "layers/1/attention/q/kernel"; (path, `OUTSIDE`) outside the stack.

    starts: of each segment, by its name.
    """
    if not path.startswith("layers/"):
        return path, OUTSIDE
    _, segment, rest = path.split("/", 2)
    return f"layers/{rest}", starts[segment]
