"""A finished run, an adapter folder of another library, or a plain model, opened for use."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from tunejax.config import load, locate, schema
from tunejax.core import errors, paths
from tunejax.core import method as method_lib
from tunejax.core.model import key_shape
from tunejax.interop import adapter_folders, hf
from tunejax.interop import found as found_lib
from tunejax.methods import registry
from tunejax.models.config import ModelConfig
from tunejax.models.families import common
from tunejax.recipes import adapter, assemble, folder


class Tuned(NamedTuple):
    """A model with what a run trained. params: bound, ready for the model; base: after the method's edits.

    loaded: the base before them. row_format: of the rows that it was trained on, where that is known.
    """

    parts: assemble.Parts
    base: paths.Params
    train: Any
    state: Any
    loaded: assemble.Loaded
    row_format: str | None = None

    @property
    def params(self) -> paths.Params:
        """The parameters that the model reads."""
        return self.parts.method.bind(self.base, self.train, self.state, method_lib.Context())


def open_run(text: str, changes: list[str] | None = None, beside: Tuned | None = None) -> Tuned:
    """The tuned model of a run folder.

    Args:
      text: path of the run folder, or of an adapter that HF PEFT or AdapterHub's library wrote (it names its base, and
        has no digest of it).
      changes: overrides of its config; another model.path is another base, and refused unless its digest agrees.
      beside: a model opened before, whose base is shared where this run's is the same.

    Raises:
      ConfigError: no run folder, or one of several runs.
      CheckpointError: no adapter, a damaged one, or one of another base.
    """
    if adapter_folders.is_adapter(text):
        return _open_folder(Path(text), changes or [], beside)
    path = folder.find(text)
    raw = load.override(load.read_file(path / "config.yaml"), changes or [])
    if raw.get("many"):
        raise errors.ConfigError(
            f"{path} holds the runs of {len(raw['many'])} members; name one of them, such as {path / 'members' / '0'}"
        )
    found = adapter.read(path / "adapter")
    if found.info.get("labels") and not raw["data"].get("labels"):
        raw["data"]["labels"] = found.info["labels"]  # as the training rows had them
    if not raw["data"].get("format") and not any(c.startswith("data.") for c in changes or ()):
        raw["data"]["format"] = found.info.get("row_format")  # likewise; rows that are named anew may have another
    config = load.check(raw, str(path / "config.yaml"))
    specs = registry.with_kept(config.method, lambda: adapter.by_layer(found, "state"))
    parts = assemble.parts(config, assemble.opened(config, specs=specs), num_labels=found.info.get("num_labels"))
    if config.model.head == "classification":  # what is exported says what its classes are
        parts = parts._replace(model_config=common.with_labels(parts.model_config, config.data.labels or ()))
    loaded = _loaded(parts, beside)
    adapter.check_base(found, loaded.base)
    params = paths.replace(loaded.params, _fresh(found, loaded))
    start = jax.eval_shape(parts.method.init, key_shape(), params)
    train, state = (adapter.restore(found, k, getattr(start, k)) for k in ("train", "state"))
    trained_on = found.info.get("row_format") or config.data.format
    return Tuned(parts, _edited(parts, params), train, state, loaded._replace(params=params), trained_on)


def _loaded(parts: assemble.Parts, beside: Tuned | None) -> assemble.Loaded:
    """The base of ``parts``: that of ``beside`` where all that it depends on is the same."""
    if beside is None:
        return assemble.load(parts)
    theirs = beside.parts
    same = (
        parts.folder == theirs.folder
        and parts.model_config == theirs.model_config
        and parts.config.model == theirs.config.model
        and parts.config.mesh == theirs.config.mesh
        and cuts(parts) == cuts(theirs)
        and (parts.config.seed == theirs.config.seed or not beside.loaded.fresh)
        and not parts.config.model.random_init
    )
    return beside.loaded if same else assemble.load(parts)


def cuts(parts: assemble.Parts) -> tuple[int, ...]:
    """Where the model's stack is cut."""
    return parts.method.cuts(parts.model_config.num_layers)


OBJECTIVES = {"lm": "causal_lm", "mlm": "masked_lm", "classification": "classification"}
"""Head -> the objective that a model with it has."""


def _open_folder(path: Path, changes: list[str], beside: Tuned | None) -> Tuned:
    """An adapter folder of another library on the base that it names."""
    given = [c.partition("=")[2] for c in changes if c.startswith("model.path=")]
    base = given[-1] if given else adapter_folders.base_of(path)
    shape = hf.read_config(hf.resolve(locate.model(base)))
    head = adapter_folders.head_of(path, shape.kind)
    named = {"path": base, "head": head}
    data = {"path": "unused"}
    begun = {
        "output_dir": "unused", "model": named, "data": data, "objective": {"name": OBJECTIVES[head]}, "method": "none"
    }  # fmt: skip
    raw = load.override(begun, changes)
    found = adapter_folders.read(path, shape, head=raw["model"]["head"])
    longest = min(512, shape.max_positions - registry.build(found.specs).prefix)
    raw = {**raw, "data": {"max_length": longest, **raw["data"]}}
    config = load.check({**raw, "method": found.specs}, str(path / found_lib.CONFIG))
    parts = assemble.parts(config, assemble.opened(config), num_labels=found.num_labels or shape.num_labels)
    if head == "classification" and len(parts.known) != parts.model_config.num_labels:
        parts = parts._replace(known=common.unnamed(parts.model_config.num_labels))  # the folder's head, not its base's
    loaded = _loaded(parts, beside)
    start = jax.eval_shape(parts.method.init, key_shape(), loaded.params)
    if lost := [p for p in loaded.fresh if p not in start.edits]:
        raise errors.CheckpointError(
            f"{path}: neither it nor its base {parts.name} has {', '.join(lost)}, so what they were is not known; PEFT "
            "saves them where modules_to_save names them"
        )
    train = found_lib.trained(found, parts.method, start.train, parts.method.cuts(shape.num_layers))
    state = jax.jit(lambda p: parts.method.init(jax.random.key(config.seed), p).state)(loaded.params)
    state = found_lib.state_of(found, parts.method, state)
    return Tuned(parts, _edited(parts, loaded.params), train, state, loaded)


def open_base(config: schema.Config, opened: assemble.Opened) -> Tuned:
    """The untuned model of a config: the method at its start, which changes nothing (but virtual tokens are there).

    config: with its classes, if it has any (`rows.with_labels`).
    """
    parts = assemble.parts(config, opened)
    loaded = assemble.load(parts)
    start = parts.method.init(jax.random.key(config.seed), loaded.params)
    return Tuned(parts, method_lib.apply_edits(loaded.params, start.edits), start.train, start.state, loaded)


def plain(model: str, dtype: str = "float32") -> Tuned:
    """A model folder or hub id by itself, in the shape of a run that trains nothing; all of it in ``dtype``."""
    named = {"path": model, "dtype": dtype, "param_dtype": dtype}
    raw = {"output_dir": "unused", "model": named, "data": {"path": "unused", "max_length": 2}, "method": "none"}
    config = load.check(raw)
    parts = assemble.parts(config, assemble.opened(config, NOTHING))
    loaded = assemble.load(parts)
    return Tuned(parts, loaded.params, {}, {}, loaded)


def _nothing(key: Any, params: paths.Params) -> method_lib.Start:
    return method_lib.Start()


def _as_it_is(params: paths.Params, train: Any, state: Any, ctx: method_lib.Context) -> paths.Params:
    return params


NOTHING = method_lib.method("none", _nothing, _as_it_is)
"""The method that tunes nothing."""


def is_run(text: str) -> bool:
    """Whether ``text`` names a run folder, or an adapter folder of another library."""
    return (Path(text) / "config.yaml").is_file() or adapter_folders.is_adapter(text)


def reader(text: str) -> tuple[Any, ModelConfig]:
    """The tokenizer and shape of a run, an adapter folder or a model; no weights are read."""
    named, tokenizer = text, None
    if adapter_folders.is_adapter(text):
        named = adapter_folders.base_of(Path(text))
    elif is_run(text):
        model = load.load(folder.find(text) / "config.yaml").model
        named, tokenizer = model.path, model.tokenizer
    found = hf.resolve(locate.model(named))
    return hf.tokenizer(locate.locate(tokenizer) if tokenizer else found), hf.read_config(found)


def prefix(text: str) -> int:
    """How many positions a run's or adapter folder's method takes before every row; 0 of a plain model."""
    if not is_run(text):
        return 0
    if not adapter_folders.is_adapter(text):
        path = folder.find(text)
        config = load.load(path / "config.yaml")
        specs = registry.with_kept(config.method, lambda: adapter.by_layer(adapter.read(path / "adapter"), "state"))
        return assemble.opened(config, specs=specs).method.prefix
    shape = reader(text)[1]
    found = adapter_folders.read(Path(text), shape, head=adapter_folders.head_of(Path(text), shape.kind))
    return registry.build(found.specs).prefix


def tokenizer_folder(parts: assemble.Parts) -> Path:
    """Where the tokenizer's files lie."""
    named = parts.config.model.tokenizer
    return Path(locate.locate(named)) if named else parts.folder


def _fresh(found: adapter.Adapter, loaded: assemble.Loaded) -> dict[str, Any]:
    """A head that the checkpoint lacks: its values as the run began, where they did not train."""
    saved = {k.removeprefix("fresh|"): x for k, x in found.arrays.items() if k.startswith("fresh|")}
    return {p: jax.numpy.asarray(saved[p]) for p in loaded.fresh if p in saved}


def _edited(parts: assemble.Parts, params: paths.Params) -> paths.Params:
    """The base with the method's edits; only what an edit changes is computed."""
    edits = jax.jit(lambda p: parts.method.init(jax.random.key(parts.config.seed), p).edits)(params)
    return method_lib.apply_edits(params, edits)
