"""What follows from a mean loss."""

import math
from collections.abc import Mapping


def with_perplexity(scores: Mapping[str, float]) -> dict[str, float]:
    """``scores`` with perplexity = exp(loss), where a loss in nats a token is among them."""
    if "loss" not in scores:
        return dict(scores)
    loss = scores["loss"]
    return {**scores, "perplexity": math.inf if loss >= 709 else math.exp(loss)}
