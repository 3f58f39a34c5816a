"""Several trainings of one shape in one program: a `jax.vmap` of the step over everything but the base.

The members differ in their arrays, keys, learning rates and data, and in sizes of arrays that zeros can fill up. The
base is held and read once. A member's numbers are those of its own run to rounding.

Zeros stay zeros: of two factors of a product, padded alike, the gradient of either's padding is a product with the
other's, and an elementwise optimiser moves nothing without a gradient. So no mask is needed in the step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tunejax.core import errors, paths
from tunejax.core import method as method_lib
from tunejax.core.method import Method, Start
from tunejax.core.model import Batch, Model
from tunejax.core.objective import Objective
from tunejax.core.paths import Params
from tunejax.train import sharding, step
from tunejax.train.state import TrainState, start_shardings

PyTree = Any

OWN, FACTORS, SKIPPED = "own", "factors", "nonfinite"
"""What the state of several holds: the states of their methods, what each multiplies its arrays by, and each one's
counters of skipped updates, every leaf with the members' axis in front."""


def start(
    model: Model,
    method: Method,
    members: Sequence[Method],
    factors: Sequence[Mapping[str, float]],
    optimizer: Any,
    params: Params,
    keys: Sequence[Any],
    mesh: Mesh,
    rules: sharding.Rules = sharding.RULES,
    heads: Sequence[Params] = (),
) -> tuple[TrainState, Params]:
    """The state of step 0 of all members, and their base.

    Args:
      model: for its logical axes.
      method: whose arrays are as large as any member's.
      members: the method of each, as its own run would have it; the same object where it is the same method.
      factors: of each, as of `factors_of`: what arrays are multiplied by before they are bound; the same ones for all.
      optimizer: of any of them; their states differ in nothing but numbers.
      params: the model's parameters; give them up after this call.
      keys: of each member's run.
      mesh, rules: where things go. The members' axis is whole on every device.
      heads: of each member, values by path that it begins with instead of those in ``params``; they must train.

    Returns:
      A `TrainState` whose ``train``, ``opt_state`` and ``key`` have the members' axis in front and whose ``state`` is
      as this module says; and the base.

    Raises:
      ConfigError: members whose arrays cannot be padded to those of ``method``, or that rewrite the base differently.
    """
    params = sharding.shard_params(mesh, rules, model.axes, params)
    begin = {id(m): jax.jit(lambda k, p, m=m: m.init(jax.random.fold_in(k, 0), p)) for m in members}
    own_params = [paths.replace(params, h) for h in heads] or [params] * len(members)
    begun = [begin[id(m)](key, p) for m, key, p in zip(members, keys, own_params, strict=True)]
    frozen = [p for h in heads for p in h if begun[0].edits.get(p, p) is not None]
    if frozen:
        raise errors.ConfigError(f"{frozen[0]} begins differently for each member and is frozen: let it train")
    shapes = jax.eval_shape(method.init, keys[0], params)
    _same_edits(begun, method.name)
    train, own = (stacked([padded(getattr(b, t), getattr(shapes, t)) for b in begun]) for t in ("train", "state"))
    places = start_shardings(model, method, shapes, params, mesh, rules)
    train, own = (jax.device_put(x, _behind(mesh, p)) for x, p in ((train, places.train), (own, places.state)))
    opt_shapes = jax.eval_shape(jax.vmap(optimizer.init), train)
    opt_places = sharding.like_train(mesh, opt_shapes, train, _behind(mesh, places.train))
    opt_state = jax.jit(jax.vmap(optimizer.init), out_shardings=opt_places)(train)
    count, whole = len(members), sharding.replicated(mesh)
    run_keys = jnp.stack([jax.random.fold_in(k, 1) for k in keys])
    rest = {
        FACTORS: stacked([jax.tree.map(jnp.float32, f) for f in factors]),
        SKIPPED: jnp.zeros((count, 2), jnp.int32),
    }
    rest, run_keys = jax.device_put((rest, run_keys), whole)
    counters = jax.device_put((jnp.zeros((), jnp.int32), jnp.zeros((2,), jnp.int32)), whole)
    base = method_lib.apply_edits(params, begun[0].edits)
    return TrainState(counters[0], train, {OWN: own, **rest}, opt_state, run_keys, counters[1]), base


def _behind(mesh: Mesh, places: PyTree) -> PyTree:
    """The same places for arrays with the members' axis in front."""
    return jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), places)


def _same_edits(begun: Sequence[Start], name: str) -> None:
    first = begun[0].edits
    for other in begun[1:]:
        leaves = zip(jax.tree.leaves(first), jax.tree.leaves(other.edits), strict=False)
        if other.edits.keys() != first.keys() or not all(np.array_equal(a, b) for a, b in leaves):
            raise errors.ConfigError(
                f"{name} rewrites the base in a way that depends on the seed or the rank, and one program has one base"
            )


def stacked(trees: Sequence[PyTree]) -> PyTree:
    """One tree of all, each leaf with the members' axis in front."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def padded(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` with zeros at the ends of axes that are shorter than those of ``like``.

    Raises:
      ConfigError: another structure, other axes, or an axis that is longer.
    """

    def one(x: jax.Array, wanted: Any) -> jax.Array:
        if len(x.shape) != len(wanted.shape) or any(a > b for a, b in zip(x.shape, wanted.shape, strict=True)):
            raise errors.ConfigError(
                f"members of one program differ: an array of shape {x.shape}, another {wanted.shape}"
            )
        if x.shape == wanted.shape:  # a scalar has no axis to pad
            return x
        return jnp.pad(x, [(0, b - a) for a, b in zip(x.shape, wanted.shape, strict=True)])

    try:
        return jax.tree.map(one, tree, like)
    except ValueError as e:
        raise errors.ConfigError(f"the members of one program must train arrays of the same names: {e}") from None


def member(state: TrainState, i: int, like: Start) -> TrainState:
    """The state of member ``i`` as its own run has it; like: shapes of its method's `Start`."""

    def cut(x: jax.Array, wanted: Any) -> jax.Array:
        return x[i][tuple(slice(n) for n in wanted.shape)]

    train, own = jax.tree.map(cut, state.train, like.train), jax.tree.map(cut, state.state[OWN], like.state)
    return TrainState(state.step, train, own, (), state.key[i], state.state[SKIPPED][i])


def multiplied(method: Method) -> Method:
    """The method with a state {`OWN`, `FACTORS`}: it binds arrays times their factors; gradients pass through that."""

    def times(train: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        def one(where: tuple, x: jax.Array) -> jax.Array:
            factor = state[FACTORS].get(jax.tree_util.keystr(where))
            return x if factor is None else x * factor

        return jax.tree.map_with_path(one, (train, state[OWN]))

    return method._replace(
        bind=lambda params, train, state, ctx: method.bind(params, *times(train, state), ctx),
        update=lambda train, state, grads, ctx: {**state, OWN: method.update(train, state[OWN], grads, ctx)},
        penalty=lambda train, state, ctx: method.penalty(train, state[OWN], ctx),
    )


class ManySteps(step.Step):
    """The step of several members, called as a `step.Step`; their metrics are "<member>/<name>".

    "loss" and the objective's own are means over the members whose numbers are finite; "nonfinite" is that of the
    member with the fewest, so a member that diverges stands still and does not stop the others.
    """

    def put(self, batch: Any) -> dict[str, jax.Array]:
        """Rows on the mesh: [rows, length] for all members, or [members, rows, length]."""
        if np.ndim(batch["tokens"]) == 2:
            return super().put(batch)
        place = NamedSharding(self.mesh, PartitionSpec(None, sharding.BATCH))
        return {k: jax.make_array_from_process_local_data(place, np.asarray(v)) for k, v in batch.items()}


def make_step(
    model: Model,
    method: Method,
    objective: Objective,
    optimizer_of: Callable[[Any], Any],
    learning_rates: Sequence[float],
    *,
    mesh: Mesh,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
) -> ManySteps:
    """The compiled step of ``len(learning_rates)`` members.

    Args:
      model, method, objective, mesh, accumulate, max_grad_norm: as of `step.make_step`.
      optimizer_of: (peak learning rate, a traced float32 scalar) -> the optimiser of a member.
      learning_rates: of each member.
    """
    bound = multiplied(method)
    rates = jnp.asarray(learning_rates, jnp.float32)
    count = len(learning_rates)

    def one(state: TrainState, factors: Any, rate: Any, base: Params, frozen: Params, batch: Batch) -> Any:
        update = step.make_update(model, bound, objective, optimizer_of(rate), accumulate, max_grad_norm)
        new, metrics = update(state._replace(state={OWN: state.state, FACTORS: factors}), base, frozen, batch)
        return new._replace(state=new.state[OWN]), metrics

    def update(state: TrainState, base: Params, frozen: Params, batch: Batch) -> tuple[TrainState, step.Metrics]:
        inner = state._replace(state=state.state[OWN], nonfinite=state.state[SKIPPED])
        axes = TrainState(None, 0, 0, 0, 0, 0)  # type: ignore[arg-type]
        each = 0 if batch["tokens"].ndim == 3 else None
        mapped = jax.vmap(one, (axes, 0, 0, None, None, each), (axes, 0), axis_size=count)
        new, metrics = mapped(inner, state.state[FACTORS], rates, base, frozen, batch)
        rest = {FACTORS: state.state[FACTORS], SKIPPED: new.nonfinite}
        fewest = jnp.min(new.nonfinite, axis=0)
        return new._replace(state={OWN: new.state, **rest}, nonfinite=fewest), _summed_up(metrics, count)

    def sums(train: Any, state: Any, base: Params, frozen: Params, batch: Batch) -> step.Sums:
        def one(train: Any, own: Any, factors: Any) -> step.Sums:
            return step.evaluate(model, bound, objective, train, {OWN: own, FACTORS: factors}, base, frozen, batch)

        return _named(jax.vmap(one, axis_size=count)(train, state[OWN], state[FACTORS]), count)

    return ManySteps(model, method, objective._replace(scores=_scores(objective, count)), mesh, update, sums)


def _scores(objective: Objective, count: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """``objective``'s scores of each member by "<member>/<name>", and their means over the members."""

    def scores(means: dict[str, Any]) -> dict[str, Any]:
        fronts = [f"{i}/" for i in range(count)]
        each = [objective.scores({k.removeprefix(f): v for k, v in means.items() if k.startswith(f)}) for f in fronts]
        named = {f + k: v for f, one in zip(fronts, each, strict=True) for k, v in one.items()}
        return {**named, **{k: np.mean([one[k] for one in each]) for k in each[0]}}

    return scores


def _named(found: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {f"{i}/{k}": jax.tree.map(lambda x, i=i: x[i], v) for k, v in found.items() for i in range(count)}


def _summed_up(metrics: step.Metrics, count: int) -> step.Metrics:
    """Metrics [members] as one number each, and those of each member by name."""
    kept = {k: v for k, v in metrics.items() if k not in ("weight", "nonfinite")}
    means = {k: jnp.nanmean(jnp.where(jnp.isfinite(v), v, jnp.nan)) for k, v in kept.items()}
    both = {"weight": jnp.sum(metrics["weight"]), "nonfinite": jnp.min(metrics["nonfinite"])}
    return {**means, **both, **_named(kept, count)}


def of_member(values: Mapping[str, float], i: int) -> dict[str, float]:
    """The metrics of member ``i`` among those of all, under the names that its own run has."""
    out = {}
    for name, value in values.items():
        front = "eval_" if name.startswith("eval_") else ""
        number, slash, bare = name.removeprefix("eval_").partition("/")
        if not slash and name in ("step", "tokens_per_second"):
            out[name] = value
        elif slash and number == str(i):
            out[front + bare] = value
    return out


def factors_of(start: Start, given: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """For `start`: the arrays of train and state (shapes will do) that are multiplied, by where they lie.

    given: key of a part of a chain ("" where there is no chain) -> name of an array -> its factor.
    """
    out = {}
    for where, _ in jax.tree.leaves_with_path((start.train, start.state)):
        keys = [str(getattr(k, "key", k)) for k in where]
        part = given.get(keys[1], given.get("", {}))
        if keys[-1] in part:
            out[jax.tree_util.keystr(where)] = part[keys[-1]]
    return out
