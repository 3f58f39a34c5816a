"""LoRA: a trained low-rank product beside a frozen kernel (Hu et al., 2022, arXiv:2106.09685).

    y = x W + scale · (x A) B        A [in, rank], B [rank, out] = 0 at the start

Here too are its relatives that differ by what trains and how fast: LoRA-FA (Zhang et al., 2023, arXiv:2308.03303)
freezes A as it was drawn, so the input need not be kept for a gradient of A; LoRA+ (Hayou et al., 2024,
arXiv:2402.12354) trains B at a higher learning rate than A.
"""

from typing import Any

from tunejax.core import errors, low_rank
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Site

ALIASES = {**low_rank.ALIASES, "loraplus_lr_ratio": "ratio"}
"""What PEFT calls it -> what it is here."""

PEFT, PRODUCT = low_rank.PEFT, low_rank.PRODUCT
ADAPTERHUB = {"lora": low_rank.HUB, "lora_plus": low_rank.HUB}


def lora(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    layers: str | int | None = None,
) -> Method:
    """Trains low-rank products beside frozen kernels.

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      rank: inner width r.
      alpha: the product is scaled by alpha / rank,
      rslora: or by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).
      dropout: rate on the input of A while training.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: rank below 1, dropout outside [0, 1).
      TargetError (from init): nothing matched, or what matched is no kernel.
    """
    return _method("lora", targets, rank, alpha, dropout, rslora, layers)


def lora_fa(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    layers: str | int | None = None,
) -> Method:
    """LoRA whose A stays as it was drawn: it lies in ``state``, and B alone trains (arXiv:2308.03303).

    Arguments are those of `lora`.

    Raises:
      ConfigError, TargetError: as `lora`.
    """
    return _method("lora_fa", targets, rank, alpha, dropout, rslora, layers, frozen=("a",))


def lora_plus(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    layers: str | int | None = None,
    ratio: float = 16.0,
) -> Method:
    """LoRA whose B has ``ratio`` times the learning rate (arXiv:2402.12354).

    The other arguments are those of `lora`.

    Raises:
      ConfigError: a ratio that is not positive; otherwise as `lora`.
    """
    if ratio <= 0:
        raise errors.ConfigError(f"lora_plus: ratio is {ratio}; it must be positive (the paper takes 16)")
    return _method("lora_plus", targets, rank, alpha, dropout, rslora, layers, rates={"b": ratio})


def _method(
    name: str,
    targets: str | list[str],
    rank: int,
    alpha: float,
    dropout: float,
    rslora: bool,
    layers: str | int | None,
    frozen: tuple[str, ...] = (),
    rates: dict[str, float] | None = None,
) -> Method:
    low_rank.check(name, rank, dropout, alpha)
    scale = low_rank.scale_of(alpha, rank, rslora)

    def new(key: Any, kernel: Any) -> Site:
        drawn = low_rank.factors(key, kernel, rank)
        return Site(
            {k: x for k, x in drawn.items() if k not in frozen}, {k: x for k, x in drawn.items() if k in frozen}
        )

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> low_rank.LowRank:
        return low_rank.beside(kernel, arrays["a"], arrays["b"], ctx, scale, dropout)

    return methods.per_site(name, targets, new, wrap, layers=layers, axes=low_rank.AXES, rates=rates)
