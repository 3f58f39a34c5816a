"""S4, a preset found by searching how to combine methods over layers (Chen et al., 2023, arXiv:2301.01821).

The stack is a spindle of four groups, more layers in the middle ones (here 1 : 2 : 2 : 1); every group trains, each by
methods of its own, and every layer has as many parameters as any other:

    group 1: adapter, LoRA      2: adapter, prefix      3: adapter, prefix, BitFit      4: prefix, BitFit, LoRA

With an adapter as wide as the prefix is long, and LoRA of half that rank on queries and values, each of the three has
2 · budget · embed_dim parameters a layer where there are as many key heads as query heads (that one number sets all
sizes is this file's choice). BitFit's biases come on top.
"""

from typing import Any

from tunejax.core import errors

FIRST, MIDDLE, LAST = "1/6", "1/2", "5/6"
"""Where the groups meet, as parts of the depth."""


def s4(
    budget: int = 16, alpha: float = 16.0, targets: str | list[str] = "attention/{q,v}/kernel"
) -> list[dict[str, Any]]:
    """Trains adapters, prefixes, biases and low-rank products, each in its part of the stack (arXiv:2301.01821).

    Args:
      budget: width of the adapters and length of the prefix; LoRA has half of it as rank.
      alpha: LoRA's product is scaled by alpha / rank.
      targets: globs over the kernels that LoRA wraps.

    Returns:
      descriptions of ``pfeiffer``, ``prefix_tuning``, ``bitfit`` and two of ``lora``, which say what is refused; a
      stack of fewer than four layers among it.

    Raises:
      ConfigError: a budget below 2.
    """
    if budget < 2:
        raise errors.ConfigError(f"s4: budget is {budget}; it must be at least 2, since LoRA's rank is half of it")
    low_rank = {"name": "lora", "rank": budget // 2, "alpha": alpha, "targets": targets}
    return [
        {**low_rank, "layers": f":{FIRST}"},
        {**low_rank, "layers": f"{LAST}:"},
        {"name": "pfeiffer", "width": budget, "layers": f":{LAST}"},
        {"name": "prefix_tuning", "length": budget, "layers": f"{FIRST}:"},
        {"name": "bitfit", "layers": f"{MIDDLE}:"},
    ]
