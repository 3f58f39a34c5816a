"""`tunejax methods`: every method, what it trains and of how much, what it composes with, and its paper."""

import argparse
import functools
import inspect
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from tunejax.core import errors, portable, rates
from tunejax.core.method import Method, Start, chain
from tunejax.core.model import key_shape
from tunejax.methods import registry
from tunejax.models import build
from tunejax.models.config import ModelConfig

LLAMA_7B: dict[str, Any] = {
    "vocab_size": 32000, "embed_dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128,
    "mlp_dim": 11008, "max_positions": 4096,
}  # fmt: skip
PAPER = re.compile(r"arXiv:\s*(\d{4}\.\d{4,5})")
CITATION = re.compile(r" \([^()]*arXiv:[^()]*\)")
PARTNER = {"name": "lora"}
"""The method that the others are tried with."""
TRAINED = {"name": "pfeiffer", "width": 1}
"""What earlier runs trained, for a method that uses such."""


class Row(NamedTuple):
    """A method. share: what trains of all that a 7B Llama then has, with the defaults; masked: a mask says what.

    peft: its type in HF PEFT; hub: what AdapterHub calls it; paper: arXiv number.
    """

    name: str
    trains: str
    arguments: str
    share: float
    masked: bool
    composes: str
    peft: str | None
    hub: str | None
    paper: str | None


def main(args: argparse.Namespace) -> None:
    """Prints the table, as Markdown where asked."""
    found = rows()
    if args.markdown:
        print(markdown(found), end="")
        return
    width = max(len(r.name) for r in found)
    for r in found:
        print(f"{r.name:<{width}}  {100 * r.share:>9.4f}%  {r.trains}")


def rows() -> list[Row]:
    """One row a method of the registry, in its order."""
    return [_row(name) for name in registry.NAMES]


def markdown(found: list[Row]) -> str:
    """The rows as the README has them."""
    head = "| name | what trains | arguments | of a 7B Llama | together with LoRA | HF PEFT | AdapterHub | paper |\n"
    lines = [head, "|" + "---|" * 8 + "\n"]
    for r in found:
        paper = f"[{r.paper}](https://arxiv.org/abs/{r.paper})" if r.paper else ""
        peft, hub = (f"`{x}`" if x else "" for x in (r.peft, r.hub))
        share = f"{100 * r.share:.3g}%" + (", by a mask" if r.masked else "")
        cells = (f"`{r.name}`", r.trains, f"`{r.arguments}`", share, r.composes, peft, hub, paper)
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


@functools.cache
def _shapes(cuts: tuple[int, ...]) -> Any:
    model = build.build(ModelConfig(family="llama", **LLAMA_7B), head="lm", cuts=cuts)
    return jax.eval_shape(model.init, key_shape())


def _begun(method: Method) -> tuple[Any, Start]:
    """(shapes of the 7B Llama's parameters, what the method makes of them); no array is made."""
    shapes = _shapes(method.cuts(LLAMA_7B["num_layers"]))
    return shapes, jax.eval_shape(method.init, key_shape(), shapes)


def _row(name: str) -> Row:
    factory, module = registry.find(name)
    parameters = inspect.signature(factory).parameters
    opening = (inspect.getdoc(factory) or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`")
    method = example(name)
    shapes, start = _begun(method)
    paper = PAPER.search(opening) or PAPER.search((module.__doc__ or "").partition("\n\n")[0])
    form = portable.form_of(module, name) or portable.prompt_of(module, name) or portable.whole_of(module, name)
    hub = portable.hub_of(module, name)
    counts = rates.counts(method, shapes, start)
    return Row(
        name,
        CITATION.sub("", opening).partition(". ")[0].rstrip("."),
        ", ".join(parameters),
        counts.share,
        method.density is not None,
        _composes(method),
        form.peft_type if form is not None else None,
        hub.name if isinstance(hub, portable.HubForm) else None,
        paper[1] if paper else None,
    )


def example(name: str) -> Method:
    """The method with its defaults; a required number is 1, a method `PARTNER`, what runs trained `TRAINED`."""
    factory, module = registry.find(name)
    special: dict[str, Any] = {k: [_zeros(), _zeros()] for k in getattr(module, "LOADED", ())}
    special |= dict.fromkeys(registry.nested(factory), PARTNER)
    parameters = inspect.signature(factory).parameters
    required = {k: special.get(k, 1) for k, p in parameters.items() if p.default is p.empty}
    return registry.build({"name": name, **required})


@functools.cache
def _zeros() -> Any:
    shapes = _begun(registry.build(TRAINED))[1].train
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def _composes(method: Method) -> str:
    """Where `PARTNER` may stand in a chain with it, on the same kernels."""
    partner = registry.build(PARTNER)
    before, after = _fits(chain(method, partner)), _fits(chain(partner, method))
    return {(True, True): "either first", (True, False): "this first", (False, True): "LoRA first"}.get(
        (before, after), "on other kernels"
    )


def _fits(method: Method) -> bool:
    try:
        _begun(method)
    except errors.TunejaxError:
        return False
    return True
