"""Files that the package carries: `tiny`, the embedded model, and `tasks`, small sets of rows to tune it on."""

from pathlib import Path

from tunejax.core import errors

FOLDER = Path(__file__).resolve().parent


def path(name: str) -> Path:
    """Where ``name`` ("tiny", "tasks/route_train.jsonl") lies on disk. Raises ConfigError for what is not carried."""
    found = FOLDER / name
    if not found.exists():
        carried = [str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*") if "__pycache__" not in p.parts]
        raise errors.ConfigError(f"the package carries no {name!r}. {errors.did_you_mean(name, carried)}")
    return found
