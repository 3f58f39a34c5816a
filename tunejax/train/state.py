"""What a run is: everything that is saved, and the base that it refers to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tunejax.core import method as method_lib
from tunejax.core.model import Model, key_shape
from tunejax.core.paths import Params
from tunejax.train import compiler, sharding

PyTree = Any


class TrainState(NamedTuple):
    """All that a checkpoint holds, with the data iterator's state; the base is referenced, never copied.

    Invariant: the run is a function of this, the base and the data: two runs from one state end in the same bytes.

    step: int32 scalar, batches consumed. The learning rate counts updates made (in ``opt_state``) instead: a
      skipped update does not advance it.
    train, state: of the method (`core.method.Start`).
    opt_state: of the optimiser, for ``train`` alone.
    key: the PRNG key of the run; step n draws from ``fold_in(key, n)``.
    nonfinite: int32 [2]: updates skipped in a row, and in all, because a loss or gradient was not finite.
    """

    step: jax.Array
    train: PyTree
    state: PyTree
    opt_state: PyTree
    key: jax.Array
    nonfinite: jax.Array


def start(
    model: Model,
    method: method_lib.Method,
    optimizer: Any,
    params: Params,
    key: jax.Array,
    mesh: Mesh,
    rules: sharding.Rules = sharding.RULES,
) -> tuple[TrainState, Params]:
    """The state of step 0 and the base (params with the method's edits), both laid over the mesh.

    Leaves that train whole move into the state, and a step donates the state: give ``params`` up after this call.

    Args:
      model: for its logical axes.
      method: what to tune.
      optimizer: an `optax.GradientTransformation`.
      params: the model's parameters.
      key: of the run; the method draws from ``fold_in(key, 0)``, the steps from ``fold_in(key, 1)``.
      mesh, rules: where things go.
    """
    params = sharding.shard_params(mesh, rules, model.axes, params)
    begin, _, places = _beginning(model, method, optimizer, params, key, mesh, rules)
    program = jax.jit(begin, out_shardings=places, compiler_options=compiler.options(runs=1))
    begun, opt_state, (step, nonfinite, run_key) = program(key, params)
    base = method_lib.apply_edits(params, begun.edits)
    return TrainState(step, begun.train, begun.state, opt_state, run_key, nonfinite), base


def plan(
    model: Model,
    method: method_lib.Method,
    optimizer: Any,
    params: Params,
    mesh: Mesh,
    rules: sharding.Rules = sharding.RULES,
) -> tuple[TrainState, Params]:
    """What `start` returns, as shapes that carry shardings: enough to compile the step while the weights are read.

    params: arrays or shapes; the rest as in `start`.
    """
    params = sharding.abstract(params, sharding.params_shardings(mesh, rules, model.axes, params))
    _, shapes, places = _beginning(model, method, optimizer, params, key_shape(), mesh, rules)
    begun, opt_state, (step, nonfinite, run_key) = jax.tree.map(sharding.abstract, shapes, places)
    base = method_lib.apply_edits(params, begun.edits)
    return TrainState(step, begun.train, begun.state, opt_state, run_key, nonfinite), base


def _beginning(
    model: Model, method: method_lib.Method, optimizer: Any, params: Params, key: jax.Array, mesh: Mesh, rules: Any
) -> tuple[Callable, Any, Any]:
    """(key, params) -> (Start, optimiser's state, counters), the shapes of these, and where they go."""

    # One program: each costs a compilation, and the first step waits for all of them. Nothing here is a device_put
    # of a key, which is refused where the mesh spans processes.
    def begin(key: jax.Array, params: Params) -> Any:
        begun = method.init(jax.random.fold_in(key, 0), params)
        counters = jnp.zeros((), jnp.int32), jnp.zeros((2,), jnp.int32), jax.random.fold_in(key, 1)
        return begun, optimizer.init(begun.train), counters

    shapes = jax.eval_shape(begin, key, params)
    begun, opt_state, counters = shapes
    places = start_shardings(model, method, begun, params, mesh, rules)
    opt_places = sharding.like_train(mesh, opt_state, begun.train, places.train)
    return begin, shapes, (places, opt_places, jax.tree.map(lambda _: sharding.replicated(mesh), counters))


def start_shardings(
    model: Model,
    method: method_lib.Method,
    shapes: method_lib.Start,
    params: Params,
    mesh: Mesh,
    rules: sharding.Rules,
) -> method_lib.Start:
    """Shardings of a method's `Start` from its shapes; ``state`` is whole on every device unless shaped like train."""
    train = sharding.train_shardings(mesh, rules, method.axes(model.axes, shapes.train), shapes.train)
    edits = {}
    for path, leaf in shapes.edits.items():
        one = sharding.params_shardings(mesh, rules, {"leaf": model.axes[path]}, {"leaf": leaf})
        edits[path] = one["leaf"]
    state = sharding.like_train(mesh, shapes.state, shapes.train, train)
    return method_lib.Start(edits, train, state)


def nbytes(tree: PyTree) -> int:
    """Bytes of all arrays of ``tree``, each counted once however it is sharded."""
    return sum(x.nbytes for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))


def count(tree: PyTree) -> int:
    """Entries of all arrays of ``tree``."""
    return sum(x.size for x in jax.tree.leaves(tree))
