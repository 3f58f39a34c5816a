"""The families by the name that config.json gives them."""

import importlib

from tunejax.core import errors
from tunejax.models.family import Family

NAMES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert")


def get(model_type: str) -> Family:
    """The family of that ``model_type``. Raises CheckpointError for one that is not supported."""
    if model_type not in NAMES:
        raise errors.CheckpointError(
            f"model_type {model_type!r} is not a supported family. {errors.did_you_mean(model_type, NAMES)}"
        )
    return importlib.import_module(f"tunejax.models.families.{model_type}").FAMILY
