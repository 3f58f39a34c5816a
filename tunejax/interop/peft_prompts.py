"""Folders of HF PEFT that hold virtual tokens or a prefix: one matrix, named ``prompt_embeddings``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tunejax.core import errors, portable
from tunejax.interop import modules
from tunejax.interop.modules import Site
from tunejax.models.config import ModelConfig

KEY = "prompt_embeddings"
READ = {"PROMPT_TUNING": "prompt_tuning", "P_TUNING": "prompt_tuning", "PREFIX_TUNING": "prefix_tuning"}
"""peft_type -> the method that a folder is read as: the network that made the rows is not in it."""
Written = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Tensors by name, entries of adapter_config.json."""
TABLE, SLOT = "embed/table", "layers/attention/prefix"


class Sizes(NamedTuple):
    """What PEFT wants to know of the model. width: of a row; heads: that it falls into."""

    width: int
    heads: int
    layers: int


def sizes(config: ModelConfig, prefix: bool) -> Sizes:
    """Of a row of the embedding table, or of the keys of one layer."""
    if prefix:
        return Sizes(config.num_kv_heads * config.head_dim, config.num_kv_heads, config.num_layers)
    return Sizes(config.embed_dim, config.num_heads, config.num_layers)


def looks_up(settings: Mapping[str, Any]) -> bool:
    """Whether PEFT looks up the text itself, to put rows before it: always in the table that the base came with."""
    return settings["peft_type"] in READ and READ[settings["peft_type"]] == "prompt_tuning"


def write(name: str, form: portable.Prompt, arguments: Mapping[str, Any], train: Any, config: ModelConfig) -> Written:
    """The tensors and settings of a method that trains virtual tokens or a prefix.

    Raises:
      ConfigError: a prefix that some layers lack, an argument that PEFT has otherwise.
    """
    for argument, value in form.fixed.items():
        if arguments.get(argument, value) != value:
            raise errors.ConfigError(
                f"PEFT's {form.peft_type} is {name} with {argument}: {value!r}, and here it is {arguments[argument]!r}"
            )
    rows, of = np.asarray(form.rows(train), np.float32), sizes(config, form.prefix)
    wanted = of.layers * 2 * of.width if form.prefix else of.width
    if rows.shape[1] != wanted:
        raise errors.ConfigError(f"PEFT's {form.peft_type} has a prefix in every layer; {name} has it in some only")
    settings = {
        "peft_type": form.peft_type,
        "num_virtual_tokens": rows.shape[0],
        "token_dim": of.width,
        "num_attention_heads": of.heads,
        "num_layers": of.layers,
        "num_transformer_submodules": 1,
        **form.entries,
    }
    return {KEY: rows}, settings


def read(
    found: Mapping[str, Any], tensors: Mapping[str, np.ndarray], file: Path, config: ModelConfig
) -> tuple[dict[str, Any], dict[Site, dict[str, np.ndarray]]]:
    """(method's description, its arrays by site) of a folder whose peft_type is one of `READ`.

    Raises:
      CheckpointError: no matrix, or one that does not fit the model.
    """
    name = READ[found["peft_type"]]
    prefix = name == "prefix_tuning"
    of = sizes(config, prefix)
    wanted = of.layers * 2 * of.width if prefix else of.width
    rows = tensors.get(KEY)
    if rows is None or rows.ndim != 2 or rows.shape[1] != wanted:
        there = f"it holds {', '.join(tensors)}" if rows is None else f"its shape is {rows.shape}"
        raise errors.CheckpointError(f"{file}: expected {KEY} of shape (tokens, {wanted}) for this model; {there}")
    if found.get("num_transformer_submodules") not in (None, 1):
        raise errors.CheckpointError(f"{file}: models of several parts are not known here")
    spec = {"name": name, "length": rows.shape[0]}
    if not prefix:
        return spec, {Site(TABLE, modules.OUTSIDE): {"rows": rows}}
    pairs = rows.reshape(rows.shape[0], of.layers, 2, of.width)
    return spec, {
        Site(SLOT, layer): {"key": pairs[:, layer, 0], "value": pairs[:, layer, 1]} for layer in range(of.layers)
    }
