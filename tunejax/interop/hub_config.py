"""The ``config`` of AdapterHub's adapter folders (BnConfig of its library), from a method's arguments and back.

There, with x the residual, b the branch, f the adapter and `norm` the block's norm where it comes last:

    original_ln_before: false    norm(x + b + f(b))                     reads: branch
    original_ln_before: true     norm(x + b + f(norm(x + b)))           reads: sum
    is_parallel: true            norm(x + b + f(x))                     reads: residual
"""

from collections.abc import Mapping
from typing import Any

from tunejax.core import activations, errors, portable
from tunejax.models.config import ModelConfig

DEFAULTS: dict[str, Any] = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": False,
    "non_linearity": None, "original_ln_after": True, "original_ln_before": False, "output_adapter": False,
    "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1,
    "reduction_factor": None, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
"""Every entry of version 1.3.0, with what it is where a folder lacks it; None: it must be there."""
REFUSED = {
    "inv_adapter": (None, "adapters of the embeddings (invertible ones)"),
    "ln_before": (False, "a norm of the adapter's own"),
    "ln_after": (False, "a norm of the adapter's own"),
}
"""Entry -> (the value that can be read, what any other one adds)."""
TRAINED_SCALES = ("learned", "channel")
DETAILS = "docs/adapterhub.md has what can be read"
LEGACY = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What folders that name no version call an activation -> what it is called since."""


def written(form: portable.Hub, arguments: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The entries that a method's arguments are; where it stands and its widths are for the caller to add.

    Raises:
      ConfigError: the library has no adapter that reads what this one does.
    """
    arguments = form.meant(arguments)
    reads = arguments.get("reads", "branch")
    if reads == "input":  # of a parallel adapter, the MLP's own
        if config.kind != "encoder":
            raise errors.ConfigError(
                "AdapterHub's parallel adapter reads what the MLP's output is added to, and this one the MLP's own "
                "input, which is normed in this model; only one with reads: residual can be written"
            )
        reads = "residual"
    activation = arguments.get("activation") or config.activation
    return {
        **DEFAULTS,
        **form.written,
        **form.flags,
        **form.fixed,
        **{theirs: arguments[k] for k, theirs in form.entries.items()},
        "original_ln_before": reads == "sum",
        "is_parallel": reads == "residual",
        "non_linearity": _name_of(activation),
        "scaling": float(arguments.get("scale", 1.0)),
    }


def _name_of(activation: str) -> str:
    names = {ours: theirs for theirs, ours in reversed(activations.HUGGING_FACE.items())} | {"silu": "swish"}
    if activation not in names:
        raise errors.ConfigError(f"AdapterHub has no activation {activation!r}; it has {', '.join(names)}")
    return names[activation]


def factor(width: int, embed: int) -> float:
    """The reduction factor from which the library computes that width, as int(embed // factor)."""
    return embed // width if embed % width == 0 else embed / (width + 0.5)


def arguments(form: portable.Hub, found: Mapping[str, Any], config: ModelConfig, *, legacy: bool) -> dict[str, Any]:
    """The method's arguments but targets, layers and width, which the tensors answer.

    Args:
      form: of the method.
      found: the folder's entries.
      config: of the model.
      legacy: the folder names no version of the library.

    Raises:
      CheckpointError: every entry that changes what it computes and has no exact form here, by name.
    """
    unknown = [f"{k}: {v!r} is not known" for k, v in found.items() if k not in DEFAULTS and k != "architecture"]
    entries = {**DEFAULTS, **found}
    problems = unknown + [f"{k} is missing" for k in ("non_linearity", "reduction_factor") if entries[k] is None]
    problems += [
        f"{k}: {entries[k]!r} is {what}, which no method here has"
        for k, (plain, what) in REFUSED.items()
        if entries[k] != plain
    ]
    fixed = ((k, v) for k, v in form.fixed.items() if entries[k] != v)
    problems += [f"{k} is {entries[k]!r}, and can be read as {v!r} only" for k, v in fixed]
    if entries["scaling"] in TRAINED_SCALES and form.scaled is None:
        problems.append(f"scaling: {entries['scaling']!r} is trained, and this kind has no such factor here")
    elif not _number(entries["scaling"]) and entries["scaling"] not in TRAINED_SCALES:
        problems.append(f"scaling is {entries['scaling']!r}, expected a number or one of {', '.join(TRAINED_SCALES)}")
    if problems:
        raise errors.CheckpointError("adapter_config.json: " + "; ".join(problems) + f" ({DETAILS})")
    return {
        **{ours: entries[theirs] for ours, theirs in form.entries.items()},
        "reads": _reads(entries, config),
        "activation": activation(str(entries["non_linearity"]).lower(), legacy),
        "scale": float(entries["scaling"]) if _number(entries["scaling"]) else 1.0,
    }


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def activation(name: str, legacy: bool) -> str:
    """What an activation is called here. Raises CheckpointError where it has no name."""
    name = LEGACY.get(name, name) if legacy else name
    if name not in activations.HUGGING_FACE:
        near = errors.did_you_mean(name, activations.HUGGING_FACE)
        raise errors.CheckpointError(f"adapter_config.json: non_linearity {name!r} is not known here. {near}")
    return activations.HUGGING_FACE[name]


def _reads(entries: Mapping[str, Any], config: ModelConfig) -> str:
    """What the adapter reads, of those combinations that add what it gives to the branch."""
    before, after = entries["original_ln_before"], entries["original_ln_after"]
    kept = entries["residual_before_ln"]
    if entries["is_parallel"] and after:
        return "residual"
    if not entries["is_parallel"] and not before and after and kept in (True, False):
        return "branch"
    if not entries["is_parallel"] and before and after and kept is True:
        return "sum"
    # Without a norm after the sum, sum + f(sum) is the residual, the branch and what the adapter adds.
    if not entries["is_parallel"] and before and not after and kept is False and config.kind == "decoder":
        return "sum"
    shown = ("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln")
    raise errors.CheckpointError(
        f"adapter_config.json: {', '.join(f'{k}: {entries[k]!r}' for k in shown)} together have no exact form on a "
        f"{config.family}: the block's norm or its residual would be left out or come twice ({DETAILS})"
    )
