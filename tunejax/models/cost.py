"""What a model costs by its shape: parameters, and FLOPs of a forward pass."""

import math

import jax

from tunejax.core import paths
from tunejax.core.model import key_shape
from tunejax.models import build
from tunejax.models.config import ModelConfig


def parameters(config: ModelConfig, head: str) -> int:
    """Entries of all parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(_shapes(config, head)))


def forward_flops(config: ModelConfig, head: str, length: int) -> int:
    """FLOPs a token of a forward pass over rows of ``length`` tokens: products alone, two for each multiply and add.

    Each kernel of the stack and the vocabulary's head multiply every token; scores and mixing are over all pairs. What
    sees one position of a row (pooler, classifier) is left out.
    """
    flat = paths.flatten(_shapes(config, head))
    whole = [p for p in flat if p.endswith("kernel") and p.startswith(("layers/", "mlm/", "head/"))]
    kernels = sum(paths.size(flat[p]) for p in whole if head != "classification" or p.startswith("layers/"))
    tied = config.vocab_size * config.embed_dim if head == "mlm" or (head == "lm" and config.tie_embeddings) else 0
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * length
    return 2 * (kernels + tied + attention)


def _shapes(config: ModelConfig, head: str) -> paths.Params:
    return jax.eval_shape(build.build(config, head=head).init, key_shape())
