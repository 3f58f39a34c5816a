"""Distillation of features: what a student computes on the way, beside what its teacher does.

Every loss here is a mean over an example's tokens, and examples count as much as their loss weights: a sum over
positions, so packing, accumulation and data parallelism stay exact.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import errors, operators, sites
from tunejax.core.method import Context, Method, Start, chain, keys, method, path_key
from tunejax.core.model import AUXILIARY, Batch, Model, key_shape
from tunejax.core.objective import LossOutput
from tunejax.core.paths import Params

METRICS = ("mse", "cosine", "normalized_mse")
RELATIONS = ("query", "key", "value", "attention")
Taps = Mapping[str, jax.Array]


class Both(NamedTuple):
    """What a `Term` reads. student, teacher: taps, each [layers, batch, length, ...].

    weights: float32 [batch, length], see `spread`. seen: bool [batch, queries, keys], who attends to whom.
    kernels: what projects the student, by name; empty where nothing is projected.
    """

    student: Taps
    teacher: Taps
    weights: jax.Array
    seen: jax.Array
    kernels: Mapping[str, Any]


class Term(NamedTuple):
    """A loss between two models, the weighted sum over positions. taps: of both models."""

    name: str
    weight: float
    taps: tuple[str, ...]
    loss: Callable[[Both], jax.Array]


def added(
    output: LossOutput, terms: Sequence[Term], model: Model, params: Params, batch: Batch, student: Taps, teacher: Taps
) -> LossOutput:
    """``output`` with the terms in its loss and metrics."""
    if not terms:
        return output
    total, weight, metrics = output
    real = (batch["segment_ids"] > 0) & (batch["tokens"] < model.vocab_size)
    where = sites.Where(batch["positions"], batch["segment_ids"])
    seen = sites.mask(where, where, causal=model.cache is not None) & real[:, None, :]
    both = Both(student, teacher, spread(batch, model.vocab_size), seen, params.get(AUXILIARY, {}))
    found = {term.name: term.loss(both) for term in terms}
    return total + sum(term.weight * found[term.name] for term in terms), weight, {**metrics, **found}


def check(
    terms: Sequence[Term],
    sizes: Mapping[str, tuple[int, int]],
    student: Model,
    teacher: Model,
    params: Params,
    rows: int,
) -> None:
    """Traces the terms, so that what cannot be compared shows before anything runs.

    Args:
      sizes: of the `projections`. params: of the teacher, shapes will do. rows: that divide over the models' mesh.

    Raises:
      ConfigError: widths or heads that do not fit.
    """
    if not terms:
        return
    taps = tuple(dict.fromkeys(tap for term in terms for tap in term.taps))
    ones = jnp.ones((rows, 2), jnp.int32)
    batch = {"tokens": 0 * ones, "positions": ones, "segment_ids": ones, "loss_weights": ones}

    def traced(ours: Params, theirs: Params) -> LossOutput:
        kernels = {name: {"kernel": jnp.ones(size)} for name, size in sizes.items()}
        both = student.hidden(ours, batch, taps=taps)[1], teacher.hidden(theirs, batch, taps=taps)[1]
        return added((jnp.zeros(()), jnp.ones(()), {}), terms, student, {AUXILIARY: kernels}, batch, *both)

    jax.eval_shape(traced, jax.eval_shape(student.init, key_shape()), params)


def spread(batch: Batch, vocab_size: int) -> jax.Array:
    """float32 [batch, length]: the loss weight of each example (a segment of a row) in equal parts on its real tokens.

    Virtual tokens (ids from vocab_size on) get none, since the teacher may not see them.
    """
    segments = batch["segment_ids"]
    real = ((segments > 0) & (batch["tokens"] < vocab_size)).astype(jnp.float32)
    same = (segments[:, :, None] == segments[:, None, :]).astype(jnp.float32)
    weight, count = (jnp.einsum("btu,bu->bt", same, x) for x in (batch["loss_weights"].astype(jnp.float32), real))
    return real * weight / jnp.maximum(count, 1)


def hidden(
    student_depth: int,
    teacher_depth: int,
    *,
    weight: float = 1.0,
    layers: str | Sequence[tuple[int, int]] = "uniform",
    metric: str = "mse",
    embeddings: bool = False,
) -> Term:
    """Hidden states beside the teacher's, summed over pairs of layers.

    Args:
      student_depth, teacher_depth: layers of the two.
      layers: see `pairs`.
      metric: "mse", the mean square over the width (TinyBERT, Jiao et al., 2020, arXiv:1909.10351, equation 8);
        "cosine", 1 less the cosine (DistilBERT, Sanh et al., 2019, arXiv:1910.01108, section 3); "normalized_mse", the
        squared distance of the two brought to length 1 (PKD, Sun et al., 2019, arXiv:1908.09355, equation 7).
      embeddings: what enters the first layer too (TinyBERT, equation 9).

    A kernel "hidden" (or "embedding") of `projections` maps the student's width to the teacher's, one for all layers.

    Raises:
      ConfigError: a layer or metric that is not there; (when traced) other widths and no kernel.
    """
    if metric not in METRICS:
        raise errors.ConfigError(f"distill.hidden.metric is {metric!r}. {errors.did_you_mean(metric, METRICS)}")
    chosen = pairs(layers, student_depth, teacher_depth)
    distance = {"mse": _mse, "cosine": _cosine, "normalized_mse": _normalized_mse}[metric]

    def one(both: Both, tap: str, s: int, t: int) -> jax.Array:
        x, y = both.student[tap][s].astype(jnp.float32), both.teacher[tap][t].astype(jnp.float32)
        if tap in both.kernels:
            x = sites.linear(both.kernels[tap]["kernel"], x)
        if x.shape != y.shape:
            raise errors.ConfigError(
                f"distill.hidden compares a width of {x.shape[-1]} with the teacher's {y.shape[-1]}: "
                "it needs a projection"
            )
        return jnp.sum(both.weights * distance(x, y))

    def loss(both: Both) -> jax.Array:
        first = [one(both, "embedding", 0, 0)] if embeddings else []
        return sum([*first, *(one(both, "hidden", s, t) for s, t in chosen)], jnp.zeros(()))

    return Term("hidden", weight, ("hidden", *(["embedding"] if embeddings else [])), loss)


def pairs(layers: str | Sequence[tuple[int, int]], student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """(student's layer, teacher's layer), from 0, for stacks of so many layers.

    "uniform": the student's m-th of M layers beside the teacher's (m N / M)-th of N; "last": the last two; or pairs,
    in which a negative number counts from the end.

    Raises:
      ConfigError: a layer that is not there.
    """
    if layers == "uniform":
        return tuple((m, max(round((m + 1) * teacher / student), 1) - 1) for m in range(student))
    if layers == "last":
        return ((student - 1, teacher - 1),)
    if isinstance(layers, str):
        near = errors.did_you_mean(layers, ["uniform", "last"])
        raise errors.ConfigError(f"distill.hidden.layers is {layers!r}. {near}")
    return tuple((_layer(s, student, "student"), _layer(t, teacher, "teacher")) for s, t in layers)


def _layer(index: int, depth: int, whose: str) -> int:
    if not -depth <= index < depth:
        raise errors.ConfigError(f"distill names layer {index} of the {whose}, which has {depth}: 0 to {depth - 1}")
    return index % depth


def _mse(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x - y), axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    return 1 - jnp.sum(_unit(x) * _unit(y), axis=-1)


def _normalized_mse(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(_unit(x) - _unit(y)), axis=-1)


def relations(
    student_depth: int,
    teacher_depth: int,
    *,
    weight: float = 1.0,
    of: Sequence[str] = ("query", "key", "value"),
    heads: int | None = None,
    student_layer: int = -1,
    teacher_layer: int = -1,
) -> Term:
    """KL(teacher || student) of softmax relations among the tokens of a layer, a mean over heads, summed over ``of``.

    Args:
      of: "attention", queries with keys, and "value", values with values, are the transfers of MiniLM (Wang et al.,
        2020, arXiv:2002.10957, equations 5 and 7); "query", "key" and "value", each with itself, those of MiniLMv2
        (Wang et al., 2021, arXiv:2012.15828, equations 3 to 5).
      heads: relation heads, into which the vectors of all heads are cut anew, so that the two may have other heads and
        widths (MiniLMv2); None: their own, which must be as many.
      student_layer, teacher_layer: negative ones count from the end. MiniLMv2 takes an upper middle one of a large
        teacher.

    A token is compared with those that it attends to; no width has to agree, so nothing is projected.

    Raises:
      ConfigError: a relation or layer that is not there; (when traced) heads that do not fit.
    """
    for name in of:
        if name not in RELATIONS:
            raise errors.ConfigError(f"distill.relations.of has {name!r}. {errors.did_you_mean(name, RELATIONS)}")
    s, t = _layer(student_layer, student_depth, "student"), _layer(teacher_layer, teacher_depth, "teacher")

    def loss(both: Both) -> jax.Array:
        total = jnp.zeros(())
        for name in of:
            log_q, log_p = (_relation(x, i, name, heads, both.seen) for x, i in ((both.student, s), (both.teacher, t)))
            if log_q.shape != log_p.shape:
                raise errors.ConfigError(
                    f"distill.relations compares {log_q.shape[1]} heads ({name}) with the teacher's {log_p.shape[1]}: "
                    "set distill.relations.heads to a number that divides both widths"
                )
            kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
            total += jnp.sum(both.weights * jnp.mean(kl, axis=1))
        return total

    taps = [tap for name in of for tap in (("query", "key") if name == "attention" else (name,))]
    return Term("relations", weight, tuple(dict.fromkeys(taps)), loss)


def _relation(taps: Taps, layer: int, name: str, heads: int | None, seen: jax.Array) -> jax.Array:
    """Float32 log-probabilities [batch, heads, queries, keys] of the relation of that name."""
    a, b = (taps[n][layer].astype(jnp.float32) for n in (("query", "key") if name == "attention" else (name, name)))
    b = jnp.repeat(b, a.shape[2] // b.shape[2], axis=2)
    if heads is not None:
        width = a.shape[2] * a.shape[3]
        if width % heads:
            raise errors.ConfigError(
                f"distill.relations.heads is {heads}; it does not divide the width {width} of {name}"
            )
        a, b = (x.reshape(*x.shape[:2], heads, -1) for x in (a, b))
    scores = jnp.einsum("bqhd,bkhd->bhqk", a, b) * a.shape[-1] ** -0.5
    return jax.nn.log_softmax(scores + sites.bias(seen)[:, None], axis=-1)


def projections(sizes: Mapping[str, tuple[int, int]]) -> Method:
    """Kernels [in, out] by name that train beside a model, for terms to read: nothing of the model changes.

    They are chained behind the method of a run, and stay out of its adapter and of merged weights.
    """

    def init(key: Any, params: Params) -> Start:
        draw = lambda name, size: size[0] ** -0.5 * jax.random.normal(path_key(key, name), size)  # noqa: E731
        return Start(train={name: {"kernel": draw(name, size)} for name, size in sizes.items()})

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        return {**params, AUXILIARY: train}

    def merge(params: Params, train: Any, state: Any) -> Params:
        return operators.densify(params)

    return method("projections", init, bind, merge=merge)


def beside(tuned: Method, sizes: Mapping[str, tuple[int, int]]) -> Method:
    """``tuned`` with the `projections` of these sizes; itself where there are none."""
    return chain(tuned, projections(sizes)) if sizes else tuned


def own(tuned: Method, sizes: Mapping[str, tuple[int, int]], tree: Any) -> Any:
    """What of a ``train`` or ``state`` of `beside` belongs to ``tuned``, as it would have it alone."""
    if not sizes:
        return tree
    if not tuned.parts:
        return tree[keys([tuned])[0]]
    return {name: tree[name] for name in keys(tuned.parts)}
