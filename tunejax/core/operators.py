"""What may stand where a kernel stands.

A linear site applies what it finds: an array, or an *operator*, a small pytree dataclass registered here. An
operator's array fields carry the leading axes of the kernel that it stands for (the layer axis in a stack), so
it scans, shards, checkpoints and donates like an array; everything else in it is static.
"""

import abc
import dataclasses
from typing import Any, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
import jax.numpy as jnp

from tunejax.core import errors, paths

T = TypeVar("T")


@runtime_checkable
class Operator(Protocol):
    """Stands for a kernel [..., in, out]. Invariant: where `dense` exists, ``op(x) == x @ op.dense()``."""

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]. The bias comes in because some operators act on xW + b."""
        ...

    def dense(self) -> jax.Array:
        """The equivalent plain kernel [..., in, out]. Raises NotLinear where none exists."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that it stands for."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of the kernel that it stands for."""
        ...


class Above:
    """An operator above a kernel (`beneath`), of which it has the shape and the type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return beneath(self).shape

    @property
    def dtype(self) -> Any:
        """Type of the kernel."""
        return beneath(self).dtype


class Added(Above, abc.ABC):
    """base(x) + x delta(). A class that knows a cheaper way than by the whole of `delta` has `parts` of its own."""

    base: Any

    @abc.abstractmethod
    def delta(self) -> jax.Array:
        """What is added to the kernel [..., in, out], in float32."""

    def parts(self, x: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """What the base gives, and what is added to it; each [..., out]."""
        return apply(self.base, x, bias), apply(self.delta(), x)

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        h, change = self.parts(x, bias)
        return h + change

    def dense(self) -> jax.Array:
        """The sum, added in float32 and rounded once to the type of the base."""
        with jax.default_matmul_precision("highest"):
            delta = self.delta()
        return (dense(self.base).astype(jnp.float32) + delta).astype(self.dtype)


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the operator's structure, not of its arrays."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def operator(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that is a pytree of its non-`static` fields."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    is_static = [bool(f.metadata.get("static")) for f in fields]
    return jax.tree_util.register_dataclass(
        cls,
        data_fields=[f.name for f, s in zip(fields, is_static, strict=True) if not s],
        meta_fields=[f.name for f, s in zip(fields, is_static, strict=True) if s],
    )


def is_operator(leaf: Any) -> bool:
    """Whether a leaf of the parameters is an operator rather than an array."""
    return dataclasses.is_dataclass(leaf) and hasattr(leaf, "dense")


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or the ShapeDtypeStruct of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not is_operator(leaf)


BENEATH = ("base", "inner", "table")
"""Fields in which an operator keeps what it was put around."""


def beneath(kernel: Any) -> Any:
    """What an operator was put around; None where it was put around nothing, and of an array."""
    found = (getattr(kernel, name, None) for name in BENEATH) if is_operator(kernel) else ()
    return next((x for x in found if x is not None), None)


def innermost(kernel: Any) -> Any:
    """The array, or the operator around nothing, that all operators at a leaf were put around: of the model's shape."""
    while (below := beneath(kernel)) is not None:
        kernel = below
    return kernel


def apply(kernel: Any, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x @ kernel + bias in the type of ``x``; x [..., in], kernel [in, out] or an operator -> [..., out]."""
    if is_operator(kernel):
        return kernel(x, bias)
    # One axis of rows: contracting two in the gradient would have the CPU's compiler transpose both operands.
    rows = x.reshape(-1, x.shape[-1]) if kernel.ndim == 2 else x
    out = (rows @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])
    return out if bias is None else out + bias.astype(x.dtype)


def dense(kernel: Any) -> jax.Array:
    """The plain kernel that an array or operator stands for. Raises NotLinear where none exists."""
    return kernel.dense() if is_operator(kernel) else kernel


def dense_bias(kernel: Any, bias: jax.Array) -> jax.Array:
    """The bias [..., out] beside `dense`: ``op(x, bias) == x @ op.dense() + dense_bias(op, bias)``.

    An operator that changes the bias has a method of this name; for any other, that of what is `beneath` it holds.
    """
    if not is_operator(kernel):
        return bias
    own = getattr(kernel, "dense_bias", None)
    return dense_bias(beneath(kernel), bias) if own is None else own(bias)


def densify(params: paths.Params) -> paths.Params:
    """``params`` with every operator replaced by its plain kernel, and the bias beside it by `dense_bias`.

    Raises:
      NotLinear: some operator has none; the message names every such path.
    """
    flat, stuck = paths.flatten(params), []
    for path, leaf in flat.items():
        beside = path.removesuffix("kernel") + "bias"
        try:
            flat[path] = dense(leaf)
        except errors.NotLinear as e:
            stuck.append(f"{path}: {e}")
        if is_operator(leaf) and flat.get(beside) is not None:
            flat[beside] = dense_bias(leaf, flat[beside])
    if stuck:
        raise errors.NotLinear("these parameters have no plain kernel to merge into:\n  " + "\n  ".join(stuck))
    return paths.unflatten(flat)
