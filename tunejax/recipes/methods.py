"""`tunejax methods`: every method, what it trains and of how much, what it composes with, and its paper."""

import argparse
import functools
import inspect
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

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
VARIANTS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "rsLoRA": ("LoRA scaled by alpha / √rank", "2312.03732", [{"name": "lora", "rslora": True}]),
    "QLoRA": ("LoRA over kernels in 4 bits", "2305.14314", [{"name": "quantize", "kind": "nf4"}, {"name": "lora"}]),
    "AdapterDrop": ("Adapters, but in none of the first layers", "2010.11918", [{"name": "pfeiffer", "drop_first": 5}]),
}
"""What has a name and a paper and is an argument or a chain here: what it is, its paper, its description."""
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
    """One row a method of the registry, in its order, then one a variant."""
    return [_row(name) for name in registry.NAMES] + [_variant(name) for name in VARIANTS]


def markdown(found: list[Row]) -> str:
    """The rows as the README has them."""
    head = "| name | what trains | arguments | of a 7B Llama | together with LoRA | HF PEFT | AdapterHub | paper |\n"
    lines = [head, "|" + "---|" * 8 + "\n"]
    for r in found:
        paper = f"[{r.paper}](https://arxiv.org/abs/{r.paper})" if r.paper else ""
        peft, hub = (f"`{x}`" if x else "" for x in (r.peft, r.hub))
        share = f"{100 * r.share:.3g}%" + (", by a mask" if r.masked else "")
        cells = (
            f"`{r.name}`" if r.name in registry.NAMES else r.name,
            r.trains,
            f"`{r.arguments}`",
            share,
            r.composes,
            peft,
            hub,
            paper,
        )
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
    paper = PAPER.search(opening) or PAPER.search((module.__doc__ or "").partition("\n\n")[0])
    trains = CITATION.sub("", opening).partition(". ")[0].rstrip(".")
    return _filled(name, trains, ", ".join(parameters), example(name), name, paper[1] if paper else None)


def _variant(name: str) -> Row:
    trains, paper, specs = VARIANTS[name]
    told = yaml.safe_dump(specs if len(specs) > 1 else specs[0], default_flow_style=True, sort_keys=False, width=1000)
    return _filled(name, trains, told.strip(), registry.build(specs), specs[-1]["name"], paper)


def _filled(name: str, trains: str, arguments: str, method: Method, kept_as: str, paper: str | None) -> Row:
    """The row of a method that HF PEFT and AdapterHub keep as the one named ``kept_as``."""
    module = registry.find(kept_as)[1]
    kinds = (portable.form_of, portable.prompt_of, portable.whole_of)
    peft = [form.peft_type for form in (of(module, kept_as) for of in kinds) if form is not None]
    hub = portable.hub_of(module, kept_as)
    return Row(
        name,
        trains,
        arguments,
        rates.counts(method, *_begun(method)).share,
        method.density is not None,
        _composes(method),
        peft[0] if peft else None,
        hub.name if isinstance(hub, portable.HubForm) else None,
        paper,
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
