"""Norm tuning: only the scales (and biases) of the norms train.

They alone go a long way: Zhao et al., 2024 (arXiv:2312.11420) for multimodal decoders; Houlsby et al., 2019
(arXiv:1902.00751) train them beside their adapters.
"""

from typing import Any

from tunejax.core import holes, paths, portable
from tunejax.core import method as methods
from tunejax.core.method import Method, Start
from tunejax.core.paths import Params

TARGETS = "*norm/*"
"""Every norm: of blocks, of queries and keys, of embeddings, the last one, that of a masked-LM head."""

ALIASES = {"layers_to_transform": "layers"}
"""What PEFT calls it -> what it is here."""

PEFT = portable.Whole("LN_TUNING", "ln_tuning_layers")


def norm_tuning(targets: str | list[str] = TARGETS, layers: str | int | None = None) -> Method:
    """Trains the scales and biases of norms (Zhao et al., arXiv:2312.11420).

    Args:
      targets: globs over them: "attention/norm/*" is those of attention.
      layers: only these layers of the stack, as a slice: "-2:". What lies outside the stack is then left out too.

    Raises (from init):
      TargetError: nothing matched, or a method before this one wraps what matched.
    """

    def init(key: Any, params: Params) -> Start:
        return holes.moved("norm_tuning", paths.select(params, targets, layers=layers).leaves)

    named = (targets,) if isinstance(targets, str) else tuple(targets)
    return methods.method(
        "norm_tuning", init, methods.fill, cuts=lambda depth: methods.layer_cuts(layers, depth), targets=named
    )
