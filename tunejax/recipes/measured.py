"""What a config wants measured or said, against what its run can: told before the run, from shapes alone."""

from typing import Any

import jax
import numpy as np

from tunejax.config import schema
from tunejax.core import errors
from tunejax.core.method import apply_edits
from tunejax.core.model import key_shape
from tunejax.recipes import assemble, rows, samples, settings
from tunejax.train.step import evaluate


def check(parts: assemble.Parts, found: rows.Rows) -> None:
    """Raises ConfigError on what the config wants measured or said and cannot be."""
    check_classes(parts, found)
    check_prompts(parts, found)
    check_best(parts)
    check_match(parts, found)


def check_classes(parts: assemble.Parts, found: rows.Rows) -> None:
    """Raises ConfigError where the rows' labels are not those of the classification head's outputs.

    Where the config names them, or the head is trained on these rows, it may have more outputs than there are labels.
    """
    outputs, named = parts.model_config.num_labels, found.labels
    told = found.train is not None or parts.config.data.labels
    if parts.config.model.head == "classification" and (len(named) > outputs or (len(named) < outputs and not told)):
        raise errors.ConfigError(
            f"the rows have {len(named)} labels, {', '.join(named)}, and the classification head of {parts.name} has "
            f"{outputs} outputs: name the label of each output, in order, as data.labels"
        )


def check_prompts(parts: assemble.Parts, found: rows.Rows) -> None:
    """Raises ConfigError on a prompt of the config that the model cannot answer."""
    for i, prompt in enumerate(parts.config.generation.prompts if samples.generates(parts) else ()):
        ids = samples.formed(parts, prompt, turns=found.format == samples.CHATS)
        samples.check_room(parts, ids, f"generation.prompts.{i}")


def check_match(parts: assemble.Parts, found: rows.Rows) -> None:
    """Raises ConfigError where exact match is asked for, and there is no answer to match."""
    read = found.held_out
    if not parts.config.evaluation.exact_match or read is None:
        return
    if not samples.generates(parts) or read.report.format not in samples.ANSWERED:
        raise errors.ConfigError(
            f"evaluation.exact_match is true, and rows of the format {read.report.format!r} with "
            f"objective.name: {parts.config.objective.name} have no answer that is generated; expected causal_lm and "
            f"{' or '.join(samples.ANSWERED)}"
        )


def check_best(parts: assemble.Parts, scores: list[str] | None = None) -> None:
    """Raises ConfigError where ``train.metric_for_best_model`` is not among the scores of an evaluation.

    What a teacher adds to them is not known here. scores: of `evaluated`, where it was called already.
    """
    wanted = settings.loop_options(parts.config, 1).best_metric
    if not parts.config.data.eval_path or parts.config.distill is not None or wanted == "eval_loss":
        return
    known = evaluated(parts) if scores is None else scores
    if wanted not in known:
        raise errors.ConfigError(
            f"train.metric_for_best_model: {wanted!r} is not measured while training. "
            f"{errors.did_you_mean(wanted, known)}"
        )


def evaluated(parts: assemble.Parts) -> list[str]:
    """The scores of an evaluation while these parts train, each with "eval_" before it.

    It is traced, not run; so patterns of the method that match nothing raise TargetError here.
    """
    length = parts.config.data.max_length
    whole = jax.ShapeDtypeStruct((2, length), np.int32)
    names = ("tokens", "targets", "positions", "segment_ids", "token_types")
    batch = {**dict.fromkeys(names, whole), "loss_weights": jax.ShapeDtypeStruct((2, length), np.float32)}

    def sums(key: Any, batch: Any) -> Any:
        params = parts.model.init(key)
        begun = parts.method.init(key, params)
        base = apply_edits(params, begun.edits)
        return evaluate(parts.model, parts.method, parts.objective, begun.train, begun.state, base, {}, batch)

    totals = jax.eval_shape(sums, key_shape(), batch)
    found = parts.objective.scores({name: np.zeros(total.shape) for name, (total, _) in totals.items()})
    return sorted(f"eval_{name}" for name in found)


def may_match(config: schema.Config) -> bool:
    """Whether exact match may be measured, before rows are read: a model that writes, rows that may have an answer."""
    asked, format = config.evaluation.exact_match, config.data.format
    default = format in (None, "prompt_completion")
    return config.model.head == "lm" and (default if asked is None else asked and format in (None, *samples.ANSWERED))
