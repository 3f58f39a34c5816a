"""Where a config's paths lie: embedded files, files of an installed package, environment variables, plain paths."""

import importlib.util
import os
import re
from pathlib import Path

from tunejax.core import errors

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def model(text: str) -> str:
    """The folder or hub id that ``model.path`` means; "embedded" is the tiny model in the package."""
    return str(ASSETS / "tiny") if text == "embedded" else locate(text)


def locate(text: str) -> str:
    """The path or hub id that ``text`` means.

    "embedded:tasks/x.jsonl" lies in this package, "package:NAME/folder" in an installed one, and ``$NAME`` or
    ``${NAME}`` stands for an environment variable.

    Raises:
      ConfigError: no such package, file in it, or variable.
    """
    if text.startswith("embedded:"):
        return _inside(ASSETS, text.removeprefix("embedded:"), text)
    if text.startswith("package:"):
        name, _, rest = text.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise errors.ConfigError(
                f"{text!r}: no package {name!r} is installed (pip install {name.replace('_', '-')})"
            )
        return _inside(Path(spec.submodule_search_locations[0]), rest, text)
    return expanded(text)


def expanded(text: str) -> str:
    """``text`` with ``~`` and environment variables filled in. Raises ConfigError where one is not set."""
    return os.path.expanduser(re.sub(r"\$(?:\{(\w+)\}|(\w+))", _variable, text))


def _variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise errors.ConfigError(f"the environment variable {name}, used in a path of the config, is not set")
    return os.environ[name]


def _inside(folder: Path, rest: str, text: str) -> str:
    path = folder / rest
    if not path.exists():
        there = [str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts]
        raise errors.ConfigError(f"{text!r}: {folder.name} holds no {rest!r}. {errors.did_you_mean(rest, there)}")
    return str(path)
