"""Scaled parallel adapters of the MLP (He et al., 2022, arXiv:2110.04366, table 2 and section 4.6).

    mlp(x) + scale · (f(x W_down + b_down) W_up + b_up)        W_up = b_up = 0 at the start

The adapter reads the MLP's own input, and two kernels stand between it and the sum. So the MLP is made wider instead:
what its first kernel gives is followed by x W_down + b_down, its own activation acts on all of it, and the operator at
its last kernel takes the added part out again. f is therefore the model's activation (the paper's is ReLU, that of
the models it tunes). In a gated MLP, act(x gate) * (x up), the part beside ``up`` is 1.

AdapterHub's (``par_bn``) reads what the block's branch is added to, which in a block whose norms come first is not yet
normed, and may stand beside attention too: ``reads: residual``, with an activation of its own (`core.joins`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import activations, bottleneck, errors, joins, operators, paths, portable
from tunejax.core import method as methods
from tunejax.core.bottleneck import Bottleneck
from tunejax.core.method import Context, Method
from tunejax.core.paths import Params

ALIASES = bottleneck.ALIASES
"""What AdapterHub calls it -> what it is here."""
ADAPTERHUB = portable.Hub(
    name="par_bn",
    write=bottleneck.to_hub,
    read=bottleneck.from_hub,
    flags={"phm_layer": False, "is_parallel": True},
    written={"init_weights": "mam_adapter"},
    meant=lambda given: {**given, "activation": _activation(given["reads"], given["activation"])},
    scaled=bottleneck.scaled,
)
READS = ("input", "residual")


@operators.operator
class Beside:
    """[base(x, bias), x down + down_bias], or [base(x, bias), 1] without ``down``.

    base: kernel [..., in, out], or an operator that stands for one. down [..., in, width]; down_bias [..., width].
    """

    base: Any
    down: jax.Array | None = None
    down_bias: jax.Array | None = None
    width: int = operators.static(default=1)

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out + width]."""
        out = operators.apply(self.base, x, bias)
        if self.down is None:
            return jnp.concatenate([out, jnp.ones((*out.shape[:-1], self.width), out.dtype)], axis=-1)
        return jnp.concatenate([out, operators.apply(self.down, x, self.down_bias)], axis=-1)

    def dense(self) -> jax.Array:
        """Raises NotLinear: the model has no room for a wider kernel."""
        raise errors.NotLinear("a parallel adapter widens the MLP, which no kernel of its shape does")

    def dense_bias(self, bias: jax.Array) -> jax.Array:
        """bias [..., out] -> [..., out + width]: the added part has its own, within."""
        own = operators.dense_bias(self.base, bias)
        return jnp.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, self.width)])

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out + width]."""
        return (*self.base.shape[:-1], self.base.shape[-1] + self.width)

    @property
    def dtype(self) -> Any:
        """Type of the base."""
        return self.base.dtype


@operators.operator
class Joined:
    """base(x1, bias) + scale · (x2 up + up_bias) for x = [x1, x2].

    base: kernel [..., in, out], or an operator that stands for one. up [..., width, out]; up_bias [..., out].
    """

    base: Any
    up: jax.Array
    up_bias: jax.Array
    scale: float = operators.static(default=1.0)

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in + width] -> [..., out]."""
        h, change = self.parts(x, bias)
        return h + change

    def parts(self, x: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """What the base gives, and what is added to it; each [..., out]."""
        x, inner = jnp.split(x, [self.base.shape[-2]], axis=-1)
        return operators.apply(self.base, x, bias), self.scale * operators.apply(self.up, inner, self.up_bias)

    def dense(self) -> jax.Array:
        """Raises NotLinear: the model has no room for a wider kernel."""
        raise errors.NotLinear("a parallel adapter widens the MLP, which no kernel of its shape does")

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in + width, out]."""
        *lead, fan_in, fan_out = self.base.shape
        return (*lead, fan_in + self.up.shape[-2], fan_out)

    @property
    def dtype(self) -> Any:
        """Type of the base."""
        return self.base.dtype


def parallel_adapter(
    targets: str | list[str] = "mlp/down/kernel",
    width: int | None = None,
    reduction_factor: float = 2,
    scale: float = 4.0,
    layers: str | int | None = None,
    reads: str = "input",
    activation: str | None = None,
) -> Method:
    """Trains one adapter a block beside the MLP.

    Args:
      targets: globs over the last kernels of MLPs; ``up``, and ``gate`` where there is one, lie beside them.
      width: of the bottleneck.
      reduction_factor: the outer width over this is the width where none is given.
      scale: times what the adapter adds.
      layers: only these layers of the stack, as a slice: "-2:".
      reads: "input", that of the MLP, or "residual"; see this module.
      activation: in the bottleneck, by name, where it reads the residual (ReLU by default); else it is the model's.

    Raises:
      ConfigError: a width or factor out of range; an unknown activation or ``reads``, or they do not go together.
      TargetError (from init): nothing matched, or what matched is no last kernel of an MLP (or, with the residual, of
        attention).
    """
    name = "parallel_adapter"
    bottleneck.width_of(name, 1, width, reduction_factor)
    if reads not in READS:
        raise errors.ConfigError(f"{name}: reads is {reads!r}. {errors.did_you_mean(reads, READS)}")
    if reads == "input" and activation is not None:
        raise errors.ConfigError(
            f"{name}: activation is {activation!r}, and an adapter that reads the input of the MLP has the MLP's own; "
            "leave it out, or set reads: residual"
        )
    act = _activation(reads, activation) or "relu"
    activations.named(act)

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        return bottleneck.arrays(key, kernel, bottleneck.width_of(name, kernel.shape[-1], width, reduction_factor))

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Joined | Bottleneck:
        if reads == "residual":
            return Bottleneck(kernel, **arrays, activation=act, scale=scale)
        return Joined(kernel, arrays["up"], arrays["up_bias"], scale=scale)

    made = methods.per_site(name, targets, new, wrap, layers=layers, axes=bottleneck.AXES)
    return joins.reading(made, reads) if reads == "residual" else _widened(made)


def _activation(reads: str, activation: str | None) -> str | None:
    """In the bottleneck; None: the model's."""
    return None if reads == "input" else activation or "relu"


def _widened(joined: Method) -> Method:
    """``joined``, whose operators stand at last kernels of MLPs, with the other end of each adapter before them."""

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        beside: dict[str, Any] = {}
        for path, arrays in train.items():
            place = path.removesuffix("/down/kernel")
            mlp = paths.get(params, place)
            first, *ones = ("gate", "up") if "gate" in mlp else ("up",)
            down, width = {k: arrays[k] for k in ("down", "down_bias")}, arrays["down"].shape[-1]
            beside[f"{place}/{first}/kernel"] = Beside(mlp[first]["kernel"], **down, width=width)
            beside.update({f"{place}/{o}/kernel": Beside(mlp[o]["kernel"], width=width) for o in ones})
        return paths.replace(joined.bind(params, train, state, ctx), beside)

    def init(key: Any, params: Params) -> methods.Start:
        start = joined.init(key, params)
        wrong = [p for p in start.train if not (p.endswith("/down/kernel") and "up" in _mlp(params, p))]
        if wrong:
            raise errors.TargetError(
                f"{joined.name} targets {wrong[0]}; give the last kernels of MLPs, as mlp/down/kernel"
            )
        return start

    return joined._replace(init=init, bind=bind)


def _mlp(params: Params, path: str) -> dict[str, Any]:
    return paths.get(params, path.removesuffix("/down/kernel"))
