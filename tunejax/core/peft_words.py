"""HF PEFT's words in a method's description: names of modules, and what is several descriptions here.

    {name: lora, r: 8, target_modules: all-linear, rank_pattern: {down_proj: 16}, modules_to_save: [classifier]}

is LoRA of rank 8, one of rank 16 at the down projections, and the classifier trained whole.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from tunejax.core import errors, paths, portable, rates

MODULES: dict[str, list[str]] = {
    "q_proj": ["attention/q/kernel"],
    "k_proj": ["attention/k/kernel"],
    "v_proj": ["attention/v/kernel"],
    "o_proj": ["attention/o/kernel"],
    "gate_proj": ["mlp/gate/kernel"],
    "up_proj": ["mlp/up/kernel"],
    "down_proj": ["mlp/down/kernel"],
    "query": ["attention/q/kernel"],
    "key": ["attention/k/kernel"],
    "value": ["attention/v/kernel"],
    "dense": ["{attention/o,mlp/up,mlp/down,pooler,mlm/dense}/kernel"],
    "output.dense": ["attention/o/kernel", "mlp/down/kernel"],
    "attention.output.dense": ["attention/o/kernel"],
    "intermediate.dense": ["mlp/up/kernel"],
    "pooler.dense": ["/pooler/kernel"],
    "c_attn": ["attention/{q,k,v}/kernel"],
    "c_proj": ["attention/o/kernel", "mlp/down/kernel"],
    "c_fc": ["mlp/up/kernel"],
    "lm_head": ["/head/kernel"],
    "score": ["/head/kernel"],
    "classifier": ["/classifier/kernel"],
    "all-linear": ["{layers/**,pooler,mlm/dense}/kernel"],
}
"""Names of modules in Hugging Face's models -> globs here; what is not listed is taken as a glob."""

PARENTS = {"self_attn": "attention/", "attn": "attention/", "attention.self": "attention/", "mlp": "mlp/"}
"""What may stand before such a name -> which of its globs are meant."""

WHOLE: dict[str, list[str]] = {
    **{k: ["/embed/*"] for k in ("embed_tokens", "wte", "word_embeddings")},
    **{k: ["/positions/*"] for k in ("wpe", "position_embeddings")},
    **{k: ["attention/norm/*"] for k in ("input_layernorm", "ln_1")},
    **{k: ["mlp/norm/*"] for k in ("post_attention_layernorm", "ln_2")},
    **{k: ["{norm,q_norm,k_norm,embed_norm}/*"] for k in ("norm", "LayerNorm")},
    **{k: [f"{k}/*"] for k in ("q_norm", "k_norm")},
    "token_type_embeddings": ["/types/*"],
    "ln_f": ["/norm/*"],
    "pooler": ["/pooler/*"],
}
"""The same of modules that are no kernels, to be saved whole. PEFT looks for a name at the end of a module's: "norm" is
the norms in the blocks too. A tied head is the embedding here, and trains with it."""

KERNELS = (
    *(f"layers/0/attention/{k}/kernel" for k in "qkvo"),
    *(f"layers/0/mlp/{k}/kernel" for k in ("gate", "up", "down")),
    *(f"{k}/kernel" for k in ("pooler", "mlm/dense", "classifier", "head")),
)
"""Every kernel that a model may have, one layer for all."""

PATTERNS = {"rank_pattern": "rank", "alpha_pattern": "alpha"}
"""Module -> number, and the argument that it is the number of."""
WORDS = (*PATTERNS, "modules_to_save", "exclude_modules")
"""What no method takes as an argument."""


def globs(modules: Any) -> Any:
    """A name of a module or a list of them as globs; what is neither, as it is."""
    listed = [modules] if isinstance(modules, str) else modules
    if not isinstance(listed, list):
        return modules
    return [glob for m in listed for glob in (_named(m) if isinstance(m, str) else [m])]


def _named(module: str) -> list[str]:
    parent, _, name = module.rpartition(".")
    if module not in MODULES and parent in PARENTS and name in MODULES:
        return [g for g in MODULES[name] if g.startswith(PARENTS[parent])] or [module]
    return MODULES.get(module, [module])


def layers(name: str, numbers: list[Any]) -> str:
    """PEFT's list of layers as a slice. Raises ConfigError where it has gaps, or what is no number."""
    known = [x for x in numbers if isinstance(x, int) and not isinstance(x, bool)]
    first = min(known, default=0)
    if not numbers or len(known) < len(numbers) or sorted(known) != list(range(first, first + len(numbers))):
        raise errors.ConfigError(
            f"method {name!r}: layers_to_transform {numbers} is no run of layers; chain one method for each run"
        )
    return f"{first}:{first + len(numbers)}"


def spread(spec: Mapping[str, Any], factory: Callable[..., Any], module: ModuleType) -> list[dict[str, Any]]:
    """The descriptions that one with `WORDS` stands for, in the order of a chain.

    As in PEFT, a module that is saved whole is not adapted. What is adapted is then named kernel by kernel.

    factory, module: of the method that it names. A word that is an argument of that, or that PEFT does not have for
    it, stays where it is.

    Raises:
      ConfigError: a word's value is of another form, or names what is no module or is not targeted; nothing is left.
    """
    name, own = str(spec["name"]), inspect.signature(factory).parameters
    form = portable.form_of(module, name)
    patterned = form is not None and form.patterns
    words = {w: v for w, v in spec.items() if w in WORDS and w not in own and (patterned or w not in PATTERNS)}
    rest = {k: v for k, v in spec.items() if k not in words}
    for word, value in words.items():
        _check(name, word, value)
    whole = [g for m in words.get("modules_to_save") or () for g in _saved(m)]
    parts = [rest]
    key = "target_modules" if "target_modules" in spec else "targets"
    listed = globs(rest.get(key, own["targets"].default)) if "targets" in own else None
    if isinstance(listed, list) and all(isinstance(g, str) for g in listed):  # `registry.arguments` tells of others
        mine = [p for p in KERNELS if paths.chosen(listed, p)]
        gone = _excluded(name, words.get("exclude_modules") or [])
        left = [p for p in mine if not paths.chosen(gone, p) and not paths.chosen(whole, p)]
        if mine and not left:
            raise errors.ConfigError(f"method {name!r}: exclude_modules and modules_to_save leave nothing to adapt")
        exceptions = _exceptions(name, words, left)
        if exceptions or len(left) < len(mine):
            parts = _parts(rest, key, left, exceptions, getattr(module, "ALIASES", {}))
    saved = {"name": "full", "targets": whole, **{k: spec[k] for k in (rates.SCALE,) if k in spec}}
    return parts + ([saved] if whole else [])


def _check(name: str, word: str, value: Any) -> None:
    if word in PATTERNS:
        fits, wanted = isinstance(value, Mapping), "numbers by names of modules, such as {down_proj: 16}"
    else:
        text = word == "exclude_modules" and isinstance(value, str)
        fits = text or (isinstance(value, list) and all(isinstance(m, str) for m in value))
        wanted = "a list of names of modules"
    if value is not None and not fits:
        raise errors.ConfigError(f"method {name!r}: {word} is {value!r}; expected {wanted}")


def _saved(module: str) -> list[str]:
    """Globs over all parameters of a module."""
    kernels = [g.removesuffix("kernel") + "*" if g.endswith("/kernel") else g for g in _named(module)]
    return WHOLE.get(module, kernels)


def _excluded(name: str, modules: str | list[str]) -> list[str]:
    """Globs over what is left out; the model may well lack it. Raises ConfigError on what is no module anywhere."""
    listed = [modules] if isinstance(modules, str) else modules
    for module in listed:
        if not any(paths.chosen(globs(module), p) for p in KERNELS):
            near = errors.did_you_mean(module, list(MODULES))
            raise errors.ConfigError(f"method {name!r}: exclude_modules: {module!r} is no module's name. {near}")
    return globs(listed)


def _exceptions(name: str, words: Mapping[str, Any], left: list[str]) -> dict[str, dict[str, Any]]:
    """Kernel -> the arguments that are others there. As in PEFT, the first name that fits counts."""
    out: dict[str, dict[str, Any]] = {}
    for word, argument in PATTERNS.items():
        for module, value in (words.get(word) or {}).items():
            meant = [p for p in left if paths.chosen(globs([str(module)]), p)]
            if not meant:
                raise errors.ConfigError(
                    f"method {name!r}: {word}: {module!r} is none of what {name} targets; expected a module's name for "
                    "all layers, such as q_proj (for some layers, chain a method with 'layers' of its own)"
                )
            for path in meant:
                out.setdefault(path, {}).setdefault(argument, value)
    return out


def _parts(
    spec: Mapping[str, Any],
    key: str,
    left: list[str],
    exceptions: Mapping[str, dict[str, Any]],
    aliases: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One description of what is not excepted, where there is any, and one of each group of equal exceptions."""
    groups: dict[str, list[str]] = {}
    for path in left:
        groups.setdefault(json.dumps(exceptions.get(path, {}), sort_keys=True), []).append(path)
    out = []
    for group in sorted(groups.values(), key=lambda g: g[0] in exceptions):
        others = exceptions.get(group[0], {})
        kept = {k: v for k, v in spec.items() if aliases.get(k, k) not in others}
        out.append({**kept, key: [_either(group)], **others})
    return out


def _either(kernels: list[str]) -> str:
    """One glob over those of the kernels that a model has: two names of a list might both have to be there."""
    tails = [p.removeprefix("layers/0/").removesuffix("/kernel") for p in kernels]
    return (f"{{{','.join(tails)}}}" if len(tails) > 1 else tails[0]) + "/kernel"
