"""Masking for masked language models (BERT, arXiv:1810.04805, section 3.1), anew for each example and epoch."""

import numpy as np

from tunejax.core import errors
from tunejax.data.example import Example


class Masking:
    """Hides tokens: each maskable one with ``probability``; of these 80% become the mask, 10% a random token.

    The same example is masked in the same way for the same seed and epoch, whatever batch it is in. At least one
    token of an example is hidden, so that no example is without loss.
    """

    def __init__(self, mask_token_id: int | None, vocab_size: int, *, probability: float = 0.15, seed: int = 0):
        if mask_token_id is None:
            raise errors.ConfigError("the tokenizer has no mask token, which masked_lm needs (mask_token)")
        if not 0 < probability < 1:
            raise errors.ConfigError(f"mlm_probability is {probability}; expected a number between 0 and 1")
        self.mask_token_id, self.vocab_size = mask_token_id, vocab_size
        self.probability, self.seed = probability, seed

    def __call__(self, example: Example, index: int, epoch: int) -> Example:
        """``example`` (whose loss_weights mark the maskable tokens) with tokens hidden: there weight 1."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed & 0xFFFFFFFF, (epoch << 40) + index]))
        n = len(example.tokens)
        draw, die, other = rng.random(n), rng.random(n), rng.integers(0, self.vocab_size, n, dtype=np.int32)
        maskable = example.loss_weights > 0
        hidden = maskable & (draw < self.probability)
        if not hidden.any():
            hidden = maskable & (draw == np.min(draw[maskable], initial=np.inf))
        shown = np.where(die < 0.8, np.int32(self.mask_token_id), np.where(die < 0.9, other, example.tokens))
        return example._replace(
            tokens=np.where(hidden, shown, example.tokens).astype(np.int32),
            targets=example.tokens,
            loss_weights=hidden.astype(np.float32),
        )
