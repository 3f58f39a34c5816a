"""The logical axes of every parameter, by one short table of path patterns. Sharding rules map them to a mesh."""

from tunejax.core import paths
from tunejax.core.method import Axes

TABLE: tuple[tuple[str, Axes], ...] = (
    ("embed/table", ("vocab", "embed")),
    ("positions/table", ("positions", "embed")),
    ("types/table", (None, "embed")),
    ("attention/q/kernel", ("embed", "heads")),
    ("attention/{k,v}/kernel", ("embed", "kv")),
    ("attention/o/kernel", ("heads", "embed")),
    ("attention/q/bias", ("heads",)),
    ("attention/{k,v}/bias", ("kv",)),
    ("mlp/{gate,up}/kernel", ("embed", "mlp")),
    ("mlp/{gate,up}/bias", ("mlp",)),
    ("mlp/down/kernel", ("mlp", "embed")),
    ("attention/{q_norm,k_norm}/scale", (None,)),
    ("attention/prefix", (None, "kv")),
    ("{attention,mlp}/join", ("embed",)),
    ("/layers/*/gate", ()),
    ("/ladder", ()),
    ("pooler/kernel", ("embed", None)),
    ("mlm/dense/kernel", ("embed", None)),
    ("/{pooler,mlm/dense}/bias", (None,)),
    ("mlm/bias", ("vocab",)),
    ("classifier/kernel", ("embed", None)),
    ("classifier/bias", (None,)),
    ("{norm,embed_norm}/{scale,bias}", ("embed",)),
    ("{o,down}/bias", ("embed",)),
)
"""First match wins."""


def of(path: paths.Path, head: str) -> Axes:
    """The axes of the leaf (or empty slot) at ``path``, the layer axis of a stack included."""
    front: Axes = ("layers",) if path.startswith("layers/") else ()
    if path.startswith("head/"):
        out = "vocab" if head == "lm" else None
        return ("embed", out) if path.endswith("kernel") else (out,)
    return front + next(axes for pattern, axes in TABLE if paths.matches(pattern, path))
