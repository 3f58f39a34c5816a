"""A learned gate on what another method adds (the mechanism of UniPELT: Mao et al., 2022, arXiv:2110.07577, section 3).

    y = h + σ(r · g + c) · change        h: what stood there gives; change: what the method adds; g = c = 0 at the start

r is the input or the output of the kernel. The gate is one number a token and site, so it may stand in packed rows and
causal models. A prefix is gated where it is read: σ multiplies the weight of its keys in the softmax, so that a closed
gate is attention without a prefix. (The paper multiplies the keys and values themselves, and a closed gate leaves keys
of zero in the softmax; its released code takes the mean of a gate over all tokens of a row, later ones too.)

With ``per: row`` a gate is as in that code and in AdapterHub's library: the mean of σ over all tokens of the row that
the model is given, and a prefix's keys and values are multiplied by it. The row is what stands in the batch: padding
counts, so that what a text gives depends on how far its batch is padded; examples that are packed in one row share
their gates; and in a causal model a token's gates depend on later tokens. In cached generation, where each new token is
a row by itself, they are therefore not those of the whole text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, joins, operators, paths, portable, prompts
from tunejax.core import method as methods
from tunejax.core.method import Axes, Context, Method, Start
from tunejax.core.paths import Params, Path

READS, PER = ("input", "output"), ("token", "row")
ADAPTERHUB = portable.HubGate("use_gating")


@operators.operator
class Gated(operators.Above):
    """h + g · change for (h, change) = inner.parts(x, bias), g = σ(r · gate + gate_bias) and r = x or h.

    inner: an operator with ``parts``, or where branches join (`core.joins`) with ``change``; r is then what it reads.
    gate [..., in] or [..., out]; gate_bias [...]. per: "token", or "row" for the mean of g over a row's tokens.
    """

    inner: Any
    gate: jax.Array
    gate_bias: jax.Array
    reads: str = operators.static(default="input")
    per: str = operators.static(default="token")

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        h, change = self.inner.parts(x, bias)
        return h + self._weighed(x if self.reads == "input" else h, change)

    def change(self, r: jax.Array) -> jax.Array:
        """What is added where r [..., out] is read: the same shape."""
        return self._weighed(r, self.inner.change(r))

    def _weighed(self, r: jax.Array, change: jax.Array) -> jax.Array:
        if self.per == "row":
            weight = prompts.row_gate(r, self.gate, self.gate_bias)
        else:
            weight = jax.nn.sigmoid(r.astype(jnp.float32) @ self.gate + self.gate_bias)
        return weight[..., None].astype(change.dtype) * change

    @property
    def down(self) -> Any:
        """The first kernel of an adapter behind the gate."""
        return self.inner.down

    def dense(self) -> jax.Array:
        """Raises NotLinear: the gate depends on the input."""
        raise errors.NotLinear("a gate that reads its input is no kernel; serve it unmerged")


def gated(method: Method, reads: str = "input", per: str = "token") -> Method:
    """Trains a method and, at each of its sites, a gate that weighs what it adds (arXiv:2110.07577).

    Args:
      method: a single method that adds to what kernels give (LoRA, adapters), or fills the prefix of attention.
      reads: "input" or "output" of the kernel; whatever is said, for a prefix attention's input, and for an adapter
        that reads where a branch joins the residual, what that reads.
      per: a gate for each "token", or for each "row": the mean over all its tokens, which in a causal model lets a
        token see later ones; see this module.

    Raises:
      ConfigError: reads or per is neither; a chain.
      TargetError (from init): nothing that the method does can be gated.
    """
    if reads not in READS:
        raise errors.ConfigError(f"gated: reads is {reads!r}. {errors.did_you_mean(reads, READS)}")
    if per not in PER:
        raise errors.ConfigError(f"gated: per is {per!r}. {errors.did_you_mean(per, PER)}")
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
        return paths.replace(bound, {p: _gate(paths.get(bound, p), a, reads, per) for p, a in train["gates"].items()})

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
        if isinstance(leaf, joins.AtJoin):
            out[path] = leaf.shape[:-1]
        elif isinstance(leaf, prompts.Prefix):
            kernel = paths.get(base, path.removesuffix("prefix") + "q/kernel")
            out[path] = kernel.shape[:-1]
        elif hasattr(leaf, "parts"):
            *lead, fan_in, fan_out = leaf.shape
            out[path] = (*lead, fan_in if reads == "input" else fan_out)
    return out


def _gate(leaf: Any, arrays: Mapping[str, Any], reads: str, per: str) -> Any:
    if isinstance(leaf, prompts.Prefix):
        return dataclasses.replace(leaf, **arrays, per=per)
    if isinstance(leaf, joins.AtJoin):
        return dataclasses.replace(leaf, inner=Gated(leaf.inner, **arrays, per=per))
    return Gated(leaf, **arrays, reads=reads, per=per)


def _lead(site: Axes | None, array: Any) -> Axes:
    """The layer axis like the site's, the rest replicated."""
    rank = len(array.shape)
    return ((site or (None,))[0], *(None,) * (rank - 1)) if rank else ()
