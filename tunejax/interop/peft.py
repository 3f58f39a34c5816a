"""Adapter folders of HF PEFT, written: adapter_config.json and adapter_model.safetensors.

Keys are "base_model.model.<module>.<tensor>", in torch's layout, without the adapter's name; beside a prompt, which
wraps no module of the model, "base_model.<module>.<tensor>". What a method's arrays are
called there its module says in ``PEFT`` (`core.portable.Form`), so a method of a user's own file is written too.
What trains whole (`full`, `last_k`, `bitfit`) goes as PEFT's ``modules_to_save``: the whole of each module it touches.
"""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tunejax.core import errors, operators, paths, portable
from tunejax.core.method import SHARED, Method, split
from tunejax.core.paths import Params
from tunejax.interop import modules, peft_prompts, tensors
from tunejax.interop.found import CONFIG
from tunejax.interop.modules import Place, Site
from tunejax.methods import registry
from tunejax.models.config import ModelConfig

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
SHARED_PREFIX = "base_model."
"""Of tensors that belong to no module of the base, and of all beside a prompt."""
BASE = ".base_layer."
"""In names of an adapted module's own parameters."""
RESAVED = ("lm_head",)
"""Modules whose own weights PEFT saves under their adapter, and so keeps when such a folder is saved again."""
TASKS = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS"}
HEADS = {"classification": ("/classifier/*", "/head/kernel")}
"""What PEFT saves with every adapter for that task, trained or not."""
PATTERNS = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
"""Arguments that may differ from module to module, and where PEFT keeps the exceptions."""


FREE = ("targets", "layers", "dropout")
"""Arguments that may differ between adapters of one kind: where they are, and what acts while training only."""


class Tuned(NamedTuple):
    """What is written. specs: of the methods, as in a config; the rest as of `recipes.artefact.Tuned`."""

    specs: Sequence[Mapping[str, Any] | str]
    method: Method
    base: Params
    train: Any
    state: Any


class World(NamedTuple):
    """The model that an adapter is written for.

    starts: first layer of each segment of ``base``. under: kernels that train and are adapted too, by path.
    """

    config: ModelConfig
    head: str
    base: Params
    starts: dict[str, int]
    places: Mapping[Site, Place]
    under: Mapping[str, Any] = {}


class Link(NamedTuple):
    """One method of a chain. module: that defines it; train, state: its own part of what the chain trained."""

    name: str
    arguments: dict[str, Any]
    module: Any
    train: Any
    state: Any


def links(tuned: Tuned, library: str) -> list[Link]:
    """The methods of a chain, or the one there is. Raises ConfigError where a name stands for several."""
    methods = tuned.method.parts or (tuned.method,)
    if len(methods) > len(tuned.specs):
        raise errors.ConfigError(
            f"{library} has no form for {tuned.method.name}: one name of the config is a chain of several"
        )
    own = zip(split(tuned.method, tuned.train), split(tuned.method, tuned.state), strict=True)
    return [Link(*registry.resolved(s), t[1], u[1]) for s, (t, u) in zip(tuned.specs, own, strict=True)]


def trains_whole(train: Any, state: Any) -> bool:
    """Whether a method trains parameters themselves, by path, and keeps nothing else."""
    return isinstance(train, Mapping) and all(operators.is_array(x) for x in train.values()) and not state


def write(folder: Path, tuned: Tuned, config: ModelConfig, *, head: str, base_name: str) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads onto the same base: the whole folder or nothing.

    Raises:
      ConfigError: PEFT has no such method, or no place for this combination of them; the folder holds something.
    """
    starts = paths.starts(tuned.method.cuts(config.num_layers))
    world = World(config, head, tuned.base, starts, modules.places(config, head))
    adapters, prompts, whole, slots = _parts(tuned, config)
    _check_biases(whole, world)
    world = world._replace(under=_under(adapters, whole, world))
    whole = {p: x for p, x in whole.items() if p not in world.under}
    if len(prompts) > 1 or (prompts and adapters):
        other = adapters[0].name if adapters else "another prompt"
        raise errors.ConfigError(f"PEFT keeps one kind of adapter in a folder; here is a prompt and {other}")
    if prompts and head not in TASKS:
        raise errors.ConfigError(f"PEFT puts a prompt before the text for {', '.join(TASKS.values())} only")
    if prompts or adapters:
        arrays, settings = prompts[0] if prompts else _adapter(adapters, world)
    else:
        values = {p: x for _, own in slots for p, x in own.items()}
        arrays, settings = _slotted(slots[0][0], values, world)
        whole = {p: x for p, x in whole.items() if p not in values}
    if prompts and peft_prompts.looks_up(settings) and peft_prompts.TABLE in whole:
        raise errors.ConfigError(
            f"{peft_prompts.TABLE} trains, and behind a prompt PEFT reads that of the base: it would be left out"
        )
    adapted = {m for part in adapters for m in settings["target_modules"] if part.form.biases}
    saved, kept = _modules(whole, world, SHARED_PREFIX if prompts else PREFIX, adapted)
    if any(k.endswith(f"{BASE}bias") for k in saved):
        settings["bias"] = adapters[0].form.biases
    both = [m for m in kept if any(k.startswith(f"{PREFIX}{m}.") for k in arrays)]
    if both:
        raise errors.ConfigError(
            f"{both[0]} trains whole and is adapted too; PEFT can do one. Export --format hf merges"
        )
    settings |= {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": kept or None,
        "task_type": TASKS.get(head),
    }
    with tensors.whole_folder(folder) as new:
        tensors.write_arrays(new / WEIGHTS, arrays | saved)
        tensors.write_json(new / CONFIG, settings)
    for note in filter(None, dict.fromkeys([*(p.form.note(p.arguments) for p in adapters), _prefix_note(settings)])):
        print(f"note: {note}")


def _prefix_note(settings: Mapping[str, Any]) -> str:
    """What to know of a prefix before a classifier."""
    if (settings["peft_type"], settings["task_type"]) != ("PREFIX_TUNING", TASKS["classification"]):
        return ""
    return (
        "PEFT runs a prefix before a classifier only where the model's forward() names past_key_values; those of "
        "transformers 5 do not"
    )


def _check_biases(whole: Mapping[str, Any], world: World) -> None:
    """Raises ConfigError on biases that the base lacks: PEFT drops, without a word, what its model has no place for."""
    missing = modules.missing_biases(world.config, world.head)
    added = [p for p in whole if modules.canonical(p, world.starts)[0] in missing]
    if added:
        raise errors.ConfigError(
            f"{added[0]} trains, and the base has no such bias: PEFT has no place for it. Export with --format hf"
        )


class _Part(NamedTuple):
    """A method of the chain with a form in PEFT."""

    name: str
    form: portable.Form
    arguments: dict[str, Any]
    sites: Mapping[str, portable.Arrays]
    shared: portable.Arrays


Slots = list[tuple[portable.Whole, Mapping[str, Any]]]


def _parts(tuned: Tuned, config: ModelConfig) -> tuple[list[_Part], list[peft_prompts.Written], dict[str, Any], Slots]:
    """The chain's adapters, its prompts as they are written, the values by path that train whole, and those of these
    that have a type of their own."""
    adapters: list[_Part] = []
    prompts: list[peft_prompts.Written] = []
    whole: dict[str, Any] = {}
    slots: Slots = []
    for name, arguments, module, train, state in links(tuned, "PEFT"):
        form, prompt = portable.form_of(module, name), portable.prompt_of(module, name)
        if prompt is not None:
            prompts.append(peft_prompts.write(name, prompt, arguments, train, config))
        elif form is not None:
            sites = {p: _host({**state.get(p, {}), **arrays}) for p, arrays in train.items()}
            shared = {**_host(state.get(SHARED, {})), **sites.pop(SHARED, {})}
            written = form.written(arguments, list(sites.values()))
            adapters.append(_Part(name, form, written, sites, shared))
        elif trains_whole(train, state):
            whole.update(train)
            own = portable.whole_of(module, name)
            slots += [(own, train)] if own is not None else []
        else:
            raise errors.ConfigError(f"PEFT has no method {name!r}. Export with --format hf where it merges")
    if not adapters and not prompts and len({form for form, _ in slots}) != 1:
        raise errors.ConfigError(f"{tuned.method.name} has no adapter that PEFT knows; export with --format hf")
    return adapters, prompts, whole, slots


def _under(parts: list[_Part], whole: Mapping[str, Any], world: World) -> dict[str, Any]:
    """What trains whole under an adapter, by path, where PEFT would save it so too."""
    found = {p: world.places.get(Site(p, modules.OUTSIDE)) for part in parts for p in part.sites if p in whole}
    return {p: whole[p] for p, place in found.items() if place is not None and place.module in RESAVED}


def _adapter(parts: list[_Part], world: World) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors by key, settings) of adapters of one kind; their ranks and alphas may differ."""
    first = parts[0]
    form = first.form
    patterned = {k: p for k, p in PATTERNS.items() if form.patterns and k in form.entries}
    fixed = {k: v for k, v in first.arguments.items() if k not in (*patterned, *FREE)}
    tensors: dict[str, np.ndarray] = {}
    patterns: dict[str, dict[str, Any]] = {}
    targeted: dict[str, portable.Arrays] = {}
    plain = set()
    for part in parts:
        if part.form is not form:
            raise errors.ConfigError(
                f"PEFT keeps one kind of adapter in a folder; here are {first.name} and {part.name}"
            )
        if apart := next((k for k, v in fixed.items() if part.arguments.get(k, v) != v), None):
            raise errors.ConfigError(
                f"PEFT keeps one {apart} in a folder; here are {first.name} with {fixed[apart]!r} and {part.name} with "
                f"{part.arguments[apart]!r}. Export with --format hf"
            )
        if not _equal(part.shared, first.shared):
            raise errors.ConfigError(f"PEFT keeps one set of what all sites share; the {len(parts)} parts differ in it")
        for module, group in _grouped(part, world).items():
            if module in targeted:
                raise errors.ConfigError(
                    f"PEFT keeps one adapter a module; {part.name} is a second one at {module}. Export with --format hf"
                )
            arrays, changed = _fused(part, group, module)
            tensors.update({f"{PREFIX}{module}.{k}": x for k, x in form.write(arrays).items()})
            targeted[module] = arrays
            plain.add(not group[0].place.transpose)
            for name, key in patterned.items():
                value = {**part.arguments, **changed}.get(name)
                if value != first.arguments.get(name):
                    patterns.setdefault(key, {})[module] = value
    if True in plain and not form.plain:
        raise errors.ConfigError(f"PEFT has no {first.name} for this model's modules, which keep kernels as [in, out]")
    if first.shared and form.write_shared is not None:
        tensors.update({SHARED_PREFIX + k: x for k, x in form.write_shared(first.shared).items()})
    for path, x in world.under.items():
        place = world.places[Site(path, modules.OUTSIDE)]
        tensors[f"{PREFIX}{place.module}{BASE}{place.name}"] = np.asarray(x.T if place.transpose else x)
    settings = {theirs: first.arguments[k] for k, theirs in form.entries.items() if k in first.arguments}
    flags = {k: v[0] if isinstance(v, tuple) else v for k, v in form.flags.items()}
    settings |= {"peft_type": form.peft_type, "target_modules": list(targeted), **flags, **patterns}
    settings |= form.settings(targeted)
    return tensors, settings | ({"fan_in_fan_out": True} if plain == {True} else {})


def _host(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {k: np.asarray(x, np.float32) for k, x in arrays.items() if operators.is_array(x)}


def _equal(one: portable.Arrays, other: portable.Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(x, other[k]) for k, x in one.items())


class _Layer(NamedTuple):
    """One layer of a site: its arrays there, and the width of its kernel."""

    place: Place
    arrays: portable.Arrays
    width: int


def _grouped(part: _Part, world: World) -> dict[str, list[_Layer]]:
    """The layers of a method's sites by module; several where a checkpoint fuses their kernels."""
    out: dict[str, list[_Layer]] = {}
    for path, arrays in part.sites.items():
        ours, first = modules.canonical(path, world.starts)
        kernel = world.under.get(path, paths.get(world.base, path))
        if kernel is None:
            raise errors.ConfigError(f"{path} trains whole, and {part.name} adapts it too; PEFT can do one")
        shape = kernel.shape
        for row in range(shape[0] if first >= 0 else 1):
            place = world.places[Site(ours, first + row if first >= 0 else modules.OUTSIDE)]
            one = {k: x[row] for k, x in arrays.items()} if first >= 0 else arrays
            out.setdefault(place.module, []).append(_Layer(place, one, shape[-1]))
    return out


def _fused(part: _Part, group: list[_Layer], module: str) -> tuple[portable.Arrays, dict[str, Any]]:
    """(arrays, changed arguments) of one module from those of its parts."""
    of = group[0].place.part[1]
    if of == 1:
        return group[0].arrays, {}
    if part.form.fuse is None:
        raise errors.ConfigError(
            f"{module} keeps {of} kernels as one, and PEFT's {part.name} has no form for a part of it"
        )
    by_part: list[Any] = [None] * of
    for layer in group:
        by_part[layer.place.part[0]] = layer.arrays
    return part.form.fuse(by_part, [group[0].width] * of, part.arguments)


def _slotted(
    form: portable.Whole, values: Mapping[str, Any], world: World
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors by key, settings) of modules that train whole and have a type of their own."""
    saved, names = _modules(values, world._replace(head=""), PREFIX)
    tensors = {}
    for key, x in saved.items():
        module, _, name = key.rpartition(".")
        tensors[f"{module}.{form.slot}.{name}"] = x
    return tensors, {"peft_type": form.peft_type, "target_modules": names}


def _modules(
    whole: Mapping[str, Any], world: World, prefix: str, adapted: Set[str] = frozenset()
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(tensors by key, names) of the modules of which something trains whole, and of the task's head.

    adapted: modules that cannot be saved whole; their biases are, apart.
    """
    flat = {**paths.flatten(world.base), **whole}
    flat = {p: x for p, x in flat.items() if operators.is_array(x)}
    touched = set(whole) | {p for p in flat if any(paths.matches(g, p) for g in HEADS.get(world.head, ()))}
    values: dict[str, dict[int, np.ndarray]] = {}
    wanted: list[str] = []
    biases: set[str] = set()
    for path, leaf in flat.items():
        ours, first = modules.canonical(path, world.starts)
        for row in range(leaf.shape[0] if first >= 0 else 1):
            place = world.places.get(Site(ours, first + row if first >= 0 else modules.OUTSIDE))
            if place is None:
                if path in whole:
                    raise errors.ConfigError(f"{path} trains whole, and PEFT can save whole modules only")
                continue
            array = np.asarray(leaf[row] if first >= 0 else leaf)
            name = f"{place.module}.{place.name}"
            values.setdefault(name, {})[place.part[0]] = array.T if place.transpose else array
            if path in touched and place.module in adapted and place.name == "bias":
                biases.add(name)
            elif path in touched and place.module not in wanted:
                wanted.append(place.module)
    inner = {k.rpartition(".")[0] for k in values}
    for module in wanted:
        if within := next((m for m in inner if m.startswith(f"{module}.")), None):
            raise errors.ConfigError(
                f"PEFT saves whole modules: {module}, of which something trains, holds {within}; leave it out"
            )
    kept = {k: _joined(x) for k, x in values.items() if k.rpartition(".")[0] in wanted}
    kept |= {f"{k.removesuffix('.bias')}{BASE}bias": _joined(values[k]) for k in biases}
    tied = modules.tied_head(world.config, world.head)
    if peft_prompts.TABLE in whole and tied is not None:  # what PEFT saves whole no longer shares its weights
        kept[f"{tied}.weight"] = np.asarray(whole[peft_prompts.TABLE])
        wanted.append(tied)
    return {prefix + k: x for k, x in kept.items()}, wanted


def _joined(parts: Mapping[int, np.ndarray]) -> np.ndarray:
    """A parameter of a checkpoint from the ones here that it holds."""
    return np.concatenate([parts[i] for i in sorted(parts)], axis=-1)
