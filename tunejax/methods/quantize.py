"""A frozen base in 8 or 4 bits: what QLoRA tunes above (Dettmers et al., 2023, arXiv:2305.14314).

The base is rewritten once (`core.quantized`), and a method after this one wraps what it finds:
``[{name: quantize}, {name: lora}]`` is QLoRA. Unlike other methods it is not the identity at its start: rounding
changes the model.
"""

from typing import Any

from tunejax.core import holes, quantized
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params


def quantize(
    kind: str = "nf4",
    targets: str | list[str] = "/layers/**/kernel",
    block_size: int = 64,
) -> Method:
    """Rounds kernels of the base; trains nothing.

    Args:
      kind: "nf4", "int4" or "int8".
      targets: globs over kernels; every linear layer of the stack unless told.
      block_size: inputs that share a scale, at most: the greatest divisor of a kernel's inputs up to it is taken.

    Raises:
      ConfigError: an unknown kind, a block size below 1.
      TargetError (from init): nothing matched, what matched is no kernel, or a method before this one wraps it.
    """
    quantized.check("quantize", kind, block_size)

    def init(key: Any, params: Params) -> Start:
        sites = holes.kernels("quantize", params, targets)
        return Start(edits={p: quantized.encoded(kind, kernel, block_size) for p, kernel in sites.items()})

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        return params

    named = (targets,) if isinstance(targets, str) else tuple(targets)
    return methods.method("quantize", init, bind, targets=named)
