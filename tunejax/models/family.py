"""What a model family declares, once, for both directions between Hugging Face and here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tunejax.models.config import ModelConfig


class Tensor(NamedTuple):
    """One parameter here and where a checkpoint keeps it.

    ours:      path without the segment: "layers/attention/q/kernel" (stacked: one tensor a layer) or "embed/table".
    theirs:    tensor name; "{i}" is the layer: "model.layers.{i}.self_attn.q_proj.weight".
    transpose: torch's Linear stores [out, in]; kernels here are [in, out].
    part:      (index, of): ours is the index-th of ``of`` equal parts of theirs along its last axis as stored there
               (GPT-2's fused c_attn), before any transpose.
    optional:  a checkpoint may lack it (a bias, a head): then the slot stays None, or a fresh value is made (heads).
    """

    ours: str
    theirs: str
    transpose: bool = False
    part: tuple[int, int] = (0, 1)
    optional: bool = False


class Family(NamedTuple):
    """A family of pretrained models.

    model_type:  what ``config.json`` calls it.
    read_config: (contents of config.json) -> ModelConfig. Raises CheckpointError on a variant that is not supported.
    write_config: (ModelConfig, head) -> contents of config.json, so that transformers loads what is saved.
    tensors:     (ModelConfig, head) -> every tensor; head is "lm", "mlm", "classification" or "none".
    prefixes:    name prefixes that a checkpoint may or may not carry ("model.", "bert.", "transformer."): saved
                 with, read with or without.
    aliases:     (older ending, ending) of tensor names: a name that ends in the older one is read as if in the other.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig, str], dict[str, Any]]
    tensors: Callable[[ModelConfig, str], list[Tensor]]
    prefixes: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
