"""A teacher's cache: where things lie, a writer that was killed, damage, and other data."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

from tunejax.core import errors
from tunejax.data import collate, packing, teacher_cache
from tunejax.data.example import Example, Store

K, VOCAB = 3, 11


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Groups of 8 positions and files of 24, so that a few examples make many."""
    monkeypatch.setattr(teacher_cache, "GROUP", 8 * K)
    monkeypatch.setattr(teacher_cache, "PART", 24 * K)


def store(count=40, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        n = int(rng.integers(1, 7))
        weights = (rng.uniform(size=n) < 0.6).astype(np.float32)
        weights[-1] = 1
        rows.append(Example(*rng.integers(0, VOCAB, (2, n)).astype(np.int32), weights, f"a:{i}"))
    return Store(rows)


def manifest(examples, **changes):
    return teacher_cache.Manifest(
        **{
            "teacher": "big", "teacher_digest": "d", "temperature": 2.0, "k": K, "vocabulary": VOCAB,
            "data": examples.digest, "tokenizer": "t", "max_length": 8, "examples": len(examples),
            "positions": int(teacher_cache.positions(examples).sum()), **changes,
        }
    )  # fmt: skip


def said(examples, index):
    """What the teacher says of an example, made up from its index."""
    n = int((examples[index].loss_weights != 0).sum())
    rng = np.random.default_rng(index)
    ids = np.stack([rng.permutation(VOCAB)[:K] for _ in range(n)]).astype(np.int32)
    return teacher_cache.Rows(ids, rng.standard_normal((n, K), np.float32), rng.standard_normal(n).astype(np.float32))


def write(folder, examples, parts=None):
    where = teacher_cache.layout(teacher_cache.positions(examples), K)
    teacher_cache.begin(folder, manifest(examples))
    for part in teacher_cache.missing(folder, where.parts)[:parts]:
        rows = {int(i): said(examples, int(i)) for i in where.examples(part)}
        teacher_cache.write_part(folder, examples, where, part, rows)
    return where


def read(folder, examples, **changes):
    options = {"vocabulary": VOCAB, "temperature": 2.0, "tokenizer": "t"} | changes
    return teacher_cache.Cache(folder, examples, **options)


def test_positions_and_layout_by_hand():
    rows = [Example(*np.zeros((2, 3), np.int32), np.array(w, np.float32), "a") for w in ([0, 1, 1], [1, 1, 1])]
    assert teacher_cache.positions(Store(rows)).tolist() == [2, 3]
    # Starts 0, 5, 10, 15, ... in groups of 8 positions, and files of 24.
    where = teacher_cache.layout(np.full(10, 5), K)
    assert where.group.tolist() == [0, 0, 1, 1, 2, 0, 0, 1, 2, 2]
    assert where.row.tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 0, 1]
    assert where.part.tolist() == [0] * 5 + [1] * 5
    assert where.parts == 2


def test_a_position_beyond_groups_and_files_leaves_no_hole():
    where = teacher_cache.layout(np.array([1, 100, 1, 1]), K)
    assert where.part.tolist() == [0, 0, 1, 1]
    assert where.group.tolist() == [0, 0, 0, 0]
    assert where.row.tolist() == [0, 1, 0, 1]


def test_what_is_written_is_read_where_the_tokens_are(tmp_path):
    examples = store()
    where = write(tmp_path / "c", examples)
    assert where.parts > 2
    cache = read(tmp_path / "c", examples)
    for i in np.random.default_rng(1).permutation(len(examples)).tolist():
        want, got = said(examples, i), cache.said(i)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        beside, learned = cache(i), examples[i].loss_weights != 0
        assert set(beside) == set(cache.shapes)
        np.testing.assert_array_equal(beside["teacher_ids"][learned], want.ids)
        np.testing.assert_array_equal(beside["teacher_tail"][learned], want.tail)
        assert not beside["teacher_logprobs"][~learned].any()


def test_a_batch_has_it_beside_the_tokens(tmp_path):
    """Two examples packed behind a prompt of two tokens; the second one cut in its middle."""
    examples = store()
    write(tmp_path / "c", examples)
    cache = read(tmp_path / "c", examples)
    long = [i for i in range(len(examples)) if examples.lengths[i] >= 4][:2]
    n = int(examples.lengths[long[0]])
    pieces = (packing.Piece(long[0], 0, n), packing.Piece(long[1], 1, 3))
    batch = collate.collate(examples, [pieces], 2, 16, prompt=(90, 91), beside=cache)
    assert batch["teacher_ids"].shape == (2, 16, K)
    np.testing.assert_array_equal(batch["teacher_logprobs"][0, 2 : 2 + n], cache(long[0])["teacher_logprobs"])
    np.testing.assert_array_equal(batch["teacher_ids"][0, 4 + n : 6 + n], cache(long[1])["teacher_ids"][1:3])
    empty = [0, 1, 2 + n, 3 + n, *range(6 + n, 16)]
    for name in cache.shapes:
        assert not batch[name][0, empty].any()
        assert not batch[name][1].any()


def test_a_labels_distribution_moves_with_the_label_to_the_prompts_first(tmp_path):
    rows = [Example(np.arange(4, dtype=np.int32), np.full(4, 2, np.int32), np.eye(4, dtype=np.float32)[0], "a:1")]
    examples = Store(rows)
    write(tmp_path / "c", examples)
    cache = read(tmp_path / "c", examples)
    pieces = [(packing.Piece(0, 0, 4),)]
    batch = collate.collate(examples, pieces, 1, 8, prompt=(90, 91), beside=cache, labelled=True)
    np.testing.assert_array_equal(batch["teacher_logprobs"][0, 0], said(examples, 0).logprobs[0])
    assert np.flatnonzero(batch["teacher_logprobs"].any(-1)[0]).tolist() == [0]
    assert np.flatnonzero(batch["loss_weights"][0]).tolist() == [0]


def test_a_writer_goes_on_where_it_stopped(tmp_path):
    examples = store()
    where = write(tmp_path / "c", examples, parts=2)
    with pytest.raises(errors.ConfigError, match=f"not finished \\({where.parts - 2} of {where.parts} files"):
        read(tmp_path / "c", examples)
    first = (tmp_path / "c" / "part-00000.parquet").stat().st_mtime_ns
    write(tmp_path / "c", examples)
    assert (tmp_path / "c" / "part-00000.parquet").stat().st_mtime_ns == first
    read(tmp_path / "c", examples).said(len(examples) - 1)


def _writes_and_dies(folder, examples, where):
    """Dies by SIGKILL with the second file half written."""
    teacher_cache.GROUP, teacher_cache.PART = 8 * K, 24 * K

    class Deadly(dict):
        def __getitem__(self, index):
            if where.part[index] == 1 and where.group[index] == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return said(examples, int(index))

    teacher_cache.begin(folder, manifest(examples))
    for part in range(where.parts):
        teacher_cache.write_part(folder, examples, where, part, Deadly())


def test_a_killed_writer_leaves_no_half_file(tmp_path):
    examples = store()
    where = teacher_cache.layout(teacher_cache.positions(examples), K)
    process = multiprocessing.get_context("spawn").Process(
        target=_writes_and_dies, args=(tmp_path / "c", examples, where)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert teacher_cache.missing(tmp_path / "c", where.parts) == list(range(1, where.parts))
    write(tmp_path / "c", examples)
    cache = read(tmp_path / "c", examples)
    np.testing.assert_array_equal(cache.said(len(examples) - 1).ids, said(examples, len(examples) - 1).ids)


@pytest.mark.parametrize("how", ["cut", "flipped", "swapped", "emptied"])
def test_a_damaged_file_is_told(tmp_path, how):
    examples = store()
    where = write(tmp_path / "c", examples)
    file, other = (tmp_path / "c" / f"part-0000{i}.parquet" for i in (0, 1))
    raw = bytearray(file.read_bytes())
    if how == "cut":
        file.write_bytes(raw[: len(raw) // 2])
    elif how == "emptied":
        file.write_bytes(b"")
    elif how == "flipped":
        for at in range(60, len(raw) // 3):
            raw[at] ^= 0xFF
        file.write_bytes(raw)
    else:
        file.write_bytes(other.read_bytes())
    cache = read(tmp_path / "c", examples)
    with pytest.raises(errors.CheckpointError, match=r"part-00000\.parquet is damaged"):
        _ = [cache.said(i) for i in where.examples(0).tolist()]


def test_one_flipped_bit_is_found(tmp_path):
    """Wherever it is; or it changes nothing that is read."""
    examples = store(12)
    where = write(tmp_path / "c", examples)
    file = tmp_path / "c" / "part-00000.parquet"
    raw = file.read_bytes()
    cache, found = read(tmp_path / "c", examples), 0
    want = [cache.said(i) for i in where.examples(0).tolist()]
    for at in range(0, len(raw), 3):
        changed = bytearray(raw)
        changed[at] ^= 0x10
        file.write_bytes(changed)
        cache = read(tmp_path / "c", examples)
        try:
            got = [cache.said(i) for i in where.examples(0).tolist()]
        except errors.CheckpointError:
            found += 1
            continue
        for a, b in zip(got, want, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)), f"byte {at}"
    assert found > len(raw) / 9


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 1.0}, "made at temperature 2, and distill.temperature is 1"),
        ({"vocabulary": 12}, "tells 11 tokens or labels apart, and the student 12"),
        ({"teacher": "small"}, "its teacher is big, and distill.teacher is small"),
    ],
)
def test_another_run_is_refused(tmp_path, changes, says):
    examples = store()
    write(tmp_path / "c", examples)
    with pytest.raises(errors.ConfigError, match=says):
        read(tmp_path / "c", examples, **changes)
    assert read(tmp_path / "c", examples, teacher="big").manifest.teacher == "big"


def test_other_data_is_refused(tmp_path):
    examples = store()
    write(tmp_path / "c", examples)
    with pytest.raises(errors.ConfigError, match="of other rows or options of data"):
        read(tmp_path / "c", store(seed=1))
    with pytest.raises(errors.ConfigError, match="by another tokenizer"):
        read(tmp_path / "c", store(seed=1), tokenizer="u")
    with pytest.raises(errors.ConfigError, match=r"holds another cache: data: .* there"):
        teacher_cache.begin(tmp_path / "c", manifest(store(seed=1)))


def test_no_cache_and_a_damaged_manifest(tmp_path):
    examples = store()
    with pytest.raises(errors.ConfigError, match="no teacher's cache"):
        read(tmp_path, examples)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(errors.ConfigError, match="is there and is no teacher's cache"):
        teacher_cache.begin(tmp_path / "other", manifest(examples))
    write(tmp_path / "c", examples)
    file = tmp_path / "c" / teacher_cache.MANIFEST
    raw = json.loads(file.read_text())
    for text in ("{", json.dumps({**raw, "format": 9}), json.dumps({k: v for k, v in raw.items() if k != "k"}), "[]"):
        file.write_text(text)
        with pytest.raises(errors.CheckpointError, match=r"manifest\.json is"):
            read(tmp_path / "c", examples)
