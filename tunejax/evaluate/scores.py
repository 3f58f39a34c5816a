"""What follows from a mean loss."""

import math
from collections.abc import Mapping


def with_perplexity(scores: Mapping[str, float]) -> dict[str, float]:
    """``scores`` with perplexity = exp(nll), where that or a loss in nats a token is among them.

    nll is there where the loss is more than cross-entropy (smoothed labels, z_loss).
    """
    if "loss" not in scores:
        return dict(scores)
    loss = scores.get("nll", scores["loss"])
    return {**scores, "perplexity": math.inf if loss >= 709 else math.exp(loss)}
