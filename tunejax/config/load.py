"""YAML and ``key=value`` overrides to a checked Config; every problem of a config in one message."""

import re
import types
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from tunejax.config import schema
from tunejax.core import errors

ELSEWHERE = {
    "bf16": "model.dtype=bfloat16",
    "fp16": "model.dtype=bfloat16",
    "torch_dtype": "model.dtype",
    "gradient_checkpointing": "model.remat=full",
    "max_seq_length": "data.max_length",
    "dataset": "data.path",
    "model_name_or_path": "model.path",
    "truncate": "data.truncation=end",
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "batch_size": "train.train_batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "peft": "method",
    "adapter": "method",
    "lora": "method={name: lora}",
}
"""What other tools call it -> what it is here."""


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 as a number (YAML 1.1 reads it as text) and a key given twice refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [self.construct_object(k, deep=deep) for k, _ in node.value]
        twice = {str(k) for k in keys if keys.count(k) > 1}
        if twice:
            raise errors.ConfigError(f"line {node.start_mark.line + 1}: given twice: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text. Raises ConfigError with the origin, line and column."""
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except errors.ConfigError as e:
        raise errors.ConfigError(f"{origin}: {e}") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise errors.ConfigError(f"{origin}:{where} is not YAML: {getattr(e, 'problem', None) or e}") from None


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError where there is none."""
    path = Path(path)
    if not path.is_file():
        near = (
            errors.did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        )
        raise errors.ConfigError(f"no config file at {path}. {near}".strip())
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise errors.ConfigError(f"{path} is not UTF-8 text (byte {e.start})") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise errors.ConfigError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    return raw


def override(raw: dict[str, Any], assignments: list[str], strict: bool = True) -> dict[str, Any]:
    """``raw`` with ``dotted.key=value`` applied in order; values are YAML. A number walks into a list.

    strict: refuse keys that the config of a run does not have.

    Raises:
      ConfigError: not of that form, or an unknown key, with the nearest one.
    """
    known = keys()
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise errors.ConfigError(
                f"override {text!r} is not of the form key=value, such as train.learning_rate=1e-4"
            )
        if strict and not _is_known(name, known):
            raise errors.ConfigError(f"override {text!r}: unknown key {name!r}. {_hint(name, known)}")
        raw = _set(raw, name.split("."), parse_yaml(value, f"override {text!r}"), text)
    return raw


def with_values(raw: dict[str, Any], values: dict[str, Any], origin: str) -> dict[str, Any]:
    """``raw`` with values by dotted key, as `override` does it. Raises ConfigError on an unknown key."""
    known = keys()
    for name, value in values.items():
        if not _is_known(name, known):
            raise errors.ConfigError(f"{origin}: unknown key {name!r}. {_hint(name, known)}")
        raw = _set(raw, name.split("."), value, f"{origin}: {name}")
    return raw


def _set(node: Any, path: list[str], value: Any, text: str) -> Any:
    if not path:
        return value
    key, *rest = path
    if isinstance(node, list):
        if not key.lstrip("-").isdigit() or not -len(node) <= int(key) < len(node):
            raise errors.ConfigError(f"override {text!r}: {key!r} is not a place in a list of {len(node)}")
        return [_set(x, rest, value, text) if i == int(key) % len(node) else x for i, x in enumerate(node)]
    if node is None:
        node = {}
    if isinstance(node, str) and rest == []:
        node = {"name": node}
    if not isinstance(node, dict):
        raise errors.ConfigError(f"override {text!r}: {key!r} lies inside the value {node!r}, which has no keys")
    return {**node, key: _set(node.get(key), rest, value, text)}


def load(path: str | Path, assignments: list[str] | tuple[str, ...] = ()) -> schema.Config:
    """The checked config of a file and overrides. Raises ConfigError listing every problem."""
    return check(override(read_file(path), list(assignments)), str(path))


def check(raw: dict[str, Any], origin: str = "config") -> schema.Config:
    """The checked config of a mapping. Raises ConfigError listing every problem with its full key."""
    try:
        return schema.Config.model_validate(raw)
    except ValidationError as e:
        said = problems(e, keys(), origin)
    if "compare" in raw:
        said = f"{origin} is a config of tunejax compare: it has a section 'compare'"
    raise errors.ConfigError(said)


def problems(error: ValidationError, known: list[str], origin: str, prefix: str = "") -> str:
    """Every problem of a config, a line each. known: its keys; prefix: put before each."""
    lines = [f"  {_explain(p, known, prefix)}" for p in error.errors()]
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return f"{origin}: {count}\n" + "\n".join(dict.fromkeys(lines))


def _explain(problem: Any, known: list[str], prefix: str = "") -> str:
    """One line about a problem that pydantic found; ``known`` are the keys that could have been meant."""
    inner = ".".join(str(x) for x in problem["loc"])
    name = (prefix + inner).rstrip(".") or "config"
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"{name}: unknown key. {_hint(inner, known)}"
    if kind == "missing":
        return f"{name}: required, and not given"
    said = problem["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    shown = "" if kind == "value_error" else f", found {found!r}"
    return f"{name}: {said}{shown}"


def keys(section: type[BaseModel] = schema.Config, prefix: str = "") -> list[str]:
    """Every dotted key of the config."""
    found = []
    for name, field in section.model_fields.items():
        found.append(prefix + name)
        inner = _model_of(field.annotation)
        if inner is not None:
            found += keys(inner, f"{prefix}{name}.")
    return found


def _model_of(annotation: Any) -> type[BaseModel] | None:
    several = isinstance(annotation, types.UnionType) or get_origin(annotation) is list
    for one in get_args(annotation) if several else [annotation]:  # a section that may be left out, or stand often
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


_OPEN = ("method", "objective", "data.columns", "data.path", "expected", "generation.prompts")


def _is_known(name: str, known: list[str]) -> bool:
    return name in known or any(name.startswith(f"{o}.") for o in _OPEN)


def _hint(name: str, known: list[str]) -> str:
    """The nearest key: by what other tools call it, by its last part in another section, or by likeness."""
    last = name.rsplit(".", 1)[-1]
    if last in ELSEWHERE:
        return f"It is {ELSEWHERE[last]} here."
    same = [k for k in known if k.rsplit(".", 1)[-1] == last]
    if same:
        return f"Did you mean {' or '.join(repr(s) for s in same)}?"
    section = name.rpartition(".")[0]
    inside = [k for k in known if k.rpartition(".")[0] == re.sub(r"\.\d+", "", section)]
    by_last = {k.rsplit(".", 1)[-1]: k for k in known}
    near = [f"{section}.{n}".lstrip(".") for n in errors.nearest(last, [k.rsplit(".", 1)[-1] for k in inside], 1)]
    near = near or [by_last[n] for n in errors.nearest(last, by_last, 1)]
    return errors.did_you_mean(name, near or inside or known)


def dump(config: schema.Config) -> str:
    """The resolved config as YAML, which `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat(config: schema.Config) -> dict[str, Any]:
    """Dotted key -> value; lists and open mappings are values."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for k, v in node.items():
            name = f"{prefix}{k}"
            out.update(walk(v, f"{name}.") if isinstance(v, dict) and name not in _OPEN else {name: v})
        return out

    return walk(config.model_dump(mode="json"), "")


def differences(ours: schema.Config, theirs: schema.Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ -> (ours, theirs)."""
    a, b = flat(ours), flat(theirs)
    return {k: (a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k)}


def fields_help() -> str:
    """One line a key: name, default, description; for `tunejax train --keys`."""
    lines = []

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            inner = _model_of(field.annotation)
            if inner is not None:
                walk(inner, f"{prefix}{name}.")
            else:
                default = "required" if field.is_required() else repr(field.default)
                choices = [a for a in get_args(field.annotation) if isinstance(a, str)]
                more = field.description or (" | ".join(choices) if choices else "")
                lines.append(f"{prefix}{name:<{44 - len(prefix)}} {default:<22} {more}".rstrip())

    walk(schema.Config, "")
    return "\n".join(lines)
