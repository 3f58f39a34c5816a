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
      TargetError (from init): nothing matched, or what matched is no bias.
    """
    named = [targets] if isinstance(targets, str) else list(targets)
    if not named:
        raise errors.ConfigError("bitfit: the list of targets is empty; 'bias' is every one")

    def init(key: Any, params: Params) -> Start:
        present = _matching(params, named, layers, empty=False)
        added = _matching(params, named, layers, empty=True) if fill_empty else {}
        zeros = {p: z for p in added if p.startswith("layers/") and (z := _zeros(params, p)) is not None}
        if not present and not zeros:
            raise errors.TargetError(_nothing(params, named, fill_empty))
        train = {p: x.astype(jnp.float32) for p, x in present.items()}
        return Start(dict.fromkeys(present), {**train, **zeros})

    return methods.method(
        "bitfit", init, methods.fill, cuts=lambda depth: methods.layer_cuts(layers, depth), targets=tuple(named)
    )


def _matching(params: Params, patterns: list[str], layers: str | int | None, *, empty: bool) -> dict[Path, Any]:
    flat = {p: x for p, x in paths.flatten(params).items() if p.endswith("bias") and (x is None) == empty}
    hit = {p: x for p, x in flat.items() if paths.chosen(patterns, p)}
    if layers is None or not hit:
        return hit
    inside = paths.select(params, "/layers/**", layers=layers, empty=empty).leaves
    return {p: x for p, x in hit.items() if p in inside}


def _zeros(params: Mapping[str, Any], path: Path) -> Any:
    """Zeros [layers, out] for the empty bias at ``path``, or None where no kernel stands beside it."""
    kernel = paths.get(params, path.rpartition("/")[0]).get("kernel")
    if kernel is None:
        return None
    *lead, _, fan_out = operators.innermost(kernel).shape  # a method before may have made it wider
    return jnp.zeros((*lead, fan_out), jnp.float32)


def _nothing(params: Params, patterns: list[str], fill_empty: bool) -> str:
    there = [p for p, x in paths.flatten(params).items() if p.endswith("bias") and (x is not None or fill_empty)]
    if not there and not fill_empty:
        return "bitfit: this model has no biases; set fill_empty: true to add them"
    return f"bitfit: {', '.join(map(repr, patterns))} matches no bias. {errors.did_you_mean(patterns[0], there)}"
