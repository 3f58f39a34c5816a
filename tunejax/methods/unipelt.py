"""UniPELT, a preset: LoRA, prefix tuning and an adapter, each behind a gate (Mao et al., 2022, arXiv:2110.07577).

    y = h + G_L · x A B (queries, values)      attention over [G_P prefix, text]      y = h + G_A · adapter(h) (MLP)

Each G is a sigmoid of a trained linear map: of the kernel's input for LoRA, of the adapter's own input h, and of
attention's input for the prefix (section 3.2). LoRA's scale is the gate alone. Where this departs from the paper
(each token has its own gates, and how a prefix is gated) is said in ``gated``.
"""

from typing import Any

from tunejax.core import portable

ADAPTERHUB = portable.NoForm("its gates are means over all tokens of a row, and each token has its own here")


def unipelt(
    length: int = 10,
    rank: int = 8,
    width: int | None = None,
    reduction_factor: float = 16,
    targets: str | list[str] = "attention/{q,v}/kernel",
    layers: str | int | None = None,
) -> list[dict[str, Any]]:
    """Trains LoRA, a prefix and an adapter, each with a gate that learns when it is of use (arXiv:2110.07577).

    Args:
      length: of the prefix.
      rank: of LoRA's products.
      width: of the adapters; or
      reduction_factor: the outer width over this.
      targets: globs over the kernels that LoRA wraps.
      layers: only these layers of the stack, as a slice: "-2:".

    Returns:
      descriptions of ``gated`` ``lora``, ``prefix_tuning`` and ``pfeiffer``, which say what is refused.
    """
    low_rank = {"name": "lora", "rank": rank, "alpha": float(rank), "targets": targets, "layers": layers}
    adapter = {"name": "pfeiffer", "width": width, "reduction_factor": reduction_factor, "layers": layers}
    return [
        {"name": "gated", "method": low_rank},
        {"name": "gated", "method": {"name": "prefix_tuning", "length": length, "layers": layers}},
        {"name": "gated", "method": adapter, "reads": "output"},
    ]
