"""`tunejax unmerge MERGED RUN --output FOLDER`: a merged model back to the base that the run was trained on."""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp

from tunejax.config import locate
from tunejax.core import errors, paths, unmerge
from tunejax.interop import hf, tensors
from tunejax.recipes import artefact, folder, runtime


def main(args: argparse.Namespace) -> None:
    """Writes the model without what the run changed, and says how far that is from the run's base.

    Raises:
      CheckpointError: no such model, or one of another architecture.
      ConfigError: the model is not what the run merges into, or, without ``--rest``, more than rounding is left.
      NotLinear: the run's method does not merge.
    """
    output = folder.new(args.output)
    runtime.begin()
    run = artefact.open_run(args.run)
    source = hf.resolve(locate.model(args.merged))
    merged, eps = read(source, run)
    edits = {p: x for p, x in paths.flatten(run.base).items() if x is not paths.get(run.loaded.params, p)}
    back = unmerge.unmerge(merged, run.loaded.params, run.parts.method, run.train, run.state, edits)
    gap = unmerge.farthest(back, run.loaded.params)
    base = run.loaded.base
    told = f"{gap.largest:.1e} from {base.name} (digest {base.digest[:16]}) at {gap.path}"
    if not (gap.within(eps) or args.rest):
        raise errors.ConfigError(
            f"{args.merged} without what {args.run} changed is up to {told}, which is more than rounding: it is no "
            "merge of that run, or holds other changes too; --rest writes what is left"
        )
    parts, how = run.parts, hf.generation_config(run.parts.folder)
    texts = {hf.GENERATION: json.dumps(how, indent=2) + "\n"} if how else {}
    head, words = parts.config.model.head or "lm", artefact.tokenizer_folder(parts)
    hf.save(output, back, parts.model_config, head=head, tokenizer_from=words, texts=texts)
    print(f"{output}: {args.merged} without {parts.method.name}, at most {told}")
    if run.loaded.fresh:
        print(f"note: {base.name} has no {', '.join(run.loaded.fresh)}; here it is as the run drew it")


def read(source: Path, run: artefact.Tuned) -> tuple[paths.Params, float]:
    """A merged model in the segments of a run, in float32, and the rounding of the coarsest type that it is stored in.

    Raises:
      CheckpointError: as `hf.load`; or it is of another family than the run's base.
    """
    config, wanted = hf.read_config(source), run.parts.model_config
    if config.family != wanted.family:
        raise errors.CheckpointError(f"{source} is a {config.family}, and {run.parts.name} a {wanted.family}")
    head = run.parts.config.model.head or "lm"
    params, report = hf.load(source, config, head=head, cuts=artefact.cuts(run.parts))
    if report.fresh:
        raise errors.CheckpointError(
            f"{source} has no {report.fresh[0]}, and the run's model has: it is no merge of it"
        )
    kinds = [t.dtype for t in tensors.open_folder(source).values()] + [x.dtype for x in _arrays(run.loaded.params)]
    return params, max(float(jnp.finfo(k).eps) for k in kinds if jnp.issubdtype(k, jnp.floating))


def _arrays(params: paths.Params) -> list:
    return [x for x in paths.flatten(params).values() if x is not None]
