"""Where AdapterHub's library `adapters` keeps things in each family's model, and what it calls them."""

import re
from typing import NamedTuple

from tunejax.core import errors
from tunejax.core.paths import Path
from tunejax.interop import modules
from tunejax.interop.modules import Site
from tunejax.models.config import ModelConfig
from tunejax.models.families import registry

WEIGHTS, HEAD_WEIGHTS, HEAD_CONFIG = "adapter.safetensors", "model_head.safetensors", "head_config.json"
"""Files beside adapter_config.json that the library writes with ``use_safetensors=True``."""
VERSION = "adapters.1.3.0"
PLACES: dict[str, Path] = {"mh_adapter": "layers/attention/o/kernel", "output_adapter": "layers/mlp/down/kernel"}
"""Entry of the config that asks for adapters there -> the last kernel of the branch."""
BESIDE = {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"}
FAMILIES: dict[str, dict[str, str]] = {"bert": {}, "gpt2": BESIDE, "llama": BESIDE, "mistral": BESIDE}
"""Family that the library has -> module of a layer, by place; where none is named, the one that holds the kernel."""
ENCODERS = ("bert",)
"""Those of them whose block ends with a norm."""


class Slot(NamedTuple):
    """A place of one layer. place: as in `PLACES`."""

    place: str
    layer: int

    @property
    def site(self) -> Site:
        """The kernel whose output is adapted there."""
        return Site(PLACES[self.place], self.layer)


def check(config: ModelConfig) -> None:
    """Raises ConfigError where the library has no such family."""
    if config.family not in FAMILIES:
        raise errors.ConfigError(
            f"AdapterHub's library ({VERSION}) has adapters for {', '.join(FAMILIES)}, and this model is a "
            f"{config.family}"
        )


def slots(config: ModelConfig, head: str) -> dict[Slot, str]:
    """The module that holds the adapters of each place of each layer.

    Raises:
      ConfigError: the library has no such family.
    """
    check(config)
    places = modules.places(config, head)
    named = FAMILIES[config.family]
    out = {}
    for layer in range(config.num_layers):
        holding = {place: places[Site(path, layer)].module for place, path in PLACES.items()}
        for place, module in holding.items():
            parts = module.split(".")
            above = parts[: parts.index(str(layer)) + 1]
            out[Slot(place, layer)] = ".".join([*above, named[place]] if place in named else parts[:-1])
    return out


def base_prefix(config: ModelConfig) -> str:
    """What names of the model's own tensors begin with, other than those of its head: "bert."."""
    return registry.get(config.family).prefixes[0]


KINDS = ("adapters", "loras", "prefix_gates", "prefix_tunings", "shared_parameters")
"""What stands before an adapter's name in the names of its tensors: the kind of what they are."""
OWN = ("prefix_gates", "prefix_tunings")
"""Kinds that have a module of their own between them and the module that they belong to."""
WHOLE = ("prefix_tunings", "shared_parameters")
"""Kinds that belong to the whole model, wherever they are named."""


class Key(NamedTuple):
    """A tensor's name taken apart. kind: of `KINDS`; module: that holds it, "" for the whole model's; end: the rest."""

    kind: str
    module: str
    end: str


def parse(name: str, adapter: str) -> Key | None:
    """The parts of a tensor's name, or None for what belongs to no adapter of that name."""
    found = re.fullmatch(rf"(?:(.*)\.)?({'|'.join(KINDS)})\.{re.escape(adapter)}\.(.*)", name)
    if not found:
        return None
    module, kind, end = found[1] or "", found[2], found[3]
    if kind in OWN:
        module = re.sub(r"(^|\.)prefix_tuning(\.pool)?$", "", module)
    return Key(kind, "" if kind in WHOLE else module, end)
