"""A learned gate on what another method adds (the mechanism of UniPELT: Mao et al., 2022, arXiv:2110.07577, section 3).

    y = h + σ(r · g + c) · change        h: what stood there gives; change: what the method adds; g = c = 0 at the start

r is the input or the output of the kernel. The gate is one number a token and site, so it may stand in packed rows and
causal models. A prefix is gated where it is read: σ multiplies the weight of its keys in the softmax, so that a closed
gate is attention without a prefix. (The paper multiplies the keys and values themselves, and a closed gate leaves keys
of zero in the softmax; its released code takes the mean of a gate over all tokens of a row, later ones too.)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, operators, paths, portable, prompts
from tunejax.core import method as methods
from tunejax.core.method import Axes, Context, Method, Start
from tunejax.core.paths import Params, Path

READS = ("input", "output")
ADAPTERHUB = portable.NoForm("its gates are means over all tokens of a row, and each token has its own here")


@operators.operator
class Gated(operators.Above):
    """h + σ(r · gate + gate_bias) · change for (h, change) = inner.parts(x, bias), and r = x or h.

    inner: an operator with ``parts``. gate [..., in] or [..., out]; gate_bias [...].
    """

    inner: Any
    gate: jax.Array
    gate_bias: jax.Array
    reads: str = operators.static(default="input")

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        h, change = self.inner.parts(x, bias)
        read = x if self.reads == "input" else h
        weight = jax.nn.sigmoid(read.astype(jnp.float32) @ self.gate + self.gate_bias)
        return h + weight[..., None].astype(change.dtype) * change

    def dense(self) -> jax.Array:
        """Raises NotLinear: the gate depends on the input."""
        raise errors.NotLinear("a gate that reads its input is no kernel; serve it unmerged")


def gated(method: Method, reads: str = "input") -> Method:
    """Trains a method and, at each of its sites, a gate that weighs what it adds (arXiv:2110.07577).

    Args:
      method: a single method that adds to what kernels give (LoRA, adapters), or fills the prefix of attention.
      reads: "input" or "output" of the kernel; for a prefix, attention's input whatever is said.

    Raises:
      ConfigError: reads is neither; a chain.
      TargetError (from init): nothing that the method does can be gated.
    """
    if reads not in READS:
        raise errors.ConfigError(f"gated: reads is {reads!r}. {errors.did_you_mean(reads, READS)}")
    if method.parts:
        raise errors.ConfigError(f"gated: {method.name} is a chain; gate each of its methods by itself")

    def init(key: Any, params: Params) -> Start:
        start = method.init(key, params)
        base = methods.apply_edits(params, start.edits)
        sizes = _sizes(base, method.bind(base, start.train, start.state, Context()), reads)
        if not sizes:
            raise errors.TargetError(f"gated: {method.name} adds nothing to kernels or prefixes that could be gated")
        gates = {p: {"gate": jnp.zeros(s), "gate_bias": jnp.zeros(s[:-1])} for p, s in sizes.items()}
        return start._replace(train={"method": start.train, "gates": gates})

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        bound = method.bind(params, train["method"], state, ctx)
        return paths.replace(bound, {p: _gate(paths.get(bound, p), a, reads) for p, a in train["gates"].items()})

    def axes(model_axes: Mapping[Path, Axes], train: Any) -> Any:
        gates = {p: {n: _lead(model_axes.get(p), x) for n, x in a.items()} for p, a in train["gates"].items()}
        return {"method": method.axes(model_axes, train["method"]), "gates": gates}

    return method._replace(
        name=f"gated_{method.name}",
        init=init,
        bind=bind,
        update=lambda train, state, grads, ctx: method.update(train["method"], state, grads["method"], ctx),
        penalty=lambda train, state, ctx: method.penalty(train["method"], state, ctx),
        merge=lambda params, train, state: operators.densify(bind(params, train, state, Context())),
        axes=axes,
        rates=lambda train: {**methods.equal_rates(train), "method": method.rates(train["method"])},
    )


def _sizes(base: Params, bound: Params, reads: str) -> dict[Path, tuple[int, ...]]:
    """Path of each site that can be gated -> shape of its gate."""
    before, out = paths.flatten(base), {}
    for path, leaf in paths.flatten(bound).items():
        if leaf is before[path]:
            continue
        if isinstance(leaf, prompts.Prefix):
            kernel = paths.get(base, path.removesuffix("prefix") + "q/kernel")
            out[path] = kernel.shape[:-1]
        elif hasattr(leaf, "parts"):
            *lead, fan_in, fan_out = leaf.shape
            out[path] = (*lead, fan_in if reads == "input" else fan_out)
    return out


def _gate(leaf: Any, arrays: Mapping[str, jax.Array], reads: str) -> Any:
    if isinstance(leaf, prompts.Prefix):
        return dataclasses.replace(leaf, **arrays)
    return Gated(leaf, **arrays, reads=reads)


def _lead(site: Axes | None, array: Any) -> Axes:
    """The layer axis like the site's, the rest replicated."""
    rank = len(array.shape)
    return ((site or (None,))[0], *(None,) * (rank - 1)) if rank else ()
