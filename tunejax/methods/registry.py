"""Methods by name: from a config's ``method:`` to a `Method`. A method's module is imported when it is asked for."""

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tunejax.core import errors, peft_words, rates
from tunejax.core import method as methods
from tunejax.core.method import Method

NAMES: dict[str, str] = {
    "full": "tunejax.methods.full:full",
    "last_k": "tunejax.methods.full:last_k",
    "bitfit": "tunejax.methods.bitfit:bitfit",
    "lora": "tunejax.methods.lora:lora",
    "quantize": "tunejax.methods.quantize:quantize",
    "ia3": "tunejax.methods.ia3:ia3",
    "houlsby": "tunejax.methods.adapter:houlsby",
    "pfeiffer": "tunejax.methods.adapter:pfeiffer",
    "parallel_adapter": "tunejax.methods.parallel_adapter:parallel_adapter",
    "compacter": "tunejax.methods.compacter:compacter",
    "norm_tuning": "tunejax.methods.norms:norm_tuning",
    "fish": "tunejax.methods.fish:fish",
    "lt_sft": "tunejax.methods.lt_sft:lt_sft",
    "diff_pruning": "tunejax.methods.diff_pruning:diff_pruning",
    "lora_fa": "tunejax.methods.lora:lora_fa",
    "lora_plus": "tunejax.methods.lora:lora_plus",
    "dora": "tunejax.methods.dora:dora",
    "pissa": "tunejax.methods.lora_init:pissa",
    "olora": "tunejax.methods.lora_init:olora",
    "vera": "tunejax.methods.vera:vera",
    "adalora": "tunejax.methods.adalora:adalora",
    "loha": "tunejax.methods.loha:loha",
    "lokr": "tunejax.methods.lokr:lokr",
    "krona": "tunejax.methods.lokr:krona",
    "oft": "tunejax.methods.oft:oft",
    "boft": "tunejax.methods.oft:boft",
    "hra": "tunejax.methods.hra:hra",
    "fourierft": "tunejax.methods.fourierft:fourierft",
    "miss": "tunejax.methods.miss:miss",
    "said": "tunejax.methods.said:said",
    "loreft": "tunejax.methods.reft:loreft",
    "prompt_tuning": "tunejax.methods.prompt_tuning:prompt_tuning",
    "p_tuning": "tunejax.methods.p_tuning:p_tuning",
    "prefix_tuning": "tunejax.methods.prefix:prefix_tuning",
    "p_tuning_v2": "tunejax.methods.prefix:p_tuning_v2",
    "mam": "tunejax.methods.mam:mam",
    "gated": "tunejax.methods.gated:gated",
    "unipelt": "tunejax.methods.unipelt:unipelt",
    "s4": "tunejax.methods.s4:s4",
    "loftq": "tunejax.methods.loftq:loftq",
    "lst": "tunejax.methods.lst:lst",
    "adapter_fusion": "tunejax.methods.fusion:adapter_fusion",
    "adapter_stack": "tunejax.methods.stack:adapter_stack",
    "shrink": "tunejax.methods.shrink:shrink",
    "prune": "tunejax.methods.prune:prune",
    "supernet": "tunejax.methods.supernet:supernet",
}
"""Name in a config -> where its factory lies."""


def build(
    specs: Mapping[str, Any] | str | Sequence[Mapping[str, Any] | str],
    tokenize: Callable[[str], list[int]] | None = None,
    load: Callable[[str], Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    within: tuple[Any, ...] = (),
) -> Method:
    """The method that a config describes: ``{name: lora, rank: 8}``, or a list of such to chain, first first.

    A name is one of `NAMES`, "path/to/file.py:function" or "package.module:function"; the other keys are the
    function's arguments, and `rates.SCALE`. An argument that is a method itself is described likewise. The function
    returns a `Method`, or, as a preset, a list of descriptions. PEFT's spellings are accepted where a method knows
    them.

    Args:
      specs: as above.
      tokenize: text -> ids, for arguments that a method takes as token ids (its module's TEXTS).
      load: folder of a finished run -> (what it trained, the description of its method), for arguments that are lists
        of these folders (named in its module's LOADED). The descriptions must agree with this one (its module's AGREE).
      facts: name -> what is so of the model, for arguments that follow from it (its module's FACTS) and are not given.
      within: the descriptions of the presets that this is part of.

    Raises:
      ConfigError: unknown name, unknown or missing argument, wrong type: with what was found and the nearest choice; a
        preset that names itself.
    """
    listed = [specs] if isinstance(specs, Mapping | str) else list(specs)
    if not listed:
        raise errors.ConfigError(f"method: the list is empty; name at least one of {', '.join(NAMES)}")
    return methods.chain(*(_one(s, tokenize, load, facts, within) for s in spelled_out(listed)))


def spelled_out(specs: Sequence[Mapping[str, Any] | str]) -> list[Any]:
    """The descriptions, with several in place of one that says in PEFT's words what is several here (`peft_words`)."""
    out: list[Any] = []
    for spec in specs:
        if isinstance(spec, Mapping) and isinstance(spec.get("name"), str) and spec.keys() & set(peft_words.WORDS):
            out += peft_words.spread(spec, *find(spec["name"]))
        else:
            out.append(spec)
    return out


def _one(spec: Mapping[str, Any] | str, tokenize: Any, load: Any, facts: Any, within: tuple[Any, ...]) -> Method:
    if spec in within:
        raise errors.ConfigError(f"method: the preset {spec} names itself, also by way of others; it would never end")
    within = (*within, spec)
    name, factory, given, _ = _called(spec, tokenize, load, facts, within)
    made = factory(**given)
    if isinstance(made, list):  # a preset: a method that is a chain of others
        made = build(made, tokenize, load, facts, within)
    if not isinstance(made, Method):
        raise errors.ConfigError(f"method {name!r}: the function returned {type(made).__name__}, no Method and no list")
    return rates.at_rate(made, scale_of(spec))


def with_kept(
    specs: Mapping[str, Any] | str | Sequence[Mapping[str, Any] | str], state: Callable[[], Mapping[str, Any]]
) -> list[Any]:
    """The descriptions with what a finished run keeps itself of the runs that it names, whose folders may be gone.

    state: () -> that of the run's method; called where a method takes from other runs and its module's LOADED says how
      its state gives what it took.
    """
    listed = [specs] if isinstance(specs, Mapping | str) else specs
    out = [{"name": s} if isinstance(s, str) else dict(s) for s in listed]
    places = [str(s.get("name")).rpartition(":")[2] for s in out]
    for i, spec in enumerate(out):
        name = spec.get("name")
        taken = getattr(find(name)[1], "LOADED", ()) if isinstance(name, str) else ()
        if isinstance(taken, Mapping):
            own = state() if len(out) == 1 else _nth(state(), places, i)
            spec |= {key: of(own) for key, of in taken.items() if key in spec and own}
    return out


def _nth(state: Mapping[str, Any], names: list[str], i: int) -> Any:
    """The state of what is ``names[i]`` in a list of methods; None where the chain has not as many of that name.

    Its place in the chain (`core.method.chain`) is not that in the list, since a preset is several parts.
    """
    found = sorted((k for k in state if k.partition(":")[2] == names[i]), key=lambda k: int(k.partition(":")[0]))
    return state[found[names[:i].count(names[i])]] if len(found) == names.count(names[i]) else None


def scale_of(spec: Mapping[str, Any] | str) -> float:
    """What a description says of its method's learning rate. Raises ConfigError where that is no number above 0."""
    scale = spec.get(rates.SCALE, 1.0) if isinstance(spec, Mapping) else 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise errors.ConfigError(f"method: {rates.SCALE} is {scale!r}; expected a number above 0")
    return float(scale)


def parts(specs: Sequence[Mapping[str, Any] | str]) -> list[Mapping[str, Any] | str]:
    """The descriptions, with what each preset is made of in its place. Raises as `build`."""
    out: list[Mapping[str, Any] | str] = []
    for spec in spelled_out(specs):
        _, factory, given, _ = _called(spec)
        made = None if _is_method(_hints(factory).get("return")) else factory(**given)
        out += parts(made) if isinstance(made, list) else [spec]
    return out


def resolved(spec: Mapping[str, Any] | str) -> tuple[str, dict[str, Any], ModuleType]:
    """(name, every argument with the defaults filled in, module) of one method's description. Raises as `build`."""
    name, factory, given, module = _called(spec)
    # A method among the arguments stays a description: two that were built never equal each other.
    spec = _renamed(name, spec, getattr(module, "ALIASES", {})) if isinstance(spec, Mapping) else {}
    inner = {k: _description(given[k], spec[k]) for k in nested(factory) if k in spec}
    return name, {**_defaults(factory), **given, **inner}, module


def _description(built: Any, spec: Any) -> Any:
    """(name, every argument) of each method of a description; of what was given as a method, that method."""
    if not isinstance(spec, Mapping | str | list):
        return built
    return [resolved(s)[:2] for s in spelled_out([spec] if isinstance(spec, Mapping | str) else spec)]


def _defaults(factory: Callable[..., Any]) -> dict[str, Any]:
    return {k: p.default for k, p in inspect.signature(factory).parameters.items() if p.default is not p.empty}


def _called(
    spec: Mapping[str, Any] | str,
    tokenize: Callable | None = None,
    load: Callable | None = None,
    facts: Mapping[str, Any] | None = None,
    within: tuple[Any, ...] = (),
) -> tuple[str, Callable[..., Method], dict[str, Any], ModuleType]:
    """(name, factory, checked arguments, module)."""
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    name, _ = spec.pop("name", None), spec.pop(rates.SCALE, None)
    if not isinstance(name, str):
        raise errors.ConfigError(f"method: expected a mapping with a name, such as {{name: lora}}, found {spec}")
    factory, module = find(name)
    given = _renamed(name, spec, getattr(module, "ALIASES", {}))
    for key in getattr(module, "TEXTS", ()):
        if tokenize is not None and isinstance(given.get(key), str):
            given[key] = tokenize(given[key])
    for key in getattr(module, "LOADED", ()):
        if load is not None and isinstance(given.get(key), list):
            loaded = [alone(*load(x)) if isinstance(x, str) else (x, None) for x in given[key]]
            runs = {f"{key}[{i}]": spec for i, (_, spec) in enumerate(loaded)}
            _agree(name, factory, given, runs, getattr(module, "AGREE", {}))
            given[key] = [train for train, _ in loaded]
    for key in nested(factory):
        if isinstance(given.get(key), Mapping | str | list):
            given[key] = build(given[key], tokenize, load, facts, within)
    for key in getattr(module, "FACTS", ()):
        if key in (facts or {}):
            given.setdefault(key, (facts or {})[key])
    return name, factory, arguments(name, factory, given), module


def alone(train: Any, spec: Any) -> tuple[Any, Any]:
    """What a run trained and that method's description; of a chain of which one part trained, that part's.

    The description is None where it is not known which of several it is.
    """
    listed = [{"name": s} if isinstance(s, str) else s for s in (spec if isinstance(spec, list) else [spec])]
    if len(listed) == 1:
        return train, listed[0]
    place, colon, name = (list(train) or [""])[0].partition(":")
    if len(train) > 1 or not colon or not place.isdecimal():
        return train, None
    named = [s for s in listed if s["name"].rpartition(":")[2] == name]
    return train[f"{place}:{name}"], named[0] if len(named) == 1 else None


def _agree(
    name: str, factory: Callable, given: Mapping[str, Any], runs: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Raises ConfigError where a run was trained with another argument than it would have here.

    runs: its place -> its method's description; one from a user's file is not judged. wanted: argument -> what it must
    be, where ``factory`` has no argument of that name.
    """
    here = {**wanted, **_defaults(factory), **given}
    for place, spec in runs.items():
        said = resolved(spec)[1] if isinstance(spec, Mapping) and spec.get("name") in NAMES else {}
        for argument in [x for x in wanted if x in said]:
            if said[argument] != here[argument]:
                raise errors.ConfigError(
                    f"method {name!r}: {place} was trained with {argument}: {said[argument]!r}, and here it "
                    f"would have {here[argument]!r}" + (f"; set {argument}" if argument in _defaults(factory) else "")
                )


def nested(factory: Callable[..., Any]) -> list[str]:
    """The arguments of a factory that are methods themselves: a config gives their descriptions."""
    return [k for k, hint in _hints(factory).items() if _is_method(hint) and k != "return"]


def _is_method(hint: Any) -> bool:
    return hint is Method or set(typing.get_args(hint)) == {Method, type(None)}


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(factory)
    except Exception:  # evaluating them may raise anything
        return {}  # annotations of a user's file that cannot be resolved: its own code will judge


def find(name: str) -> tuple[Callable[..., Method], ModuleType]:
    """The factory of that name and the module that it lies in. Raises ConfigError where there is none."""
    place, colon, function = NAMES.get(name, name).rpartition(":")
    if not colon:
        raise errors.ConfigError(
            f"method: {name!r} is not known. {errors.did_you_mean(name, NAMES)} "
            "A method of your own is named by 'path/to/file.py:function' or 'package.module:function'."
        )
    module = _from_file(name, Path(place)) if place.endswith(".py") else _from_package(name, place)
    factory = getattr(module, function, None)
    if not callable(factory):
        there = [k for k, v in vars(module).items() if inspect.isfunction(v) and not k.startswith("_")]
        raise errors.ConfigError(
            f"method: {place} has no function {function!r}. {errors.did_you_mean(function, there)}"
        )
    return factory, module


def _from_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise errors.ConfigError(f"method {name!r}: there is no file {path} (from {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(f"tunejax_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise errors.ConfigError(f"method {name!r}: {path} could not be run: {type(e).__name__}: {e}") from e
    return module


def _from_package(name: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except (ImportError, ValueError, TypeError) as e:
        raise errors.ConfigError(f"method {name!r}: {place!r} could not be imported: {e}") from e


def _renamed(name: str, given: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    said: dict[str, str] = {}
    for key, value in given.items():
        ours = aliases.get(key, key)
        if ours in out:
            raise errors.ConfigError(
                f"method {name!r}: {said[ours]!r} and {key!r} are words for one argument; give one of them"
            )
        said[ours] = key
        out[ours] = peft_words.globs(value) if key in ("target_modules", "feedforward_modules") else value
        if key == "layers_to_transform" and isinstance(value, list):
            out[ours] = peft_words.layers(name, value)
    return out


def arguments(name: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` checked against the factory's signature: names, and types where it states them.

    Raises:
      ConfigError: every unknown, missing or ill-typed argument, in one message.
    """
    from pydantic import ConfigDict, ValidationError, create_model

    parameters = inspect.signature(factory).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {k: p for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    hints = {k: _strict(hint) for k, hint in _hints(factory).items()}
    fields: dict[str, Any] = {
        f"arg_{k}": (hints.get(k, Any), ... if p.default is p.empty else p.default) for k, p in named.items()
    }
    known = {f"arg_{k}": v for k, v in given.items() if k in named}
    problems = [] if open_ended else [_unknown(k, named) for k in given if k not in named]
    try:
        checked = create_model("Arguments", __config__=ConfigDict(strict=True, arbitrary_types_allowed=True), **fields)(
            **known
        )
        out = {k: getattr(checked, f"arg_{k}") for k in named if k in given}
    except ValidationError as e:
        out = {}
        problems += _said(e.errors())
    if problems:
        raise errors.ConfigError(f"method {name!r}:\n  " + "\n  ".join(problems))
    return {**{k: v for k, v in given.items() if k not in named}, **out}


def _strict(hint: Any) -> Any:
    """The annotation for pydantic, which would take a `Method`, being a tuple, apart."""
    from pydantic import InstanceOf

    return hint if not _is_method(hint) else InstanceOf[Method] if hint is Method else InstanceOf[Method] | None


def _unknown(key: str, named: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, list(named), n=1, cutoff=0.6)
    return f"{key}: unknown. " + (f"Did you mean {close[0]!r}?" if close else f"It takes {', '.join(named)}.")


def _said(found: Sequence[Any]) -> list[str]:
    """One line an argument; the branches of a union are one problem."""
    by_name: dict[str, tuple[list[str], Any]] = {}
    for error in found:
        key = str(error["loc"][0]).removeprefix("arg_")
        by_name.setdefault(key, ([], error))[0].append(error["msg"].removeprefix("Input should be ").lower())
    lines = []
    for key, (messages, error) in by_name.items():
        if error["type"] == "missing":
            lines.append(f"{key}: required, and not given")
        else:
            expected = " or ".join(dict.fromkeys(messages))
            lines.append(f"{key}: expected {expected}, found {error['input']!r}")
    return lines
