"""`tunejax distill-cache` and training from what it wrote: the online losses, without the teacher."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.data import teacher_cache
from tunejax.recipes import distill_cache

QUICK = ("data.eval_path=null", "train.max_steps=3", "train.logging_steps=1", "train.learning_rate=0.01")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a finished run, the teacher."""
    folder = tmp_path_factory.mktemp("world")
    worlds.make(folder)
    assert worlds.tune(folder, "big", "method=full", *QUICK, "train.max_steps=20")[0] == 0
    return folder


def write(world, section, *changes):
    return cli.main(["distill-cache", str(world / "my.yaml"), f"distill={section}", *changes])


def both(world, tmp_path, *changes, top_k=20):
    """Losses of a student of the run "big", online, and from a cache while that run lies elsewhere."""
    online = worlds.tune(tmp_path, "online", f"distill={{teacher: {world / 'big'}, alpha: 0.25}}", *QUICK, *changes)
    section = f"{{teacher: {world / 'big'}, cache: {tmp_path / 'c'}, top_k: {top_k}, alpha: 0.25}}"
    assert write(tmp_path, section, *QUICK, *changes) == 0
    (world / "big").rename(world / "away")
    try:
        cached = worlds.tune(tmp_path, "cached", f"distill={section}", *QUICK, *changes)
    finally:
        (world / "away").rename(world / "big")
    assert (online[0], cached[0]) == (0, 0)
    return [[row[k] for row in rows for k in ("loss", "hard", "soft")] for _, rows in (online, cached)]


@pytest.fixture
def here(world, tmp_path):
    """The config of the world in a folder of its own."""
    (tmp_path / "my.yaml").write_text((world / "my.yaml").read_text())
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        ["method=full", "model.layers=[1]"],
        ["data.packing=true", "data.max_length=32", "mesh={data: 2, fsdp: 2, tensor: 2}"],
        ["method={name: prompt_tuning, length: 2}", "train.gradient_accumulation_steps=2", "mesh={data: 4, tensor: 2}"],
    ],
    ids=["shallower", "packed", "prompt"],
)
def test_all_of_the_vocabulary_gives_the_online_losses(world, here, changes, capsys):
    online, cached = both(world, here, *changes)
    np.testing.assert_allclose(cached, online, rtol=2e-5)
    assert online[2] > 1e-3
    assert "they hold 100.0% of the teacher's mass at temperature 2" in capsys.readouterr().out


def test_labels(world, here):
    rows = [{"text": r["prompt"], "label": "red" if "red" in r["prompt"] else "blue"} for r in worlds.ROWS]
    file = worlds.jsonl(here / "labelled.jsonl", rows)
    changes = [f"data.path={file}", "objective.name=classification"]
    assert worlds.tune(world, "labels", *QUICK, *changes, "method=full")[0] == 0
    (world / "big").rename(world / "writer")
    (world / "labels").rename(world / "big")
    try:
        online, cached = both(world, here, *changes, "model.layers=[0]", "method=full", top_k=64)
    finally:
        (world / "big").rename(world / "labels")
        (world / "writer").rename(world / "big")
    np.testing.assert_allclose(cached, online, rtol=2e-5)
    assert teacher_cache.read_manifest(here / "c").k == 2


def test_a_few_tokens_teach_and_a_writer_goes_on(world, here, monkeypatch, capsys):
    monkeypatch.setattr(teacher_cache, "GROUP", 2)
    monkeypatch.setattr(teacher_cache, "PART", 8)
    section = f"{{teacher: {world / 'big'}, cache: {here / 'c'}, top_k: 1, alpha: 0}}"
    assert write(here, section) == 0
    files = sorted((here / "c").glob("*.parquet"))
    assert len(files) > 2
    before = [f.read_bytes() for f in files]
    files[1].unlink()
    assert worlds.tune(here, "early", f"distill={section}")[0] == 2
    assert f"(1 of {len(files)} files are missing)" in capsys.readouterr().err
    assert not (here / "early").exists()
    times = [f.stat().st_mtime_ns for f in files if f.exists()]
    assert write(here, section) == 0
    assert [f.stat().st_mtime_ns for f in files if f != files[1]] == times
    assert [f.read_bytes() for f in files] == before
    code, rows = worlds.tune(here, "small", f"distill={section}", "train.max_steps=12", "train.learning_rate=0.01",
                             "method=full", "model.layers=[1]")  # fmt: skip
    assert code == 0
    assert rows[-1]["soft"] < 0.8 * rows[0]["soft"]
    assert "eval_soft" not in json.loads((here / "small" / "summary.json").read_text())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([], "distill-cache needs distill.teacher"),
        (["distill={teacher: base, cache: x}"], "costs no memory"),
        (["distill={teacher: nowhere/at/all, cache: x}"], "no checkpoint folder at nowhere/at/all"),
        (["distill={alpha: 0.5}"], "name a teacher"),
        (["distill={cache: x}", "objective.name=masked_lm"], "hides other tokens each step"),
    ],
)
def test_what_cannot_be_written_is_told(world, capsys, changes, says):
    assert cli.main(["distill-cache", str(world / "my.yaml"), *changes]) == 2
    assert says in capsys.readouterr().err


def test_what_cannot_be_read_is_told(world, here, capsys):
    section = f"{{teacher: {world / 'big'}, cache: {here / 'c'}, top_k: 2}}"
    assert worlds.tune(here, "none", f"distill={section}")[0] == 2
    assert "is no teacher's cache" in capsys.readouterr().err
    assert write(here, section) == 0
    for change, says in (
        ("distill.temperature=1.0", "made at temperature 2"),
        (f"distill.teacher={world / 'model'}", f"its teacher is {world / 'big'}, and distill.teacher is"),
        ("data.max_rows=3", "of other rows or options of data"),
    ):
        assert worlds.tune(here, "none", f"distill={section}", change)[0] == 2
        assert says in capsys.readouterr().err
    assert write(here, section, "data.max_rows=3") == 2
    assert "holds another cache" in capsys.readouterr().err
    assert not (here / "none").exists()


def test_batches_are_padded_to_the_configs_multiple(world, here, monkeypatch):
    """Rows of eight tokens: by default 16, the whole of data.max_length."""
    seen, cut = set(), distill_cache._cut
    monkeypatch.setattr(distill_cache, "_cut", lambda s, b, n: (seen.add(b["tokens"].shape[1]), cut(s, b, n))[1])
    section = f"{{teacher: {world / 'big'}, cache: {here / 'c'}, top_k: 20}}"
    assert write(here, section, "data.pad_to_multiple_of=4", *QUICK) == 0
    assert seen == {8}


def test_a_teacher_with_virtual_tokens_is_refused(world, here, capsys):
    assert worlds.tune(world, "prompted", "method={name: prompt_tuning, length: 2}", "train.max_steps=1")[0] == 0
    assert worlds.tune(here, "none", f"distill={{teacher: {world / 'prompted'}}}")[0] == 2
    assert "name a teacher without any" in capsys.readouterr().err
