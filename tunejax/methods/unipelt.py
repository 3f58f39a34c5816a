"""UniPELT, a preset: LoRA, prefix tuning and an adapter, each behind a gate (Mao et al., 2022, arXiv:2110.07577).

    y = h + G_L · x A B (queries, values)      attention over [G_P prefix, text]      y = h + G_A · adapter(h) (MLP)

Each G is a sigmoid of a trained linear map: of the kernel's input for LoRA, of the adapter's own input h, and of
attention's input for the prefix (section 3.2). LoRA's scale is the gate alone. Where this departs from the paper
(each token has its own gates, and how a prefix is gated) is said in ``gated``. AdapterHub's ``unipelt`` is this with
``per: row`` and ``positions: false``; its adapter reads the block's sum (``adapter_reads: sum``).
"""

from typing import Any

from tunejax.core import portable

ADAPTERHUB = portable.HubUnion("unipelt")


def unipelt(
    length: int = 10,
    rank: int = 8,
    width: int | None = None,
    reduction_factor: float = 16,
    targets: str | list[str] = "attention/{q,v}/kernel",
    layers: str | int | None = None,
    positions: bool = True,
    per: str = "token",
    adapter_reads: str = "branch",
) -> list[dict[str, Any]]:
    """Trains LoRA, a prefix and an adapter, each with a gate that learns when it is of use (arXiv:2110.07577).

    Args:
      length: of the prefix.
      rank: of LoRA's products.
      width: of the adapters; or
      reduction_factor: the outer width over this.
      targets: globs over the kernels that LoRA wraps.
      layers: only these layers of the stack, as a slice: "-2:".
      positions: of ``prefix_tuning``: whether the text's count on from ``length``.
      per: of ``gated``: a gate for each "token", or for each "row".
      adapter_reads: what the adapter and its gate read: the ``reads`` of ``pfeiffer``.

    Returns:
      descriptions of ``gated`` ``lora``, ``prefix_tuning`` and ``pfeiffer``, which say what is refused.
    """
    low_rank = {"name": "lora", "rank": rank, "alpha": float(rank), "targets": targets, "layers": layers}
    adapter = {
        "name": "pfeiffer",
        "width": width,
        "reduction_factor": reduction_factor,
        "layers": layers,
        "reads": adapter_reads,
    }
    prefix = {"name": "prefix_tuning", "length": length, "layers": layers, "positions": positions}
    return [
        {"name": "gated", "method": low_rank, "per": per},
        {"name": "gated", "method": prefix, "per": per},
        {"name": "gated", "method": adapter, "reads": "output", "per": per},
    ]  # fmt: skip
