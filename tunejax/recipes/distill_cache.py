"""`tunejax distill-cache CONFIG`: what the config's teacher says of its training rows, to `distill.cache`.

The same command again goes on where a killed one stopped. Training then reads the folder and never opens the teacher.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tunejax.config import load, locate, schema
from tunejax.core import digest, errors
from tunejax.core.model import Model
from tunejax.data import collate, teacher_cache
from tunejax.data.corpus import Corpus
from tunejax.data.example import Store
from tunejax.data.packing import Piece
from tunejax.objectives import distill
from tunejax.recipes import assemble, rows, runtime, settings, teacher
from tunejax.train import evaluation, progress, sharding


class Found(NamedTuple):
    """What a folder holds. kept: the teacher's mass on the tokens that it names, on average over what was new."""

    folder: Path
    manifest: teacher_cache.Manifest
    kept: float


def main(args: argparse.Namespace) -> None:
    """Writes the cache of a config, and says what is in it."""
    found = write(load.load(args.config, args.overrides))
    m = found.manifest
    size = sum(f.stat().st_size for f in found.folder.iterdir())
    print(f"{found.folder}: {m.k} of {m.vocabulary} at {m.positions:,} positions, {size / 1e6:,.1f} MB")
    if np.isfinite(found.kept):
        print(f"  they hold {100 * found.kept:.1f}% of the teacher's mass at temperature {m.temperature:g}")


def write(config: schema.Config) -> Found:
    """Runs the teacher over the training rows of a config, and writes what is missing of its cache.

    Raises:
      TunejaxError: no teacher or folder named, a teacher that does not fit, or a folder that holds something else.
    """
    section = _section(config)
    runtime.begin()
    if jax.process_count() > 1:
        raise errors.ConfigError("tunejax distill-cache runs in one process, with as many devices as it has")
    mesh = sharding.make_mesh(**config.mesh.model_dump())
    opened = assemble.opened(config)
    data = rows.read(config, opened.tokenizer, opened.model_config.kind, opened.prompt, opened.known)
    assert data.train is not None
    parts = assemble.parts(config, opened, num_labels=len(data.labels), mesh=mesh)
    (model, params), _ = teacher.opened(parts, data.labels)
    manifest = describe(parts, data.train, params)
    folder = Path(locate.expanded(section.cache or ""))
    teacher_cache.begin(folder, manifest)
    store = data.train.store
    where = teacher_cache.layout(teacher_cache.positions(store), manifest.k)
    missing = teacher_cache.missing(folder, where.parts)
    size = evaluation.fitting(settings.batches(config, mesh).evaluation, mesh)
    says = _teller(model, params, manifest, mesh)
    buckets, pad_id = rows.buckets(config), parts.tokenizer.pad_token_id or 0
    masses: list[np.ndarray] = []
    done = len(store) - sum(len(where.examples(part)) for part in missing)
    with progress.Progress(len(store), done, shown=config.train.progress, what="distill-cache") as bar:
        for part in missing:
            found: dict[int, teacher_cache.Rows] = {}
            for batch, indices in _batches(store, where.examples(part), size, buckets, pad_id):
                found.update(zip(indices, _cut(says(batch), batch, len(indices)), strict=True))
                bar.step(done + len(found))
            teacher_cache.write_part(folder, store, where, part, found)
            masses += [np.exp(r.logprobs).sum(-1) for r in found.values()]
            done += len(found)
            bar.report(done, {})
    return Found(folder, manifest, float(np.mean(np.concatenate(masses))) if masses else float("nan"))


def _section(config: schema.Config) -> schema.DistillSection:
    section = config.distill
    if section is None or section.teacher is None or section.cache is None:
        raise errors.ConfigError("distill-cache needs distill.teacher and the folder distill.cache to write")
    if section.teacher == teacher.ITSELF:
        raise errors.ConfigError(
            "distill.teacher is 'base', which costs no memory beside the student: leave distill.cache out"
        )
    return section


def describe(parts: assemble.Parts, train: Corpus, params: Any) -> teacher_cache.Manifest:
    """What the cache of a config belongs to. params: of the teacher."""
    section, store = _section(parts.config), train.store
    vocabulary = teacher.vocabulary(parts)
    return teacher_cache.Manifest(
        teacher=str(section.teacher),
        teacher_digest=digest.digest(params),
        temperature=section.temperature,
        k=min(section.top_k, vocabulary),
        vocabulary=vocabulary,
        data=store.digest,
        tokenizer=teacher.tokenizer_digest(parts.tokenizer),
        max_length=parts.config.data.max_length,
        examples=len(store),
        positions=int(teacher_cache.positions(store).sum()),
    )


def _teller(model: Model, params: Any, manifest: teacher_cache.Manifest, mesh: Any) -> Callable[[Any], Any]:
    """batch -> ids, log-probabilities and tails on the host."""

    def likeliest(params: Any, batch: Any) -> Any:
        return distill.likeliest(model, params, batch, k=manifest.k, temperature=manifest.temperature)

    compiled = jax.jit(likeliest)

    def says(batch: Any) -> Any:
        with jax.set_mesh(mesh):
            return jax.device_get(compiled(params, sharding.put_batch(batch, mesh)))

    return says


def _batches(
    store: Store, inside: np.ndarray, size: int, buckets: Sequence[int], pad_id: int
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The examples, one a row and the longest first, with the indices of a batch; short batches are filled up."""
    longest = inside[np.argsort(-store.lengths[inside], kind="stable")]
    for at in range(0, len(longest), size):
        chosen = longest[at : at + size].tolist()
        pieces = [(Piece(i, 0, int(store.lengths[i])),) for i in chosen]
        length = collate.bucket(int(store.lengths[chosen[0]]), buckets)
        yield collate.collate(store, pieces, size, length, pad_id=pad_id), chosen


def _cut(said: Any, batch: dict[str, Any], count: int) -> Iterator[teacher_cache.Rows]:
    """Of each example in a batch, what was said where something is learned."""
    for row in range(count):
        at = np.flatnonzero(batch["loss_weights"][row])
        yield teacher_cache.Rows(*(np.ascontiguousarray(x[row, at]) for x in said))
