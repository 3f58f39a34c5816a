"""The loader: resumes in the same bytes from any step, hosts share a batch without overlap, masks and pads as told."""

import json

import numpy as np
import pytest
import toys

from tunejax.core import errors
from tunejax.data import corpus, mlm, options, pipeline


def text_corpus(n=23, **opts):
    rng = np.random.default_rng(1)
    rows = [{"text": "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 30)))} for _ in range(n)]
    return corpus.load(rows, toys.characters(), options.Options(**{"max_length": 40, **opts}))


def word_corpus(n=11):
    rows = [{"text": " ".join(f"w{(i * j) % 10}" for j in range(1, 3 + i % 4))} for i in range(n)]
    return corpus.load(rows, toys.encoder(), options.Options(objective="masked_lm", max_length=16))


def mixed_corpus():
    rows = [[{"text": c * n} for n in range(2, 9)] for c in "xyz"]
    sources = [corpus.Source(r, w) for r, w in zip(rows, (1, 2, 0.5), strict=True)]
    return corpus.load(sources, toys.characters(), options.Options(max_length=16))


CONFIGS = {
    "plain": (text_corpus, {"num_epochs": 3}),
    "packed": (text_corpus, {"packing": True, "num_epochs": 3}),
    "first_fit": (text_corpus, {"packing": "first_fit", "num_epochs": 2}),
    "wrapped": (text_corpus, {"packing": "wrapped", "num_epochs": 2, "max_length": 17}),
    "grouped": (text_corpus, {"group_by_length": True, "num_epochs": 2, "buckets": (8, 16, 40)}),
    "in order": (text_corpus, {"shuffle": False, "num_epochs": 1}),
    "half an epoch": (text_corpus, {"num_epochs": 1.5, "drop_last": True}),
    "one thread": (text_corpus, {"packing": True, "num_epochs": 2, "threads": 0}),
    "mixed": (mixed_corpus, {"packing": True, "num_epochs": 3}),
    "masked": (word_corpus, {"num_epochs": 2, "masking": mlm.Masking(6, 17, seed=3)}),
}


def make(name, **more):
    build, opts = CONFIGS[name]
    return pipeline.make_loader(build(), batch_size=4, seed=5, **opts, **more)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_resumes_from_every_step(name):
    loader = make(name)
    states, batches = [loader.get_state()], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.get_state())
    assert len(batches) == loader.num_steps > 2
    again = make(name)
    for step, state in enumerate(states):
        again.set_state(json.loads(json.dumps(state)))
        assert again.step == step
        got = [again.__next__() for _ in range(min(2, len(batches) - step))]
        for one, other in zip(got, batches[step : step + 2], strict=True):
            same(one, other)
    again.set_state(states[-1])
    assert list(again) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_hosts_share_a_batch(name):
    """Whatever the number of hosts, the rows of a global batch are the same and each stands on one host."""
    whole = list(make(name))
    halves = [list(make(name, shard_index=i, shard_count=2)) for i in range(2)]
    assert len(whole) == len(halves[0]) == len(halves[1])
    for batch, *parts in zip(whole, *halves, strict=True):
        same(batch, {k: np.concatenate([p[k] for p in parts]) for k in batch})


def test_a_state_moves_to_another_number_of_hosts():
    one = make("packed")
    next(one)
    two = make("packed", shard_index=1, shard_count=2)
    two.set_state(one.get_state())
    np.testing.assert_array_equal(next(two)["tokens"], next(one)["tokens"][2:])


def seen(batches):
    """The examples of batches, as (tokens, targets) texts, in order."""
    out = []
    for batch in batches:
        for tokens, targets, segments in zip(batch["tokens"], batch["targets"], batch["segment_ids"], strict=True):
            for s in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == s)
                out.append((*tokens[at].tolist(), int(targets[at[-1]])))
    return out


@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_shows_every_row_once_and_epochs_differ(packed):
    made = text_corpus()
    expected = sorted((*e.tokens.tolist(), int(e.targets[-1])) for e in made.store)
    loader = pipeline.make_loader(made, batch_size=4, packing=packed, seed=1)
    epochs = [seen(next(loader) for _ in range(loader.plan.batches(e))) for e in range(3)]
    for shown in epochs:
        assert sorted(shown) == expected
    assert epochs[0] != epochs[1] != epochs[2]
    other = pipeline.make_loader(made, batch_size=4, packing=packed, seed=2)
    assert seen(next(other) for _ in range(loader.plan.batches(0))) != epochs[0]


def test_packed_rows_are_whole_examples():
    for batch in make("packed"):
        segments, positions = batch["segment_ids"], batch["positions"]
        assert batch["tokens"].shape == (4, 40)
        assert not batch["loss_weights"][segments == 0].any()
        for row, where in zip(segments, positions, strict=True):
            filled = int((row > 0).sum())
            assert (row[filled:] == 0).all()
            assert (np.diff(row[:filled]) >= 0).all()
            for s in range(1, row.max() + 1):
                assert where[row == s].tolist() == list(range(int((row == s).sum())))


def test_the_last_batch_is_filled_with_empty_rows():
    batches = list(make("in order"))
    assert [int((b["segment_ids"].max(1) > 0).sum()) for b in batches] == [4, 4, 4, 4, 4, 3]
    assert len(make("half an epoch").plan.rows(0)) == 23
    assert make("half an epoch").num_steps == 5 + 3
    sources = [s for step in range(6) for row in make("in order").sources(step) for s in row]
    assert sources == [f"rows:{i}" for i in range(1, 24)]


def test_an_exhausted_loader_starts_again():
    loader = make("in order")
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == 6
    same(first[0], second[0])
    assert next(loader, None) is None
    for _ in range(2):
        loader.reset()
        same(next(loader), first[0])


def test_few_shapes():
    lengths = {b["tokens"].shape[1] for b in make("plain")}
    assert lengths <= {32, 40}
    grouped = [b["tokens"].shape[1] for b in make("grouped")]
    assert set(grouped) <= {8, 16, 40}
    assert sum(grouped) < sum(b["tokens"].shape[1] for b in make("plain", buckets=(8, 16, 40)))


def test_weights_of_sources():
    loader = make("mixed")
    letters = [chr(example[0] - 3) for example in seen(loader)]
    assert [letters.count(c) for c in "xyz"] == [21, 42, 11]


def test_masking():
    made = word_corpus(200)
    masking = mlm.Masking(6, 17, seed=3)
    hidden = kept = mask = 0
    for i, example in enumerate(made.store):
        shown = masking(example, i, 0)
        at = shown.loss_weights > 0
        assert at.any()
        assert not at[[0, -1]].any()
        np.testing.assert_array_equal(shown.targets, example.tokens)
        np.testing.assert_array_equal(shown.tokens[~at], example.tokens[~at])
        hidden, kept, mask = (
            hidden + at.sum(),
            kept + (shown.tokens == example.tokens)[at].sum(),
            mask + (shown.tokens == 6).sum(),
        )
        np.testing.assert_array_equal(shown.tokens, masking(example, i, 0).tokens)
    assert 0.7 < mask / hidden < 0.9
    assert 0.03 < kept / hidden < 0.2
    long = corpus.load(
        [{"text": "w1 " * 4000}], toys.encoder(), options.Options(objective="masked_lm", max_length=5000)
    )
    shares = [masking(long.store[0], 0, epoch).loss_weights for epoch in (0, 1)]
    assert 0.13 < shares[0].mean() < 0.17
    assert not np.array_equal(*shares)


def test_token_types_come_along():
    rows = [{"text": "w1", "text_pair": "w2", "label": i % 2} for i in range(3)]
    made = corpus.load(rows, toys.encoder(), options.Options(objective="classification"))
    batch = next(pipeline.make_loader(made, batch_size=4, shuffle=False, buckets=(8,), pad_id=0))
    assert batch["token_types"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]] * 3 + [[0] * 8]
    assert batch["targets"].tolist() == [[0] * 8, [1] + [0] * 7, [0] * 8, [0] * 8]


def test_what_does_not_fit():
    made = text_corpus()
    for opts, error, message in [
        ({"batch_size": 3, "shard_count": 2}, errors.ConfigError, "does not split evenly over 2 hosts"),
        ({"max_length": 8}, errors.DataError, "longer than max_length=8"),
        ({"packing": "bdf"}, errors.ConfigError, "Did you mean 'bfd'"),
        ({"batch_size": 99, "drop_last": True}, errors.DataError, "23 rows do not fill one batch of 99"),
    ]:
        with pytest.raises(error, match=message):
            pipeline.make_loader(made, **{"batch_size": 4, **opts})
    rare = corpus.load(corpus.Source([{"text": "abc"}] * 3, 0.1), toys.characters())
    with pytest.raises(errors.DataError, match=r"the weights draw 0\.1 of 3 rows; raise data\.path's weight"):
        pipeline.make_loader(rare, batch_size=4)
    rows = [{"prompt": "a", "completion": "b"}]
    pairs = corpus.load(rows, toys.characters())
    with pytest.raises(errors.ConfigError, match="'wrapped' splits examples"):
        pipeline.make_loader(pairs, batch_size=1, packing="wrapped")
    with pytest.raises(errors.ConfigError, match="no mask token"):
        mlm.Masking(None, 10)


def test_a_state_of_other_data_is_refused():
    state = make("plain").get_state()
    with pytest.raises(errors.DataError, match="examples: 23 then, 22 now; digest"):
        pipeline.make_loader(text_corpus(22), batch_size=4, seed=5).set_state(state)
    with pytest.raises(errors.DataError, match="changed: seed: 5 then, 6 now"):
        pipeline.make_loader(text_corpus(), batch_size=4, seed=6).set_state(state)
