"""The tensors of an adapter folder of HF PEFT, by the names that they have in a model with its task's head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tunejax.core import errors
from tunejax.interop import found as found_lib
from tunejax.interop import modules, peft_prompts
from tunejax.interop.found import CONFIG
from tunejax.interop.modules import Site
from tunejax.interop.peft import PREFIX, SHARED_PREFIX, TASKS, WEIGHTS
from tunejax.models.config import ModelConfig
from tunejax.models.families import registry

PICKLED = "adapter_model.bin"
"""What versions of PEFT before 0.6 wrote."""
HEADLESS = "FEATURE_EXTRACTION"
"""The task of a model without a head, whose modules have no name of the family before theirs."""
OWN, ORIGINAL = ".modules_to_save.", ".original_module."
"""In names of biases, where all of them are saved, a second time: of a module that trains whole, and of the base's."""


def check_task(settings: Mapping[str, Any]) -> None:
    """Raises CheckpointError on a task whose model is not here."""
    known, task = (*TASKS.values(), HEADLESS), settings.get("task_type")
    if task is not None and task not in known:
        raise errors.CheckpointError(f"{CONFIG}: task_type is {task!r}; known here are {', '.join(known)}, or none")


def read(folder: Path, settings: Mapping[str, Any], config: ModelConfig, head: str) -> dict[str, np.ndarray]:
    """The tensors of a folder, without a tied head's, which PEFT saves beside the table. Modules' have `PREFIX`.

    Raises:
      CheckpointError: as `found.tensors`; no tensors, or pickled ones; table and head trained apart: a model that ties
        them can hold one.
    """
    tensors = _loaded(folder)
    prefix = SHARED_PREFIX if settings.get("peft_type") in peft_prompts.READ else PREFIX
    tensors = {PREFIX + k.removeprefix(prefix) if k.startswith(prefix) else k: x for k, x in tensors.items()}
    if settings.get("task_type") == HEADLESS:
        tensors = _headed(tensors, config, head)
    tensors = {k.replace(OWN, "."): x for k, x in tensors.items() if ORIGINAL not in k}
    tied = modules.tied_head(config, head)
    return tensors if tied is None else _untied(folder / WEIGHTS, _one_bias(folder, tensors, tied), tied, config, head)


def _headed(tensors: dict[str, np.ndarray], config: ModelConfig, head: str) -> dict[str, np.ndarray]:
    """With the family's prefix before each module that has it here; the model may have been one with a head."""
    inner = registry.get(config.family).prefixes[0]
    there = tuple({f"{place.module}." for place in modules.places(config, head).values()})

    def named(key: str) -> str:
        longer = inner + key.removeprefix(PREFIX)
        return PREFIX + longer if longer.startswith(there) else key

    return {named(k): x for k, x in tensors.items()}


def _loaded(folder: Path) -> dict[str, np.ndarray]:
    file, pickled = folder / WEIGHTS, folder / PICKLED
    if pickled.is_file() and not file.is_file():
        raise errors.CheckpointError(
            f"{pickled} is pickled, and pickled weights, which may run code, are never read here. Load the folder with "
            f"PEFT and save it again (save_pretrained): that writes {WEIGHTS}"
        )
    tensors = found_lib.tensors(file)
    if not tensors:
        raise errors.CheckpointError(f"{file} holds no tensors: nothing trained, or all of it was lost in saving")
    return tensors


def _one_bias(folder: Path, tensors: dict[str, np.ndarray], tied: str) -> dict[str, np.ndarray]:
    """With a tied head's bias under one of the two names that it has (in BERT's masked-LM head)."""
    twin, own = f"{PREFIX}{tied}.bias", f"{PREFIX}{tied.rpartition('.')[0]}.bias"
    if twin not in tensors:
        return tensors
    if not np.array_equal(tensors[twin], tensors.get(own, tensors[twin])):
        raise errors.CheckpointError(f"{folder / WEIGHTS}: {twin} and {own} are one in this model, and differ here")
    return {own: tensors[twin], **{k: x for k, x in tensors.items() if k != twin}}


def _untied(
    file: Path, tensors: dict[str, np.ndarray], tied: str, config: ModelConfig, head: str
) -> dict[str, np.ndarray]:
    place = modules.places(config, head).get(Site(peft_prompts.TABLE, modules.OUTSIDE))
    if place is None:
        return tensors
    one, other = tensors.get(f"{PREFIX}{place.module}.{place.name}"), tensors.get(f"{PREFIX}{tied}.weight")
    if one is None and other is None:
        return tensors
    if one is None or other is None or not np.array_equal(one, other):
        there = place.module if one is not None else tied
        raise errors.CheckpointError(
            f"{file}: {there} trained apart from {tied if one is not None else place.module}, which shares its weights "
            "in this model"
        )
    return {k: x for k, x in tensors.items() if k != f"{PREFIX}{tied}.weight"}
