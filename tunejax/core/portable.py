"""How a method is kept in the adapter folders of other libraries: plain data that a method's module declares."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]


class Form(NamedTuple):
    """How HF PEFT keeps a method, one layer of one site at a time; a method's module calls it ``PEFT``.

    Invariant: ``read(write(arrays)) == arrays``.

    peft_type: of adapter_config.json.
    write:     (arrays of the site by name) -> tensors by the end of their names there ("lora_A.weight").
    read:      the inverse.
    flags:     entries of adapter_config.json that set it apart from others of its type.
    fuse:      (arrays of each part or None, output widths, arguments) -> (arrays, changed arguments) of the one kernel
               that a checkpoint keeps for several (GPT-2's c_attn), or None where the method has no such form.
    split:     (arrays, index of the part, number of parts) -> arrays of that part.
    """

    peft_type: str
    write: Callable[[Arrays], dict[str, np.ndarray]]
    read: Callable[[Arrays], dict[str, np.ndarray]]
    flags: Mapping[str, Any] = {}
    fuse: Callable[[Sequence[Arrays | None], Sequence[int], Mapping[str, Any]], tuple[Arrays, dict]] | None = None
    split: Callable[[Arrays, int, int], Arrays] | None = None
