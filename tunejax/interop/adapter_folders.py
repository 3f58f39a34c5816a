"""Adapter folders of other libraries: which wrote one, on which base, and what it holds."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tunejax.core import errors
from tunejax.interop import adapterhub_read, found, peft, peft_read
from tunejax.interop.found import Found
from tunejax.models.config import ModelConfig


def is_adapter(folder: str | Path) -> bool:
    """Whether it is an adapter folder, whoever wrote it."""
    return (Path(folder) / found.CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The name of its base. Raises CheckpointError where it names none."""
    settings = found.settings(folder)
    named = _reader(settings).base_of(settings)
    if not named:
        key = "model_name" if adapterhub_read.is_adapter(settings) else "base_model_name_or_path"
        raise errors.CheckpointError(f"{folder / found.CONFIG} names no base model in {key}; give one: model.path=...")
    return named


DEFAULTS = {"encoder": "mlm", "decoder": "lm"}


def head_of(folder: Path, kind: str) -> str:
    """The head of its base: "lm", "mlm" or "classification"; where it does not say, that of a language model.

    kind: of the base, "encoder" or "decoder".
    """
    settings = found.settings(folder)
    if adapterhub_read.is_adapter(settings):
        return adapterhub_read.head_of(folder)
    return {v: k for k, v in peft.TASKS.items()}.get(settings.get("task_type") or "", DEFAULTS[kind])


def read(folder: Path, config: ModelConfig, *, head: str) -> Found:
    """What it holds, on a base of this shape. Raises CheckpointError as its reader does."""
    return _reader(found.settings(folder)).read(folder, config, head=head)


def _reader(settings: Mapping[str, Any]) -> ModuleType:
    return adapterhub_read if adapterhub_read.is_adapter(settings) else peft_read
