"""The run folder: which config it belongs to, and the files in it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunejax.config import load, schema
from tunejax.core import errors

MAY_DIFFER = ("output_dir", "train.progress", "train.report_to", "mesh", "generation", "evaluation", "expected")
"""Keys that a run may be resumed with other values of: none of them changes what is trained (but see `may_differ`)."""


def claim(config: schema.Config) -> Path:
    """The run folder of ``config``, new or to be resumed. Writes nothing.

    Raises:
      ConfigError: the folder is a file, holds something else, or belongs to a run of another config.
    """
    path = Path(config.output_dir)
    if path.exists() and not path.is_dir():
        raise errors.ConfigError(f"output_dir {path} is a file; name a folder")
    if not (path / "config.yaml").is_file():
        if path.is_dir() and any(path.iterdir()):
            raise errors.ConfigError(f"output_dir {path} is not empty and not a run folder (it has no config.yaml)")
        return path
    before = load.load(path / "config.yaml")
    changed = {k: v for k, v in load.differences(config, before).items() if not may_differ(k, config)}
    if changed:
        lines = [f"  {k}: {old!r} there, {new!r} now" for k, (new, old) in changed.items()]
        raise errors.ConfigError(
            f"{path} is a run with another config:\n" + "\n".join(lines) + "\nName another output_dir to start anew."
        )
    return path


def may_differ(key: str, config: schema.Config) -> bool:
    """Whether a run of ``config`` may be resumed with another value of ``key``."""
    writes = None if config.distill is None else config.distill.on_policy
    if key == "generation.max_new_tokens" and writes is not None and writes.max_new_tokens is None:
        return False  # the student learns from texts of that length
    return key.startswith(MAY_DIFFER)


def begin(config: schema.Config) -> Path:
    """Makes the folder and saves the resolved config in it."""
    path = Path(config.output_dir)
    path.mkdir(parents=True, exist_ok=True)
    write(path / "config.yaml", load.dump(config))
    return path


def new(text: str) -> Path:
    """A folder to write to. Raises ConfigError where it holds something."""
    path = Path(text)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise errors.ConfigError(f"output {path} exists and is not an empty folder; name a new one")
    return path


def find(text: str) -> Path:
    """The run folder at ``text``. Raises ConfigError where there is none."""
    path = Path(text)
    if not (path / "config.yaml").is_file():
        what = "no such folder" if not path.exists() else "no run folder (it has no config.yaml)"
        near = [p.parent.name for p in path.parent.glob("*/config.yaml")] if path.parent.is_dir() else []
        raise errors.ConfigError(f"{path}: {what}. {errors.did_you_mean(path.name, near)}".strip())
    return path


def write(path: Path, text: str) -> None:
    """Writes a whole file or nothing: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON; NaN and infinity, which JSON has no word for, as null."""
    write(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_numbers(path: Path) -> dict[str, Any]:
    """What `write_json` wrote of numbers by name; null is NaN again."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {k: number(v) for k, v in found.items()}


def number(value: Any) -> Any:
    """A number that `write_json` wrote: null is NaN again."""
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSON Lines; NaN and infinity as null."""
    write(path, "".join(json.dumps(_finite(r), ensure_ascii=False, allow_nan=False) + "\n" for r in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file that this package wrote; a half-written last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
