"""The Mix-And-Match adapter, a preset (He et al., 2022, arXiv:2110.04366, section 4.6).

    attention:  h ← (1 - λ) h + λ softmax(x W_q P_kᵀ) P_v      prefix tuning with few positions
    MLP:        h ← h + s · relu(x W_down) W_up                 scaled parallel adapter (table 2)

The paper's finding is that attention needs little capacity and the MLP uses much of it. Its defaults stand here: 30
positions through an MLP of width 800, s = 4, and 512 of 1024 dimensions. The adapter's activation is the model's.
AdapterHub's ``mam`` is this with ``positions: false`` and ``reads: residual``, where the activation is ReLU.
"""

from typing import Any

from tunejax.core import errors, portable

ADAPTERHUB = portable.HubUnion("mam")

HIDDEN = 800
"""Width of the prefix's MLP, as in the paper."""


def mam(
    length: int = 30,
    project: bool = True,
    hidden: int | None = HIDDEN,
    width: int | None = None,
    reduction_factor: float = 2,
    scale: float = 4.0,
    layers: str | int | None = None,
    positions: bool = True,
    reads: str = "input",
) -> list[dict[str, Any]]:
    """Trains a short prefix in attention and a wide parallel adapter beside the MLP (arXiv:2110.04366).

    Args:
      length: positions of the prefix.
      project: make the prefix by an MLP,
      hidden: of this inner width.
      width: of the adapter; or
      reduction_factor: the outer width over this.
      scale: times what the adapter adds.
      layers: only these layers of the stack, as a slice: "-2:".
      positions: of ``prefix_tuning``: whether the text's count on from ``length``.
      reads: of ``parallel_adapter``: the MLP's "input", or the "residual".

    Raises:
      ConfigError: the width of an MLP that is not there.

    Returns:
      descriptions of ``prefix_tuning`` and ``parallel_adapter``, which say what is refused.
    """
    if not project and hidden not in (None, HIDDEN):
        raise errors.ConfigError(f"mam: hidden is {hidden}, the inner width of project: true; leave it out")
    inner = {"hidden": hidden} if project else {}
    return [
        {"name": "prefix_tuning", "length": length, "project": project, **inner, "layers": layers,
         "positions": positions},
        {"name": "parallel_adapter", "width": width, "reduction_factor": reduction_factor, "scale": scale,
         "layers": layers, "reads": reads},
    ]  # fmt: skip
