"""BitFit: only biases train (Ben Zaken et al., 2022, arXiv:2106.10199)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from tunejax.core import errors, operators, paths
from tunejax.core import method as methods
from tunejax.core.method import Method, Start
from tunejax.core.paths import Params, Path


def bitfit(targets: str | list[str] = "bias", fill_empty: bool = True, layers: str | int | None = None) -> Method:
    """Trains the biases of linear layers and layer norms.

    Args:
      targets: globs over biases: "bias" is every one, "attention/q/bias" those of the queries, "!" takes some away.
      fill_empty: give the linear layers of the stack that have no bias one that starts at zero (Llama and its like
        have none at all). Such a model can be saved in Hugging Face's format only where the family knows the bias.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: no targets.
      TargetError (from init): a pattern that matches no bias, or nothing is left.
    """
    named = [targets] if isinstance(targets, str) else list(targets)
    if not named:
        raise errors.ConfigError("bitfit: the list of targets is empty; 'bias' is every one")

    def init(key: Any, params: Params) -> Start:
        present, zeros = _there(params, layers, fill_empty)
        every = {**{p: x.astype(jnp.float32) for p, x in present.items()}, **zeros}
        for pattern in named:
            if not any(paths.matches(pattern.lstrip("!"), p) for p in every):
                raise errors.TargetError(_nothing(pattern, list(every), fill_empty))
        train = {p: x for p, x in every.items() if paths.chosen(named, p)}
        if not train:
            raise errors.TargetError(f"bitfit: targets {', '.join(map(repr, named))} take away all that they match")
        return Start(dict.fromkeys(p for p in train if p in present), train)

    return methods.method(
        "bitfit", init, methods.fill, cuts=lambda depth: methods.layer_cuts(layers, depth), targets=tuple(named)
    )


def _there(params: Params, layers: str | int | None, fill_empty: bool) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """The biases that these layers have, and zeros for those that can be filled; both by path."""
    flat = {p: x for p, x in paths.flatten(params).items() if p.endswith("bias")}
    if layers is not None:
        inside = [paths.select(params, "/layers/**", layers=layers, empty=e).leaves for e in (False, True)]
        flat = {p: x for p, x in flat.items() if any(p in leaves for leaves in inside)}
    empty = [p for p, x in flat.items() if x is None and p.startswith("layers/") and fill_empty]
    zeros = {p: z for p in empty if (z := _zeros(params, p)) is not None}
    return {p: x for p, x in flat.items() if x is not None}, zeros


def _zeros(params: Mapping[str, Any], path: Path) -> Any:
    """Zeros [layers, out] for the empty bias at ``path``, or None where no kernel stands beside it."""
    kernel = paths.get(params, path.rpartition("/")[0]).get("kernel")
    if kernel is None:
        return None
    *lead, _, fan_out = operators.innermost(kernel).shape  # a method before may have made it wider
    return jnp.zeros((*lead, fan_out), jnp.float32)


def _nothing(pattern: str, there: list[Path], fill_empty: bool) -> str:
    if not there and not fill_empty:
        return "bitfit: this model has no biases; set fill_empty: true to add them"
    return f"bitfit: {pattern!r} matches no bias. {errors.did_you_mean(pattern.lstrip('!'), there)}"
