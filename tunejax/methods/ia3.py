"""(IA)^3: learned vectors that scale keys, values and the inner activations of the MLP (Liu et al., 2022,
arXiv:2205.05638, section 3.3).

    k' = l_k * k,   v' = l_v * v,   mlp(x) = (l_ff * act(x W_1)) W_2        every l = 1 at the start

Linear, so it merges: a scaled output scales the columns of its kernel and its bias, a scaled input the rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, operators, paths, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params

TARGETS = ["attention/{k,v}/kernel", "mlp/down/kernel"]
"""Where the paper puts its vectors."""

ALIASES = {"target_modules": "targets", "feedforward_modules": "feedforward", "layers_to_transform": "layers"}
"""What PEFT calls it -> what it is here."""


def _fuse(
    parts: Sequence[portable.Arrays | None], widths: Sequence[int], arguments: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Outputs side by side; a part without a vector has ones. Raises ConfigError where inputs are scaled."""
    if any(p is not None and "after" not in p for p in parts):
        raise errors.ConfigError("ia3: PEFT scales the input of a module once, not that of a part of it")
    ones = (np.ones(w, np.float32) if p is None else p["after"] for p, w in zip(parts, widths, strict=True))
    return {"after": np.concatenate(list(ones))}, {}


def _split(arrays: portable.Arrays, i: int, of: int) -> dict[str, np.ndarray]:
    return {k: np.split(x, of)[i] if k == "after" else x for k, x in arrays.items()}


PEFT = portable.Form(
    "IA3",
    write=lambda arrays: {"ia3_l": arrays["before"][None] if "before" in arrays else arrays["after"][:, None]},
    read=lambda tensors, _: {"before" if tensors["ia3_l"].shape[0] == 1 else "after": tensors["ia3_l"].ravel()},
    ignored=frozenset({"feedforward_modules", "init_ia3_weights"}),
    written=lambda arguments, _: {k: v for k, v in arguments.items() if k != "feedforward"},
    found=lambda arrays: {"feedforward": ["/**"] if "before" in arrays else []},
    settings=lambda modules: {"feedforward_modules": [m for m, arrays in modules.items() if "before" in arrays]},
    fuse=_fuse,
    split=_split,
)


@operators.operator
class Scaled(operators.Above):
    """after * base(before * x, bias).

    base: kernel [..., in, out], or an operator that stands for one. before [..., in]; after [..., out]; None is 1.
    """

    base: Any
    before: jax.Array | None = None
    after: jax.Array | None = None

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        out = operators.apply(self.base, x if self.before is None else x * self.before.astype(x.dtype), bias)
        return out if self.after is None else out * self.after.astype(x.dtype)

    def dense(self) -> jax.Array:
        """diag(before) base diag(after), rounded once to the type of the base."""
        out = operators.dense(self.base).astype(jnp.float32)
        out = out if self.before is None else self.before[..., :, None] * out
        out = out if self.after is None else out * self.after[..., None, :]
        return out.astype(self.dtype)

    def dense_bias(self, bias: jax.Array) -> jax.Array:
        """after * bias [..., out], in the type of the bias."""
        inner = operators.dense_bias(self.base, bias)
        return inner if self.after is None else (self.after * inner.astype(jnp.float32)).astype(bias.dtype)


def ia3(
    targets: str | list[str] = TARGETS,
    feedforward: str | list[str] | None = None,
    layers: str | int | None = None,
) -> Method:
    """Trains one scaling vector for each targeted kernel: of its output, or of its input where it is ``feedforward``.

    Args:
      targets: globs over kernels.
      feedforward: globs over those of them whose input is scaled; unless told, the MLP's down kernels.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises (from init):
      TargetError: nothing matched, what matched is no kernel, or ``feedforward`` names what is no target.
    """
    asked = [feedforward] if isinstance(feedforward, str) else feedforward
    inputs = ["mlp/down/kernel"] if asked is None else asked

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, fan_in, fan_out = kernel.shape
        return {"before": jnp.ones((*lead, fan_in), jnp.float32), "after": jnp.ones((*lead, fan_out), jnp.float32)}

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Scaled:
        return Scaled(kernel, **arrays)

    axes = {"before": ("in",), "after": ("out",)}
    both = methods.per_site("ia3", targets, new, wrap, layers=layers, axes=axes)

    def init(key: Any, params: Params) -> Start:
        sites = both.init(key, params).train
        for glob in asked or ():
            if not any(paths.matches(glob, p) for p in sites):
                raise errors.TargetError(
                    f"ia3: feedforward {glob!r} matches none of the targets. {errors.did_you_mean(glob, sites)}"
                )
        scaled = {p: "before" if any(paths.matches(g, p) for g in inputs) else "after" for p in sites}
        return Start(train={p: {scaled[p]: arrays[scaled[p]]} for p, arrays in sites.items()})

    return both._replace(init=init)
