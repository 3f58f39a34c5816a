"""Full tuning, of everything or of chosen parameters or layers.

What trains moves out of the base into ``train`` (a hole stays), so the weights are held once; there it is float32,
whatever the type of the base, so that small updates are not rounded away (mixed precision's masters,
arXiv:1710.03740).
"""

from typing import Any

from tunejax.core import errors, holes, paths
from tunejax.core import method as methods
from tunejax.core.method import Method, Start
from tunejax.core.paths import Params

ENDS = ("/norm/*", "/head/*", "/pooler/*", "/classifier/*", "/mlm/**")
"""What may stand after the last layer, by family and head."""


def full(targets: str | list[str] = "**", layers: str | int | None = None) -> Method:
    """Trains the parameters themselves.

    Args:
      targets: globs over paths (`core.paths`).
      layers: only these layers of the stack, as a slice: "-2:". What lies outside the stack is then left out too.

    Raises (from init):
      TargetError: nothing matched, or a method before this one wraps what matched.
    """

    def init(key: Any, params: Params) -> Start:
        return holes.moved("full", paths.select(params, targets, layers=layers).leaves)

    named = (targets,) if isinstance(targets, str) else tuple(targets)
    return methods.method(
        "full", init, methods.fill, cuts=lambda depth: methods.layer_cuts(layers, depth), targets=named
    )


def last_k(k: int, norm: bool = True, head: bool = True) -> Method:
    """Trains the last ``k`` layers, the final norm and the head (as Howard and Ruder, arXiv:1801.06146, begin).

    The stack is cut before them, so the backward pass stops there. A tied head stays frozen: its table is the
    embedding, whose gradient would need the whole backward pass; add ``full(targets="embed/table")`` to train it.

    Args:
      k: number of layers; 0 trains only what stands after the stack.
      norm: train the final norm.
      head: train what stands after it (head, pooler, classifier, masked-LM head), where the model has it.

    Raises:
      ConfigError: a negative k; from init: more layers than the model has.
    """
    if k < 0:
        raise errors.ConfigError(f"last_k: k is {k}; it is a number of layers, at least 0")
    ends = [p for p in ENDS if (norm if p == "/norm/*" else head)]

    def init(key: Any, params: Params) -> Start:
        flat = paths.flatten(params)
        depth = sum(s.size for s in paths.segments(params))
        _check(k, depth)
        chosen = dict(paths.select(params, "/layers/**", layers=(depth - k, depth)).leaves) if k else {}
        for path, leaf in flat.items():
            if leaf is not None and any(paths.matches(p, path) for p in ends):
                chosen[path] = leaf
        if not chosen:
            raise errors.TargetError("last_k trains nothing here: k is 0 and the model has no head of its own")
        return holes.moved("last_k", chosen)

    def cuts(depth: int) -> tuple[int, ...]:
        _check(k, depth)
        return (depth - k,) if 0 < k < depth else ()

    return methods.method("last_k", init, methods.fill, cuts=cuts)


def _check(k: int, depth: int) -> None:
    if k > depth:
        raise errors.ConfigError(f"last_k: k is {k}, and the model has {depth} layers")
