"""What the writers and the readers of AdapterHub's kinds of adapters share: a method of a chain, a folder's tensors."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tunejax.core import errors, portable
from tunejax.core.method import SHARED
from tunejax.interop import hub_config, hub_slots
from tunejax.interop.found import Spec
from tunejax.interop.modules import Site
from tunejax.interop.peft import Tuned, links, trains_whole
from tunejax.methods import registry
from tunejax.models.config import ModelConfig

NAME = "tunejax"
"""Of the adapter, in every key."""
Written = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Tensors by name, entries of the config: of one kind of adapter."""
GATE = {"gate.weight": "gate", "gate.bias": "gate_bias"}
"""What the library calls the arrays of a gate, each with an axis before -> what they are called here."""


F = TypeVar("F")


class Part(NamedTuple):
    """A method of the chain with a form there.

    train: what it trained; sites, shared: the same, where it is arrays by path and by name.
    gates: of the method around it, by path; None without one. reads: what that method was told that they read.
    """

    name: str
    form: portable.HubForm
    arguments: dict[str, Any]
    train: Any
    sites: Mapping[str, portable.Arrays]
    shared: portable.Arrays
    gates: Mapping[str, portable.Arrays] | None = None
    reads: str = ""


def of(tuned: Tuned) -> tuple[list[Part], dict[str, Any]]:
    """The chain's adapters, and the values by path that train whole. Raises ConfigError for a method without a form."""
    adapters: list[Part] = []
    whole: dict[str, Any] = {}
    for spec in tuned.specs:
        name, _, module = registry.resolved(spec)
        refused = portable.hub_of(module, name)
        if isinstance(refused, portable.NoForm):
            raise errors.ConfigError(f"AdapterHub has no exact form for {name}: {refused.why} ({hub_config.DETAILS})")
    for name, arguments, module, train, state in links(tuned._replace(specs=registry.parts(tuned.specs)), "AdapterHub"):
        form = portable.hub_of(module, name)
        if isinstance(form, portable.HubGate):
            adapters.append(_gated(name, arguments, train))
        elif isinstance(form, portable.Hub | portable.HubProduct | portable.HubPrefix):
            adapters.append(_part(name, form, arguments, train))
        elif trains_whole(train, state):
            whole.update(train)
        else:
            raise errors.ConfigError(f"AdapterHub has no form for {name}; {hub_config.DETAILS}")
    if not adapters:
        raise errors.ConfigError(f"{tuned.method.name} has no adapter that AdapterHub knows; {hub_config.DETAILS}")
    return adapters, whole


def _part(name: str, form: portable.HubForm, arguments: dict[str, Any], train: Any) -> Part:
    sites = _host(train)
    return Part(name, form, arguments, train, {p: x for p, x in sites.items() if p != SHARED}, sites.get(SHARED, {}))


def _host(train: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    return {p: {k: np.asarray(x, np.float32) for k, x in arrays.items()} for p, arrays in train.items()}


def _gated(name: str, arguments: Mapping[str, Any], train: Mapping[str, Any]) -> Part:
    if arguments["per"] != "row":
        raise errors.ConfigError(
            f"AdapterHub's gates are means over all tokens of a row, and those of {name} are of each token; train with "
            f"per: row ({hub_config.DETAILS})"
        )
    listed = arguments["method"]
    if not isinstance(listed, list):
        raise errors.ConfigError(f"{name}: what {listed.name} was built with is not known; describe it by its name")
    inner, given = listed[0]
    form = portable.hub_of(registry.find(inner)[1], inner)
    if not isinstance(form, portable.Hub | portable.HubProduct | portable.HubPrefix):
        raise errors.ConfigError(f"AdapterHub has no form for {inner}; {hub_config.DETAILS}")
    part = _part(inner, form, given, train["method"])
    return part._replace(gates=_host(train["gates"]), reads=arguments["reads"])


def gate_to_hub(arrays: portable.Arrays) -> dict[str, np.ndarray]:
    """The gate among one layer's arrays as the library keeps it; empty where there is none."""
    return {theirs: arrays[ours][None] for theirs, ours in GATE.items() if ours in arrays}


def same(parts: list[Part], what: str, values: list[Any]) -> Any:
    """The one value that all parts have. Raises ConfigError where they differ in it."""
    if any(x != values[0] for x in values):
        raise errors.ConfigError(
            f"AdapterHub keeps one {what} in a folder; here are {', '.join(dict.fromkeys(map(str, values)))} of "
            f"{', '.join(dict.fromkeys(p.name for p in parts))}"
        )
    return values[0]


class Folder(NamedTuple):
    """An adapter folder that is read. legacy: it names no version of the library.

    tensors: kind (`hub_slots.KINDS`) -> module, without what names of the model's own begin with -> by the ends of
    their names. A reader takes out what it has read.
    """

    file: Path
    config: ModelConfig
    head: str
    adapter: str
    tensors: dict[str, dict[str, dict[str, np.ndarray]]]
    legacy: bool

    def take(self, kind: str, module: str, where: str) -> dict[str, np.ndarray]:
        """The tensors of one module. Raises CheckpointError where there are none."""
        found = self.tensors.get(kind, {}).pop(module.removeprefix(hub_slots.base_prefix(self.config)), None)
        if found is None:
            raise errors.CheckpointError(f"{self.file} has nothing for {where}, and adapter_config.json asks for it")
        return found

    def exactly(
        self,
        form: portable.Hub | portable.HubProduct,
        tensors: Mapping[str, np.ndarray],
        where: str,
        apart: Container,
    ) -> dict[str, np.ndarray]:
        """What the form reads of those tensors, of which it must know all but those named ``apart``.

        Raises:
          CheckpointError: a tensor that is missing or not known.
        """
        rest = {k: x for k, x in tensors.items() if k not in apart}
        try:
            arrays = form.read(rest)
            left = rest.keys() - form.write(arrays).keys()
        except KeyError as e:
            raise errors.CheckpointError(f"{self.file}: {where} has no {e}; found {', '.join(tensors)}") from None
        if left:
            raise errors.CheckpointError(f"{self.file}: {where} has {min(left)!r}, which no method here knows")
        return arrays

    def gate(self, tensors: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
        """The arrays of the one gate among those tensors, which it takes out. Raises CheckpointError as `take`."""
        found = {ours: tensors.pop(theirs, None) for theirs, ours in GATE.items()}
        if any(x is None or len(x) != 1 for x in found.values()):
            raise errors.CheckpointError(f"{self.file}: {where} has no gate of one output, and use_gating asks for it")
        return {k: x[0] for k, x in found.items() if x is not None}


def first(kind: type[F]) -> tuple[str, F]:
    """The first method of the registry that has a form of that type, and the form."""
    every = ((n, portable.hub_of(registry.find(n)[1], n)) for n in registry.NAMES)
    return next((n, form) for n, form in every if isinstance(form, kind))


def behind_gates(specs: list[Spec], gates: Mapping[Site, dict[str, np.ndarray]], reads: str) -> list[Spec]:
    """Each of those methods behind gates. gates: by the site of what they weigh, at their own (where they stand)."""
    name, out = first(portable.HubGate)[0], []
    for spec, sites in specs:
        own = {at: gates[at] for site in sites for at in (site, joined(site)) if at in gates}
        both = {s: {**sites.get(s, {}), **own.get(s, {})} for s in (*sites, *own)}
        out.append(({"name": name, "method": spec, "reads": reads, "per": "row"}, both))
    return out


def joined(site: Site) -> Site:
    """Where a branch whose last kernel this is joins the residual."""
    return Site(join_of(site.path), site.layer)


def join_of(path: str) -> str:
    """The slot where a branch joins the residual: "layers/mlp/join" of "layers/mlp/down/kernel"."""
    return path.rsplit("/", 2)[0] + "/join"


def check(entries: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with what stands for those that are not there.

    Raises:
      CheckpointError: every unknown entry, and every one of ``fixed`` that is otherwise, by name.
    """
    problems = [f"{k}: {v!r} is not known" for k, v in entries.items() if k not in defaults and k != "architecture"]
    given = {**defaults, **entries}
    problems += [f"{k} is {given[k]!r}, and can be read as {v!r} only" for k, v in fixed.items() if given[k] != v]
    if problems:
        raise errors.CheckpointError("adapter_config.json: " + "; ".join(problems) + f" ({hub_config.DETAILS})")
    return given
