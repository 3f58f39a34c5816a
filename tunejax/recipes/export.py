"""`tunejax export RUN --output FOLDER`: the tuned model as a checkpoint that transformers loads."""

import argparse
from pathlib import Path

from tunejax.core import errors
from tunejax.interop import hf
from tunejax.recipes import artefact, runtime


def main(args: argparse.Namespace) -> None:
    """Merges what the run trained into its base and writes both as one.

    Raises:
      NotLinear: an operator has no plain kernel.
      ConfigError: the output folder holds something.
    """
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise errors.ConfigError(f"--output {output} exists and is not an empty folder; name a new one")
    runtime.begin()
    tuned = artefact.open_run(args.run)
    merged = tuned.parts.method.merge(tuned.base, tuned.train, tuned.state)
    head = tuned.parts.config.model.head or "lm"
    hf.save(
        output,
        merged,
        tuned.parts.model_config,
        head=head,
        dtype=args.dtype,
        tokenizer_from=artefact.tokenizer_folder(tuned.parts),
    )
    print(f"{output}: {tuned.parts.name} tuned by {tuned.parts.method.name}, with head {head!r}")
