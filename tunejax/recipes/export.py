"""`tunejax export RUN --output FOLDER`: the tuned model for transformers, or its adapter for another library."""

import argparse
from pathlib import Path
from types import ModuleType

from tunejax.config import locate
from tunejax.core import errors, operators, paths
from tunejax.interop import adapterhub, peft
from tunejax.recipes import artefact, exported, folder, runtime

LIBRARIES: dict[str, ModuleType] = {"peft": peft, "adapterhub": adapterhub}
"""Format -> what writes an adapter alone in it."""


def main(args: argparse.Namespace) -> None:
    """Writes what the run trained: merged into its base as one checkpoint, or alone as an adapter.

    Raises:
      NotLinear: an operator has no plain kernel.
      ConfigError: the output folder holds something, or the library has no form for the method.
    """
    output = folder.new(args.output)
    runtime.begin()
    tuned = artefact.open_run(args.run)
    (_alone if args.format in LIBRARIES else _merged)(output, tuned, args)
    print(f"{output}: {tuned.parts.name} tuned by {tuned.parts.method.name}")


def _merged(output: Path, tuned: artefact.Tuned, args: argparse.Namespace) -> None:
    merged = tuned.parts.method.merge(tuned.base, tuned.train, tuned.state)
    if any(layers["gate"] is not None for layers in merged["layers"].values()):
        raise errors.ConfigError("the run masks layers, which no checkpoint can say; cut them: tunejax shrink")
    exported.save(output, merged, tuned.parts.model_config, tuned, args.dtype)


def _alone(output: Path, tuned: artefact.Tuned, args: argparse.Namespace) -> None:
    if args.dtype:
        raise errors.ConfigError("--dtype is of merged weights; an adapter alone is float32")
    parts = tuned.parts
    if parts.config.model.layers or parts.config.model.random_init:
        raise errors.ConfigError(
            "the run's base is not the checkpoint as it is (model.layers, model.random_init), and "
            "an adapter alone would go on another: export it with --format hf"
        )
    if len(parts.front) < len(parts.prompt):
        raise errors.ConfigError(
            f"data.template places {len(parts.prompt)} virtual tokens in the text, and --format {args.format} has them "
            "before it: such a run is no adapter of that library"
        )
    head = parts.config.model.head or "lm"
    lost = [p for p in tuned.loaded.fresh if p not in _whole(tuned) and not _of_head(p, head)]
    if lost:
        raise errors.ConfigError(
            f"the base has no {lost[0]}: the run drew it from its seed, and an adapter alone cannot carry it; "
            "export it with --format hf"
        )
    specs = parts.config.method if isinstance(parts.config.method, list) else [parts.config.method]
    where = locate.model(parts.config.model.path)
    base = str(parts.folder.resolve()) if Path(where).is_dir() else where
    written = peft.Tuned(specs, parts.method, tuned.base, tuned.train, tuned.state)
    library = LIBRARIES[args.format]
    library.write(output, written, parts.model_config, head=head, base_name=base)
    if any(map(operators.is_operator, paths.flatten(tuned.base).values())):
        print("note: the run rounded its base, and the adapter was trained on that: load the base in 4 or 8 bits too")


def _whole(tuned: artefact.Tuned) -> set[str]:
    """Names of what trains, paths of what trains whole among them."""
    parts = tuned.train.values() if tuned.parts.method.parts else [tuned.train]
    return {path for part in parts for path in part}


def _of_head(path: str, head: str) -> bool:
    return any(paths.matches(glob, path) for glob in peft.HEADS.get(head, ()))
