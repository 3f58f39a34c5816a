"""How a method is kept in the adapter folders of other libraries: plain data that a method's module declares."""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]
Arguments = Mapping[str, Any]


def _same(arguments: Arguments, sites: Sequence[Arrays]) -> dict[str, Any]:
    return dict(arguments)


class Form(NamedTuple):
    """How HF PEFT keeps a method, one layer of one site at a time. A method's module calls it ``PEFT``; where several
    methods share the module and differ there, that is a mapping from their names.

    Invariant: ``read(write(arrays), arguments)`` computes what ``arrays`` do, and equals them unless ``written`` says
    that PEFT knows the method as another.

    peft_type: of adapter_config.json.
    write:     (arrays of the site by name) -> tensors by the end of their names there ("lora_A.weight").
    read:      (tensors, arguments) -> arrays; None: what is written is read as another method.
    entries:   argument -> its entry in adapter_config.json; an argument without one is not written, and must be equal
               in all that one folder holds.
    absent:    argument -> what PEFT takes where its entry is not there, if that is not the method's own default.
    flags:     entries that set it apart from others of its type; a tuple lists values of which any will do; the first
               is the one that is written, and None an entry that is not there.
    patterns:  whether PEFT lets rank and alpha differ from module to module.
    biases:    the entry ``bias`` where biases of its modules train beside it; "": the type has no such entry.
    plain:     whether PEFT has it for modules that keep kernels as [in, out] (GPT-2's).
    ignored:   entries that change nothing, or are answered by the tensors.
    written:   (arguments, arrays of each site, layers first) -> the arguments as PEFT has them.
    found:     (arrays of one module, as read) -> arguments that follow from them, one module at a time.
    settings:  (arrays by module) -> further entries.
    write_shared, read_shared: as write and read, of what all sites share: tensors by name after "base_model.".
    fuse:      (arrays of each part or None, output widths, arguments) -> (arrays, changed arguments) of the one kernel
               that a checkpoint keeps for several (GPT-2's c_attn), or None where the method has no such form.
    split:     (arrays, index of the part, number of parts) -> arrays of that part.
    note:      (arguments) -> what to know before PEFT reads it, or "".
    own:       how PEFT keeps what it trained as this method itself, where what is written here is another of its kinds;
               such a folder is read, and none is written.
    """

    peft_type: str
    write: Callable[[Arrays], dict[str, np.ndarray]]
    read: Callable[[Arrays, Arguments], dict[str, np.ndarray]] | None
    entries: Mapping[str, str] = {}
    absent: Mapping[str, Any] = {}
    flags: Mapping[str, Any] = {}
    patterns: bool = False
    biases: str = ""
    plain: bool = True
    ignored: frozenset[str] = frozenset()
    written: Callable[[Arguments, Sequence[Arrays]], dict[str, Any]] = _same
    found: Callable[[Arrays], dict[str, Any]] = lambda arrays: {}
    settings: Callable[[Mapping[str, Arrays]], dict[str, Any]] = lambda modules: {}
    write_shared: Callable[[Arrays], dict[str, np.ndarray]] | None = None
    read_shared: Callable[[Arrays], dict[str, np.ndarray]] | None = None
    fuse: Callable[[Sequence[Arrays | None], Sequence[int], Arguments], tuple[Arrays, dict]] | None = None
    split: Callable[[Arrays, int, int], Arrays] | None = None
    note: Callable[[Arguments], str] = lambda arguments: ""
    own: "Form | None" = None


class Prompt(NamedTuple):
    """How HF PEFT keeps virtual tokens or a prefix: one matrix, whatever network made it while it trained.

    peft_type: of adapter_config.json.
    prefix:    whether the matrix holds keys and values of all layers; else rows of the embedding table.
    rows:      (train of the method) -> [length, width]; with ``prefix`` the width is (layer, key or value, kv).
    entries:   further entries of adapter_config.json.
    fixed:     arguments that must be so for what PEFT computes.
    """

    peft_type: str
    prefix: bool
    rows: Callable[[Any], Any]
    entries: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}


class Whole(NamedTuple):
    """How HF PEFT keeps a method that trains parameters themselves, where it has a type of its own for them.

    Beside an adapter in one folder they go as ``modules_to_save``, as what every other such method trains does.

    peft_type: of adapter_config.json.
    slot:      what stands in its keys between a module and the parameter's name.
    """

    peft_type: str
    slot: str


class Hub(NamedTuple):
    """How AdapterHub's library `adapters` keeps a bottleneck method, one layer of one place at a time.

    A method's module calls it ``ADAPTERHUB``; where several methods share the module, that is a mapping from their
    names. Arguments called ``activation``, ``scale``, ``reads``, ``width``, ``targets`` and ``layers`` mean what they
    do in `core.bottleneck` and `core.joins`; `interop.hub_config` has their entries.

    Invariant: ``read(write(arrays)) == arrays``.

    name:    what the library calls its nearest configuration.
    write:   (arrays of a site by name) -> tensors by the end of their names there ("adapter_up.weight").
    read:    (tensors) -> arrays.
    entries: further argument -> its entry of the config.
    flags:   entries that tell it from others on reading; where several agree, the most flags win.
    fixed:   entries that must be so for what it computes; anything else is refused.
    written: entries that are written and, on reading, change nothing.
    meant:   (arguments) -> the same with what stands for others filled in; an activation of None is the model's.
    width:   (arrays) -> of the bottleneck.
    scaled:  (arrays, factors [1] or [embed]) -> arrays that add that multiple; None: it cannot.
    write_shared, read_shared: as write and read, of what all sites share.
    """

    name: str
    write: Callable[[Arrays], dict[str, np.ndarray]]
    read: Callable[[Arrays], dict[str, np.ndarray]]
    entries: Mapping[str, str] = {}
    flags: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}
    written: Mapping[str, Any] = {}
    meant: Callable[[Arguments], dict[str, Any]] = dict
    width: Callable[[Arrays], int] = lambda arrays: arrays["down_bias"].shape[-1]
    scaled: Callable[[Arrays, np.ndarray], dict[str, np.ndarray]] | None = None
    write_shared: Callable[[Arrays], dict[str, np.ndarray]] | None = None
    read_shared: Callable[[Arrays], dict[str, np.ndarray]] | None = None


class HubProduct(NamedTuple):
    """How the library keeps a product beside a kernel of attention (its LoRA), one layer of one kernel at a time.

    name:         what the library calls it.
    write, read:  as of `Hub`; what is written computes the product without its scale.
    fuse, split:  (arrays of each kernel) -> arrays of the one that a checkpoint keeps for them; (arrays, index, number)
                  -> those of one kernel.
    scale:        (arguments) -> what the product is multiplied by.
    """

    name: str
    write: Callable[[Arrays], dict[str, np.ndarray]]
    read: Callable[[Arrays], dict[str, np.ndarray]]
    fuse: Callable[[Sequence[Arrays]], dict[str, np.ndarray]]
    split: Callable[[Arrays, int, int], dict[str, np.ndarray]]
    scale: Callable[[Arguments], float]


class HubPrefix(NamedTuple):
    """How the library keeps keys and values before the text.

    name:    what the library calls it.
    pairs:   (train) -> path of each slot -> {"key", "value"}, each [layers, length, kv].
    network: (train) -> the network that makes them: {"rows" [length, width], "w", "b"}, and by path {"key_w" [layers,
             hidden, kv], "key_b", "value_w", "value_b"}; None where there is none.
    """

    name: str
    pairs: Callable[[Any], Mapping[str, Arrays]]
    network: Callable[[Any], Mapping[str, Arrays] | None] = lambda train: None


class HubGate(NamedTuple):
    """Says of a method of a method (its argument ``method``) that the library keeps it with that one, as its gate.

    What it trains is {"method": that one's, "gates": path -> {"gate" [layers, in], "gate_bias" [layers]}}.

    name: the entry that says so.
    """

    name: str


class HubUnion(NamedTuple):
    """Says of a preset what the library calls the union of its methods. Each of them has its own form."""

    name: str


class NoForm(NamedTuple):
    """Stands for a form that cannot be, and says why."""

    why: str


HubForm = Hub | HubProduct | HubPrefix | HubGate | HubUnion


def hub_of(module: ModuleType, name: str) -> HubForm | NoForm | None:
    """How AdapterHub keeps the method of that name in that module, or why it cannot; None where nothing is said."""
    declared = _declared(module, name, "ADAPTERHUB")
    return declared if isinstance(declared, HubForm | NoForm) else None


def form_of(module: ModuleType, name: str) -> Form | None:
    """The form of a method in that module, by its name or as "place:name"; None where it has none."""
    declared = _declared(module, name)
    return declared if isinstance(declared, Form) else None


def prompt_of(module: ModuleType, name: str) -> Prompt | None:
    """The same of a method that trains virtual tokens or a prefix."""
    declared = _declared(module, name)
    return declared if isinstance(declared, Prompt) else None


def whole_of(module: ModuleType, name: str) -> Whole | None:
    """The same of a method that trains parameters themselves."""
    declared = _declared(module, name)
    return declared if isinstance(declared, Whole) else None


def _declared(module: ModuleType, name: str, where: str = "PEFT") -> Any:
    declared = getattr(module, where, None)
    return declared.get(name.rpartition(":")[2]) if isinstance(declared, Mapping) else declared
