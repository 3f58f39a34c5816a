"""Optimisers by name, with the habits of Hugging Face's Trainer: no decay on biases and norms, groups by pattern."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tunejax.core import errors, paths
from tunejax.train import schedule as schedule_lib

ALIASES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "lion_32bit": "lion",
}
NAMES = ("adamw", "lion", "adafactor", "sgd", "muon")


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation` (init, update) that also knows its learning rate: (update) -> float32."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    learning_rate: schedule_lib.Schedule


def make_optimizer(
    name: str,
    learning_rate: float | schedule_lib.Schedule,
    *,
    weight_decay: float = 0.0,
    b1: float | None = None,
    b2: float | None = None,
    eps: float = 1e-8,
    momentum: float = 0.9,
    groups: Mapping[str, Mapping[str, float]] | None = None,
) -> Optimizer:
    """An optimiser over a method's ``train``.

    Args:
      name: adamw; lion (arXiv:2302.06675); adafactor (arXiv:1804.04235, without relative steps, as the Trainer has
        it); sgd (momentum, and decay that goes through it, as `torch.optim.SGD`); muon (arXiv:2502.16982: kernels
        are orthogonalised and scaled to AdamW's size, so one learning rate serves; the rest trains by AdamW).
      learning_rate: a number, or a schedule of `schedule.make_schedule`.
      weight_decay: times the learning rate, off for biases and norms.
      b1, b2: of Adam (0.9, 0.999) and Lion (0.9, 0.99).
      eps: of Adam.
      momentum: of sgd (0: none) and muon (where 0.95 is usual, and is taken unless it is another than 0.9).
      groups: pattern over train paths -> {"learning_rate": peak, "weight_decay": rate}; the first that matches wins.
        A peak rescales the schedule; it needs ``learning_rate`` to be a number or have a peak at hand: give
        "scale" (a factor of the schedule) instead where it is a schedule.

    Raises:
      ConfigError: an unknown name or group key.
      TargetError (from init): a group's pattern matches nothing that trains.
    """
    kind = ALIASES.get(name, name)
    if kind not in NAMES:
        raise errors.ConfigError(f"no optimizer {name!r}. {errors.did_you_mean(name, [*NAMES, *ALIASES])}")
    constant = None if callable(learning_rate) else float(learning_rate)
    rate = learning_rate if callable(learning_rate) else lambda update: jnp.asarray(constant, jnp.float32)
    rules = _rules(groups or {}, constant)
    decay = _decay(weight_decay, rules)
    first, second = 0.9 if b1 is None else b1, (0.99 if kind == "lion" else 0.999) if b2 is None else b2
    steps = {
        "adamw": lambda: [optax.scale_by_adam(first, second, eps), decay],
        "lion": lambda: [optax.scale_by_lion(first, second), decay],
        "adafactor": lambda: [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), decay],
        "sgd": lambda: [decay, optax.trace(momentum) if momentum else optax.identity()],
        "muon": lambda: [_muon(0.95 if momentum == 0.9 else momentum, first, second, eps), decay],
    }[kind]()
    chained = optax.chain(*steps, optax.scale_by_learning_rate(rate), _group_scale(rules))

    def init(train: Any) -> Any:
        _check_hits(rules, train)
        return chained.init(train)

    return Optimizer(init, chained.update, rate)


def name_of(key_path: tuple) -> str:
    """The path of a leaf of ``train``: its keys joined by ``/``."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def decays(path: str) -> bool:
    """Whether a leaf gets weight decay: it is no bias (an adapter's "down_bias" is one), and belongs to no norm."""
    keys = path.split("/")
    return "bias" not in keys[-1] and not any(k.endswith("norm") for k in keys)


class _Rule(NamedTuple):
    pattern: str
    scale: float
    weight_decay: float | None


def _rules(groups: Mapping[str, Mapping[str, float]], constant: float | None) -> list[_Rule]:
    rules = []
    for pattern, options in groups.items():
        for key in options:
            if key not in ("learning_rate", "scale", "weight_decay"):
                choices = errors.did_you_mean(key, ["learning_rate", "scale", "weight_decay"])
                raise errors.ConfigError(f"group {pattern!r}: no option {key!r}. {choices}")
        scale = options.get("scale", 1.0)
        if "learning_rate" in options:
            if not constant:
                raise errors.ConfigError(f"group {pattern!r}: with a schedule give 'scale', a factor, not a rate")
            scale = options["learning_rate"] / constant
        rules.append(_Rule(pattern, scale, options.get("weight_decay")))
    return rules


def _rule_of(rules: list[_Rule], path: str) -> _Rule | None:
    return next((r for r in rules if paths.matches(r.pattern, path)), None)


def _check_hits(rules: list[_Rule], train: Any) -> None:
    names = [name_of(p) for p, _ in jax.tree.leaves_with_path(train)]
    for rule in rules:
        if not any(paths.matches(rule.pattern, n) for n in names):
            near = errors.did_you_mean(rule.pattern, names)
            raise errors.TargetError(f"learning-rate group {rule.pattern!r} matches nothing that trains. {near}")


def _decay(default: float, rules: list[_Rule]) -> optax.GradientTransformation:
    """Adds ``rate * param`` to each update, the rate by path."""

    def rate(path: str) -> float:
        rule = _rule_of(rules, path)
        own = rule.weight_decay if rule else None
        return own if own is not None else default if decays(path) else 0.0

    def one(key_path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        r = rate(name_of(key_path))
        return update + r * param if r else update

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(one, updates, params))


def _group_scale(rules: list[_Rule]) -> optax.GradientTransformation:
    def one(key_path: tuple, update: jax.Array) -> jax.Array:
        rule = _rule_of(rules, name_of(key_path))
        return update if rule is None or rule.scale == 1 else update * rule.scale

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(one, updates)) if rules else optax.identity()


def is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    """Whether muon takes a leaf: a kernel [.., in, out] of the stack, not an embedding, head or vector."""
    keys = path.split("/")
    return "kernel" in keys and "layers" in keys and len(shape) == 3


def _muon(momentum: float, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    from optax import contrib

    def labels(train: Any) -> Any:
        return jax.tree.map_with_path(lambda p, x: "muon" if is_matrix(name_of(p), x.shape) else "adam", train)

    def dims(train: Any) -> Any:
        return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), train)

    def size_of_adam(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u: u * 0.2 * max(u.shape[-2:]) ** 0.5, updates)

    orthogonal = contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dims)
    parts = {"muon": optax.chain(orthogonal, optax.stateless(size_of_adam)), "adam": optax.scale_by_adam(b1, b2, eps)}
    return optax.partition(parts, labels)
