"""Classification as a cloze: a masked language model fills the gap with a label's word.

PET (Schick and Schütze, 2021, arXiv:2001.07676, section 3.1), whose pattern and verbalizer these are; P-tuning (Liu et
al., 2021, arXiv:2103.10385) trains virtual tokens in the pattern.
"""

from collections.abc import Mapping

from tunejax.core import errors
from tunejax.core.objective import Objective
from tunejax.objectives import classification


def make(
    *,
    verbalizer: Mapping[str, int] | None = None,
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] | None = None,
) -> Objective:
    """Cross-entropy over the labels' words alone, at the position of each row's greatest loss_weight (the mask).

    Args:
      verbalizer: label -> id of its word, in the order of the targets.
      label_smoothing, class_weights: as in `classification.make`, as are the metrics.

    Raises:
      ConfigError: fewer than two words, or one word for two labels.
    """
    words = dict(verbalizer or {})
    if len(words) < 2 or len(set(words.values())) < len(words):
        raise errors.ConfigError(
            f"objective.verbalizer has the words {list(words.values())} for {list(words)}; expected a word of its own "
            "for each of two labels or more"
        )
    return classification.objective("cloze", label_smoothing, class_weights, tuple(words.values()))
