"""Methods: pure functions on a parameter pytree that compose like optax transformations.

chain(lora(rank=8, targets="attention/{q,v}/kernel"), train("norm/*"))
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import errors, operators, paths
from tunejax.core.paths import Leaf, Params, Path

PyTree = Any
Axes = tuple[str | None, ...]


class Context(NamedTuple):
    """What varies from call to call. The open door: add fields, break nobody.

    step: int32 scalar, the optimiser step. key: a PRNG key, or None where nothing is random. train: dropout is on.
    params: within `Method.update`, () -> the parameters that the whole chain binds after this step; elsewhere None.
      Nothing is computed that is not asked for. loss: float32 scalar, the batch's mean, likewise in `Method.update`.
    turn: int32 scalar, how many micro-batches came before this one.
    rows: each row of a batch is bound to arrays of its own, so that what is as large as a kernel is made for each.
    """

    step: Any = 0
    key: Any = None
    train: bool = False
    params: Callable[[], Params] | None = None
    loss: Any = None
    turn: Any = 0
    rows: bool = False


class Start(NamedTuple):
    """A partition of what a method needs: no array lies in two of its places.

    Invariant: ``bind(apply_edits(params, edits), train, state) == params`` as a function (identity at init), except
    where virtual tokens or a prefix come before the text (`Method.prompt`, `Method.prefix`).

    edits: the base rewritten once; a leaf (a quantised one, say) or None, a hole whose value moved into ``train``.
    train: has gradients and optimiser state. Float32, whatever the base's type.
    state: has neither: masks, importance, budgets.
    """

    edits: dict[Path, Leaf | None] = {}  # noqa: RUF012
    train: PyTree = {}  # noqa: RUF012
    state: PyTree = {}  # noqa: RUF012


def equal_rates(train: PyTree) -> PyTree:
    """The `Method.rates` of a method that sets none: 1 for every leaf."""
    return jax.tree.map(lambda x: 1.0, train)


class Method(NamedTuple):
    """How to tune: five pure functions and what they need of the model.

    init:    (key, params) -> Start. Sees what the methods before it bound; must survive `jax.eval_shape`.
    bind:    (params, train, state, ctx) -> params. Cheap, every step: wraps leaves, fills holes.
    update:  (train, state, grads, ctx) -> state. After the optimiser.
    penalty: (train, state, ctx) -> scalar, scaled by the weight sum, so accumulation does not change it.
    merge:   (params, train, state) -> params of plain arrays. Raises NotLinear naming the path.
    axes:    (model axes a path, shapes of train) -> logical axes a leaf of train, to shard by.
    cuts:    (depth) -> the layers before which the stack is to be cut into segments.
    parts:   the methods that `chain` joined; empty for a single one.
    targets: the patterns that it was asked for, to report by; empty where it has none.
    rates:   (train) -> a float a leaf of train: what its learning rate is multiplied by, decay included.
    prompt:  how many virtual tokens every example has: ids vocab_size, vocab_size + 1, ... that whoever makes a batch
             or a prompt puts in front, or where a template has them. `chain` adds them up, the first method's first.
    prefix:  how many positions it takes before the first token within attention alone; the model counts them itself.
    updates: how many updates its schedule takes to end; 0 where it has none. A run of fewer leaves it on the way.
    density: where what trains are differences from the base by path: the part of them that a mask lets through.
    """

    name: str
    init: Callable[[Any, Params], Start]
    bind: Callable[[Params, PyTree, PyTree, Context], Params]
    update: Callable[[PyTree, PyTree, PyTree, Context], PyTree]
    penalty: Callable[[PyTree, PyTree, Context], Any]
    merge: Callable[[Params, PyTree, PyTree], Params]
    axes: Callable[[Mapping[Path, Axes], PyTree], PyTree]
    cuts: Callable[[int], tuple[int, ...]]
    parts: "tuple[Method, ...]" = ()
    targets: tuple[str, ...] = ()
    rates: Callable[[PyTree], PyTree] = equal_rates
    prompt: int = 0
    prefix: int = 0
    updates: int = 0
    density: float | None = None


def keys(parts: Iterable[Method]) -> list[str]:
    """What a chain of ``parts`` calls the tree of each: "<position>:<name>"."""
    return [f"{i}:{m.name}" for i, m in enumerate(parts)]


def split(tuned: Method, tree: PyTree) -> list[tuple[Method, PyTree]]:
    """The methods of a chain, each with its own of ``tree``, a train or state; of a single method, itself with all."""
    return [(m, tree[k]) for k, m in zip(keys(tuned.parts), tuned.parts, strict=True)] or [(tuned, tree)]


def method(
    name: str,
    init: Callable[[Any, Params], Start],
    bind: Callable[[Params, PyTree, PyTree, Context], Params],
    *,
    update: Callable[..., PyTree] | None = None,
    penalty: Callable[..., Any] | None = None,
    merge: Callable[..., Params] | None = None,
    axes: Callable[..., PyTree] | None = None,
    cuts: Callable[[int], tuple[int, ...]] | None = None,
    targets: tuple[str, ...] = (),
    rates: Callable[[PyTree], PyTree] = equal_rates,
    prompt: int = 0,
    prefix: int = 0,
    updates: int = 0,
    density: float | None = None,
) -> Method:
    """A `Method` from the two functions that every one has; the others default to keeping, to 0 and to densifying.

    Raises (from init):
      ConfigError: ``init`` returned something else than a `Start`, or trains an array of whole numbers.
    """

    def merge_bound(params: Params, train: PyTree, state: PyTree) -> Params:
        return operators.densify(bind(params, train, state, Context()))

    def started(key: Any, params: Params) -> Start:
        found = init(key, params)
        if not isinstance(found, Start):
            raise errors.ConfigError(f"method {name!r}: init returned {type(found).__name__}, expected a Start")
        for where, x in jax.tree.leaves_with_path(found.train):
            if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
                at = jax.tree_util.keystr(where, simple=True, separator="/")
                raise errors.ConfigError(
                    f"method {name!r}: {at} is to train and of type {jnp.result_type(x)}; expected float32, or state"
                )
        return found

    return Method(
        name=name,
        init=started,
        bind=bind,
        update=update or (lambda train, state, grads, ctx: state),
        penalty=penalty or (lambda train, state, ctx: jnp.zeros((), jnp.float32)),
        merge=merge or merge_bound,
        axes=axes or _axes_by_path,
        cuts=cuts or (lambda depth: ()),
        targets=targets,
        rates=rates,
        prompt=prompt,
        prefix=prefix,
        updates=updates,
        density=density,
    )


def _axes_by_path(model_axes: Mapping[Path, Axes], train: PyTree) -> PyTree:
    """A leaf of ``train`` kept under a model path takes that path's axes; any other is replicated."""
    if isinstance(train, Mapping):
        return {
            k: model_axes[k] if k in model_axes and operators.is_array(v) else _axes_by_path(model_axes, v)
            for k, v in train.items()
        }
    return jax.tree.map(lambda x: (None,) * len(x.shape), train)


def apply_edits(params: Params, edits: Mapping[Path, Leaf | None]) -> Params:
    """The base that a run keeps: ``params`` with each edited leaf replaced."""
    return paths.replace(params, edits)


def fill(params: Params, train: PyTree, state: PyTree, ctx: Context) -> Params:
    """The ``bind`` of methods whose ``train`` is values by path: puts them into their holes and empty slots."""
    return paths.replace(params, train)


def chain(*methods: Method) -> Method:
    """The methods one after another, each seeing what those before it bound. Associative: nested chains flatten.

    ``train`` and ``state`` are dicts keyed "<position>:<name>".

    Raises (from init):
      TargetError: two methods rewrite one path.
    """
    parts = tuple(p for m in methods for p in (m.parts or (m,)))
    if len(parts) == 1:
        return parts[0]
    names = keys(parts)

    def init(key: Any, params: Params) -> Start:
        edits: dict[Path, Leaf | None] = {}
        owner: dict[Path, str] = {}
        train, state = {}, {}
        bound = params
        for i, (k, m) in enumerate(zip(names, parts, strict=True)):
            start = m.init(jax.random.fold_in(key, i), bound)
            _refuse_twice(m.name, start.edits, owner, paths.flatten(params), paths.flatten(bound))
            owner.update(dict.fromkeys(start.edits, m.name))
            edits.update(start.edits)
            train[k], state[k] = start.train, start.state
            bound = m.bind(paths.replace(bound, start.edits), start.train, start.state, Context())
        return Start(edits, train, state)

    def bind(params: Params, train: PyTree, state: PyTree, ctx: Context) -> Params:
        for i, (k, m) in enumerate(zip(names, parts, strict=True)):
            params = m.bind(params, train[k], state[k], _with_key(ctx, i))
        return params

    def update(train: PyTree, state: PyTree, grads: PyTree, ctx: Context) -> PyTree:
        items = enumerate(zip(names, parts, strict=True))
        return {k: m.update(train[k], state[k], grads[k], _with_key(ctx, i)) for i, (k, m) in items}

    def penalty(train: PyTree, state: PyTree, ctx: Context) -> Any:
        return sum(m.penalty(train[k], state[k], ctx) for k, m in zip(names, parts, strict=True))

    def merge(params: Params, train: PyTree, state: PyTree) -> Params:
        for k, m in zip(names[:-1], parts[:-1], strict=True):
            params = m.bind(params, train[k], state[k], Context())
        return parts[-1].merge(params, train[names[-1]], state[names[-1]])

    def axes(model_axes: Mapping[Path, Axes], train: PyTree) -> PyTree:
        return {k: m.axes(model_axes, train[k]) for k, m in zip(names, parts, strict=True)}

    def cuts(depth: int) -> tuple[int, ...]:
        return tuple(sorted({c for m in parts for c in m.cuts(depth)}))

    def rates(train: PyTree) -> PyTree:
        return {k: m.rates(train[k]) for k, m in zip(names, parts, strict=True)}

    return Method(
        "+".join(m.name for m in parts), init, bind, update, penalty, merge, axes, cuts, parts,
        prompt=sum(m.prompt for m in parts), prefix=max((m.prefix for m in parts), default=0), rates=rates,
        updates=max((m.updates for m in parts), default=0),
    )  # fmt: skip


def _with_key(ctx: Context, i: int) -> Context:
    return ctx if ctx.key is None else ctx._replace(key=jax.random.fold_in(ctx.key, i))


def _refuse_twice(
    name: str, edits: Mapping[Path, Any], owner: Mapping[Path, str], base: Mapping[Path, Any], bound: Mapping[Path, Any]
) -> None:
    for path in edits:
        if path in owner:
            raise errors.TargetError(f"{name} and {owner[path]} both rewrite {path}; target it with one of them")
        if bound[path] is not base.get(path):
            raise errors.TargetError(f"{name} rewrites {path}, which a method before it wraps; put {name} first")


def path_key(key: Any, path: Path) -> Any:
    """A key of its own for each path, whatever else is targeted."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(path.encode()))


class Site(NamedTuple):
    """What a `per_site` method keeps at a site, arrays by name: ``train`` has gradients, ``state`` has none."""

    train: dict[str, Any] = {}  # noqa: RUF012
    state: dict[str, Any] = {}  # noqa: RUF012


AXES = ("in", "out", None)
"""What `per_site`'s ``axes`` may say of an axis."""

SHARED = "shared"
"""Where a `per_site` method's train and state hold what all its sites share; elsewhere they are keyed by path."""


def per_site(
    name: str,
    targets: str | list[str],
    new: Callable[[Any, Any], "dict[str, Any] | Site"],
    wrap: Callable[[Any, dict[str, Any], Context], Any],
    *,
    shared: Callable[[Any, dict[Path, Any]], "dict[str, Any] | Site"] | None = None,
    layers: str | int | None = None,
    axes: Mapping[str, tuple[str | None, ...]] | None = None,
    rates: Mapping[str, float] | None = None,
    kernels: bool = True,
    **others: Any,
) -> Method:
    """A method that wraps each targeted kernel in an operator of its own: two functions, and that is all.

    Args:
      name: of the method, in reports and checkpoints.
      targets: globs over kernels (`core.paths`).
      new: (key, kernel [..., in, out]) -> the site's train arrays by name, each with the kernel's leading axes; or a
        `Site`, where some are frozen. The kernel may be an operator; `operators.dense` reads its values.
      wrap: (kernel, arrays, ctx) -> operator. ``arrays`` are those of train, of state and the shared ones, by name;
        ``ctx.key`` is the site's own.
      shared: (key, kernels by path) -> arrays, or a `Site`, that all sites share.
      layers: only these layers of the stack, as a slice: "-2:".
      axes: how each array is sharded: "in" and "out" stand for the kernel's axes, None for an unsharded one.
      rates: name of an array -> what its learning rate is multiplied by.
      kernels: whether ``targets`` must be kernels of linear layers; anything else that matched is then a TargetError.
      **others: further fields of `method`.

    Raises:
      ConfigError: an axis that is neither "in" nor "out"; from init and bind: ``new``, ``shared`` or ``wrap`` returned
        something else, or ``axes`` or ``rates`` name an array that is not there.
    """
    for array, along in (axes or {}).items():
        for axis in along:
            if axis not in AXES:
                near = errors.did_you_mean(str(axis), [a for a in AXES if a])
                raise errors.ConfigError(
                    f"method {name!r}: axes of {array!r} has {axis!r}; expected 'in', 'out' or None. {near}"
                )

    def init(key: Any, params: Params) -> Start:
        sites = paths.select(params, targets, layers=layers).leaves
        if kernels:
            paths.check_kernels(name, sites)
        made = {p: _begun(name, new, path_key(key, p), p, kernel) for p, kernel in sites.items()}
        common = _as_site(name, "shared", shared(path_key(key, SHARED), sites) if shared else {})
        _check_named(name, [*made.values(), common], axes or {}, rates or {})
        train = {p: s.train for p, s in made.items()} | ({SHARED: common.train} if common.train else {})
        state = {p: s.state for p, s in {**made, SHARED: common}.items() if s.state}
        return Start(train=train, state=state)

    def bind(params: Params, train: PyTree, state: PyTree, ctx: Context) -> Params:
        common = {**train.get(SHARED, {}), **state.get(SHARED, {})}
        wrapped = {}
        for p, arrays in train.items():
            if p != SHARED:
                own = ctx._replace(key=path_key(ctx.key, p) if ctx.train else None)
                wrapped[p] = wrap(paths.get(params, p), {**common, **arrays, **state.get(p, {})}, own)
                if not (operators.is_operator(wrapped[p]) or operators.is_array(wrapped[p])):
                    raise errors.ConfigError(
                        f"method {name!r}: wrap returned {type(wrapped[p]).__name__} at {p}, expected an operator"
                    )
        return paths.replace(params, wrapped)

    def site_axes(model_axes: Mapping[Path, Axes], train: PyTree) -> PyTree:
        return {p: _site_axes(model_axes.get(p), arrays, axes or {}) for p, arrays in train.items()}

    def cuts(depth: int) -> tuple[int, ...]:
        return layer_cuts(layers, depth)

    def site_rates(train: PyTree) -> PyTree:
        return {p: {k: (rates or {}).get(k, 1.0) for k in arrays} for p, arrays in train.items()}

    named = (targets,) if isinstance(targets, str) else tuple(targets)
    return method(name, init, bind, axes=site_axes, cuts=cuts, targets=named, rates=site_rates, **others)


def _begun(name: str, new: Callable[[Any, Any], dict[str, Any] | Site], key: Any, path: Path, kernel: Any) -> Site:
    """What ``new`` makes at ``path``. Raises TargetError where that starts from the values of what has none."""
    try:
        return _as_site(name, "new", new(key, kernel))
    except errors.NotLinear:
        raise errors.TargetError(
            f"{name} starts from the values of {path}, and what a method before it put there is no kernel; "
            f"put {name} first"
        ) from None


def _as_site(name: str, function: str, made: dict[str, Any] | Site) -> Site:
    site = made if isinstance(made, Site) else Site(made)
    if not all(isinstance(arrays, Mapping) for arrays in site):
        found = "an array" if operators.is_array(made) else type(made).__name__
        raise errors.ConfigError(
            f"method {name!r}: {function} returned {found}, expected arrays by name, or a Site of such"
        )
    return site


def _check_named(name: str, made: list[Site], axes: Mapping[str, Any], rates: Mapping[str, Any]) -> None:
    """Raises ConfigError where ``axes`` or ``rates`` name what no site has: it would be without effect."""
    train, state = {k for s in made for k in s.train}, {k for s in made for k in s.state}
    for argument, given, there in (("axes", axes, train | state), ("rates", rates, train)):
        for array in [k for k in given if k not in there]:
            near = errors.did_you_mean(array, there)
            raise errors.ConfigError(f"method {name!r}: {argument} names {array!r}, and there is no such array. {near}")


def _site_axes(kernel: Axes | None, arrays: dict[str, Any], axes: Mapping[str, Axes]) -> dict[str, Axes]:
    *lead, first, last = kernel or (None, None)
    names = {"in": first, "out": last, None: None}
    out = {}
    for name, array in arrays.items():
        tail = tuple(names[a] for a in axes.get(name, ()))
        rank = len(array.shape)
        front = tuple(lead)[: rank - len(tail)]
        out[name] = front + (None,) * (rank - len(tail) - len(front)) + tail
    return out


def layer_cuts(layers: str | int | None, depth: int) -> tuple[int, ...]:
    """Where the stack is to be cut so that ``layers`` are whole segments."""
    return () if layers is None else tuple(c for c in paths.layer_range(layers, depth) if 0 < c < depth)
