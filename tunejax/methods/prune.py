"""Gradual magnitude pruning of single weights (Zhu and Gupta, 2017, arXiv:1710.01878), also in n:m patterns.

    y = x (M ∘ W)        M [in, out] keeps the greatest abs(W) of each layer's kernel, or n of every m along the input

Ever fewer are kept while the methods before it train (`core.gradual`). What is masked has no gradient and does not come
back. The arrays keep their shape, with zeros in them: 2:4 is what sparse tensor cores take (arXiv:2104.08378), and
nothing here is faster by it.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, gradual, operators, paths
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params

ALIASES = {"begin_step": "begin", "frequency": "every", "target_modules": "targets", "prune_n_m": "pattern"}
"""What other pruning tools call it -> what it is here."""

SCHEDULES = ("cubic", "one_shot")


@operators.operator
class Sparse(operators.Above):
    """x (mask ∘ base): base is an operator that stands for a kernel [..., in, out]; mask bool of its shape."""

    base: Any
    mask: jax.Array

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        bias = None if bias is None else operators.dense_bias(self.base, bias)
        return operators.apply(self.dense(), x, bias)

    def dense(self) -> jax.Array:
        """mask ∘ base."""
        kernel = operators.dense(self.base)
        return jnp.where(self.mask, kernel, jnp.zeros_like(kernel))


def prune(
    targets: str | list[str] = "/layers/**/kernel",
    density: float | None = None,
    pattern: str | None = None,
    steps: int = 1000,
    begin: int = 0,
    every: int = 10,
    schedule: str = "cubic",
    layers: str | int | None = None,
) -> Method:
    """Masks ever more of the smallest weights while the methods before it train.

    Args:
      targets: globs over kernels.
      density: part of each layer's kernel that is kept; a half unless told.
      pattern: "2:4" and the like, instead of a density: n of every m along the input.
      steps: updates from the first mask to the last.
      begin: updates before it.
      every: updates between masks.
      schedule: cubic or one_shot.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: an argument out of range; from init: an input that is no multiple of m.
      TargetError (from init): nothing matched, or what matched is no kernel, or an adapter that is none stands there.
    """
    plan = gradual.Plan(schedule, steps, begin, every)
    n, m = _pattern(pattern)
    problems = plan.problems(SCHEDULES)
    if density is not None and (pattern is not None or not 0 < density <= 1):
        problems.append(f"density is {density}; it must lie in (0, 1], and stands instead of a pattern")
    if problems:
        raise errors.ConfigError("prune: " + "; ".join(problems))

    def init(key: Any, params: Params) -> Start:
        kernels = paths.select(params, targets, layers=layers).leaves
        paths.check_kernels("prune", kernels)
        for path, kernel in kernels.items():
            _check_dense(path, kernel)
            if kernel.shape[-2] % m:
                raise errors.ConfigError(
                    f"prune: pattern {pattern!r} does not divide the input of {path}, {kernel.shape[-2]}"
                )
        kept = {path: jnp.ones(kernel.shape, bool) for path, kernel in kernels.items()}
        return Start(state={"updates": jnp.zeros((), jnp.int32), "kept": kept})

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        def sparse(path: str, mask: jax.Array) -> Any:
            made = Sparse(paths.get(params, path), mask)
            return made if operators.is_operator(made.base) else made.dense()

        return paths.replace(params, {path: sparse(path, mask) for path, mask in state["kept"].items()})

    def update(train: Any, state: Any, grads: Any, ctx: Context) -> Any:
        if ctx.params is None:
            raise errors.ConfigError("prune needs the parameters of the step, which its caller does not give")
        bound, updates = ctx.params, state["updates"] + 1
        left = plan.left(updates)[0]

        def anew() -> dict[str, jax.Array]:
            params = bound()
            kernels = {path: jnp.abs(operators.dense(paths.get(params, path))) for path in state["kept"]}
            return {path: _greatest(kernel, density or 0.5, n, m, left) for path, kernel in kernels.items()}

        return {"updates": updates, "kept": jax.lax.cond(plan.moves(updates), anew, lambda: state["kept"])}

    named = (targets,) if isinstance(targets, str) else tuple(targets)
    return methods.method(
        "prune", init, bind, update=update, cuts=lambda depth: methods.layer_cuts(layers, depth), targets=named,
        updates=plan.ends,
    )  # fmt: skip


def _check_dense(path: str, kernel: Any) -> None:
    """Raises TargetError where what stands at ``path`` has no entries that could be masked."""
    try:
        jax.eval_shape(operators.dense, kernel)
    except errors.NotLinear:
        raise errors.TargetError(
            f"prune targets {path}, and what a method before it put there is no kernel; target other kernels"
        ) from None


def _pattern(text: str | None) -> tuple[int, int]:
    """(n, m) of "n:m"; (1, 1) without one."""
    found = re.fullmatch(r"(\d+):(\d+)", text) if text else None
    n, m = (int(found[1]), int(found[2])) if found else (1, 1)
    if (text and not found) or not 1 <= n <= m:
        raise errors.ConfigError(f"prune: pattern is {text!r}; it is n:m with n of every m kept, such as '2:4'")
    return n, m


def _greatest(scores: jax.Array, density: float, n: int, m: int, left: jax.Array) -> jax.Array:
    """Bool of the scores' shape [..., in, out]: what is kept of each kernel, or of every m along its input."""
    *lead, fan_in, fan_out = scores.shape
    if m > 1:
        groups = jnp.swapaxes(scores.reshape(*lead, fan_in // m, m, fan_out), -1, -2)
        kept = gradual.greatest(groups, gradual.count(m, n, left))
        return jnp.swapaxes(kept, -1, -2).reshape(scores.shape)
    size = fan_in * fan_out
    kept = gradual.greatest(scores.reshape(*lead, size), gradual.count(size, max(1, round(density * size)), left))
    return kept.reshape(scores.shape)
