"""One finished run on top of others: `tunejax merge LOWEST ... TOP --how stack`."""

from collections.abc import Mapping
from typing import Any

import jax

from tunejax.core import errors
from tunejax.methods import registry
from tunejax.recipes import adapter, artefact, combined
from tunejax.recipes.combined import Made

STACK = "adapter_stack"
"""The method that keeps other runs' adapters below what follows."""


def of(names: list[str]) -> tuple[artefact.Tuned, Made]:
    """(the top run, it above the adapters that the others trained); what it stood on before gives way to these.

    names: folders of runs, the lowest first. They may differ in heads: only the top one's is used.

    Raises:
      ConfigError: no run to stand on, adapters that differ in more than kernels, layers and width or do not stack, or
        a run whose stack of layers would have to be cut elsewhere.
      CheckpointError: runs of one head on different bases.
    """
    *lower, top = names
    if not lower:
        raise errors.ConfigError("--how stack puts the last run on top of the others; name two at least")
    run = artefact.open_run(top)
    specs, parts = combined.specs_of(run.parts.config), run.parts.method.parts or (run.parts.method,)
    if len(parts) != len(specs):
        raise errors.ConfigError("a preset is several methods in one; give the list in its parts")
    sources = {top: adapter.Source(run.loaded.base, run.parts.config.model.head)}
    described = [registry.alone(*adapter.trained(name, sources))[1] for name in lower]
    adapter.check_sources(sources)
    spec = {"name": STACK, "adapters": lower, **_arguments(described[0])}
    method = registry.build(spec, load=adapter.trained)
    own = [i for i, s in enumerate(specs) if s["name"] != STACK]
    depth = run.parts.model_config.num_layers
    cuts = sorted({c for m in (method, *(parts[i] for i in own)) for c in m.cuts(depth)})
    if cuts != sorted(artefact.cuts(run.parts)):
        raise errors.ConfigError(
            f"{top} was trained in a stack of layers cut before {list(artefact.cuts(run.parts))}, and above these it "
            f"would be cut before {cuts}: adapters of other layers do not go below a finished run"
        )
    state = method.init(jax.random.key(0), run.loaded.params).state
    made = Made([spec, *(specs[i] for i in own)], [{}], [state])
    for i in own:
        made.train.append(combined.part(run, "train", i))
        made.state.append(combined.part(run, "state", i))
    return run, made


def _arguments(spec: Any) -> dict[str, Any]:
    """What of a run's description the method that keeps its adapter must be told."""
    if not isinstance(spec, Mapping) or spec.get("name") not in registry.NAMES:
        return {}
    said, wanted = registry.resolved(spec)[1], registry.find(STACK)[1].AGREE
    return {k: said[k] for k in wanted if k in said}
