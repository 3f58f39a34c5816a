"""Batches of a corpus, in an order that depends on the seed alone, from any step, on any number of hosts.

Every host knows the lengths of all examples, so all make the same plan of global batches and each builds its own rows
of them. The state of the loader is one number: the next global batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tunejax.core import errors
from tunejax.data import collate, plan
from tunejax.data import packing as packs
from tunejax.data.corpus import Corpus
from tunejax.data.example import Example
from tunejax.data.mlm import Masking
from tunejax.data.options import LABELLED


class Loader:
    """An iterator of batches (dicts of numpy arrays [batch_size / shard_count, length]; see `collate.collate`).

    Batches are built ahead in threads. An exhausted loader starts again when it is iterated over anew.
    """

    def __init__(
        self, batches: plan.Plan, *, num_epochs: float | None, shard_index: int, shard_count: int, pad_id: int,
        masking: Masking | None, beside: collate.Beside | None, threads: int, prefetch: int,
    ):  # fmt: skip
        self.plan, self.num_epochs = batches, num_epochs
        self.num_steps = None if num_epochs is None else batches.steps(num_epochs)
        self._shard = (shard_index, shard_count)
        self._pad_id, self._masking, self._beside = pad_id, masking, beside
        self._read = (threads, prefetch)
        self._exhausted = False
        self._batches: Any = None
        self._open(0)

    def _open(self, step: int) -> None:
        import grain

        if self._batches is not None:
            self._batches.close()
        threads, prefetch = self._read
        data = grain.MapDataset.source(_Batches(self))
        self._batches = iter(data.to_iter_dataset(grain.ReadOptions(threads, prefetch)))
        self._batches.set_state({"next_index": step})
        self._exhausted = False

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        if self._exhausted:
            self.reset()
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return next(self._batches)
        except StopIteration:
            self._exhausted = True
            raise

    def reset(self) -> None:
        """Back to the first batch."""
        self._open(0)

    @property
    def step(self) -> int:
        """The global batch that comes next, from 0."""
        return self._batches.get_state()["next_index"]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the first epoch. With packing later epochs differ a little: see ``plan.steps``."""
        return self.plan.batches(0)

    def build(self, step: int) -> dict[str, np.ndarray]:
        """This host's rows of the global batch ``step``; no state changes."""
        epoch, rows = self.plan.batch(step)
        index, count = self._shard
        local = self.plan.settings.batch_size // count
        return collate.collate(
            self.plan.corpus.store,
            rows[index * local : (index + 1) * local],
            local,
            self.length(step),
            pad_id=self._pad_id,
            example=lambda i: self.example(i, epoch),
            prompt=self.plan.settings.prompt,
            labelled=self.plan.corpus.options.labels_first,
            beside=self._beside,
        )

    def length(self, step: int) -> int:
        """Positions a row of the global batch ``step``, on every host."""
        s = self.plan.settings
        if s.packing:
            return s.max_length
        return collate.bucket(max(map(s.size, self.plan.batch(step)[1])), s.buckets)

    def example(self, index: int, epoch: int) -> Example:
        """An example as it is shown in an epoch."""
        example = self.plan.corpus.store[index]
        return example if self._masking is None else self._masking(example, index, epoch)

    def sources(self, step: int) -> list[list[str]]:
        """ "file:line" of the examples in each row of the global batch ``step``."""
        names = self.plan.corpus.store.sources
        return [[names[p.example] for p in pieces] for pieces in self.plan.batch(step)[1]]

    def get_state(self) -> dict[str, Any]:
        """A JSON-able state: the next batch, and what the order of batches depends on."""
        return {"next_index": self.step, "about": self._about()}

    def _about(self) -> dict[str, Any]:
        corpus = self.plan.corpus
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in self.plan.settings._asdict().items()}
        return {
            "examples": len(corpus),
            "digest": corpus.store.digest,
            "parts": [[n, w] for n, w in corpus.parts],
            "beside": None if self._beside is None else self._beside.digest,
            **settings,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called, on any number of hosts.

        Raises:
          DataError: the data or settings are not those of the state.
        """
        then, now = state["about"], self._about()
        changed = [f"{k}: {then.get(k)} then, {now[k]} now" for k in now if then.get(k) != now[k]]
        if changed:
            raise errors.DataError(
                "the data of the checkpoint is not this data, so its order cannot go on; changed: " + "; ".join(changed)
            )
        self._open(int(state["next_index"]))


class _Batches:
    """A loader's batches as a random-access source of grain. Endless where the loader is."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __len__(self) -> int:
        return 1 << 40 if self._loader.num_steps is None else self._loader.num_steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self._loader.build(int(step))


def make_loader(
    corpus: Corpus,
    *,
    batch_size: int,
    max_length: int | None = None,
    packing: bool | str = False,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: float | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    buckets: Sequence[int] | None = None,
    group_by_length: bool = False,
    drop_last: bool = False,
    pad_id: int = 0,
    masking: Masking | None = None,
    beside: collate.Beside | None = None,
    threads: int = 2,
    prefetch: int = 4,
) -> Loader:
    """The batches of a corpus, every example with the `front` of the corpus's options before it.

    Args:
      batch_size: rows of a global batch; each of ``shard_count`` hosts builds an equal block of them.
      max_length: positions a row; by default that of the corpus.
      packing: several examples a row: True or "bfd", "first_fit", or "wrapped" (format text: rows filled to the brim,
        examples split at their ends); see `packing.pack`.
      num_epochs: None: endless. The last batch of an epoch is filled up with empty rows, or left out by drop_last.
      buckets: lengths to pad to, by default `collate.default_buckets`. With packing all batches have max_length.
      group_by_length: batches of examples of similar length, to pad less.
      pad_id: the token of padding; nothing attends to it.
      masking: hides tokens, for masked_lm, where the objective does not.
      beside: further arrays of each example, which land where its tokens do.
      threads, prefetch: that build batches ahead, and how many; 0 threads: none.

    Raises:
      ConfigError: settings that do not fit together.
      DataError: an example longer than a row, or no full batch.
    """
    length = corpus.options.max_length if max_length is None else max_length
    strategy = ("bfd" if packing is True else packing) or None
    _check(corpus, batch_size, length, strategy, shard_index, shard_count)
    chosen = tuple(sorted(buckets)) if buckets else collate.default_buckets(length)
    settings = plan.Settings(
        batch_size, length, strategy, seed, shuffle, group_by_length, drop_last, chosen, corpus.options.front
    )
    batches = plan.Plan(corpus, settings)
    if len(batches.rows(0)) == 0:
        weights = ", ".join(f"{weight:g} of {count}" for count, weight in corpus.parts)
        raise errors.DataError(
            f"no row is drawn in an epoch: the weights draw {weights} rows; raise data.path's weight"
        )
    if batches.batches(0) == 0:
        raise errors.DataError(f"{len(batches.rows(0))} rows do not fill one batch of {batch_size} (drop_last)")
    return Loader(
        batches, num_epochs=num_epochs, shard_index=shard_index, shard_count=shard_count, pad_id=pad_id,
        masking=masking, beside=beside, threads=threads, prefetch=max(prefetch, threads),
    )  # fmt: skip


def _check(corpus: Corpus, batch_size: int, length: int, strategy: str | None, index: int, count: int) -> None:
    if strategy is not None and strategy not in packs.STRATEGIES:
        raise errors.ConfigError(f"packing {strategy!r}. {errors.did_you_mean(strategy, packs.STRATEGIES)}")
    if strategy == "wrapped" and corpus.options.format != "text":
        raise errors.ConfigError(
            f"packing 'wrapped' splits examples: for the format 'text', not {corpus.options.format!r}"
        )
    if strategy and corpus.options.objective in LABELLED:
        raise errors.ConfigError(f"packing does not go with {corpus.options.objective}, which reads one label a row")
    if batch_size < 1 or not 0 <= index < count or batch_size % count:
        raise errors.ConfigError(
            f"a batch of {batch_size} rows does not split evenly over {count} hosts (host {index})"
        )
    longest, before = int(corpus.store.lengths.max(initial=0)), len(corpus.options.front)
    if longest + before > length and strategy != "wrapped":
        after = f" less {before} virtual tokens" if before else ""
        raise errors.DataError(f"an example of {longest} tokens is longer than max_length={length}{after}")
