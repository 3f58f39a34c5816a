"""`tunejax generate --adapters`: each prompt is answered as its run alone would answer it."""

import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.core import errors
from tunejax.core.model import full_batch
from tunejax.recipes import merge, mixed

RUNS = {
    "q": {"name": "lora", "rank": 2, "targets": "attention/q/kernel"},
    "mlp": {"name": "pissa", "rank": 3, "alpha": 6.0, "targets": "mlp/*/kernel"},
    "v": {"name": "lora_fa", "rank": 4, "targets": "attention/{q,v}/kernel"},
    "adapter": {"name": "pfeiffer", "width": 2},
    "another": {"name": "pfeiffer", "width": 2},
}
PROMPTS = ["what is red cat ?", "the dog", "what is blue one ?", "a big"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of short runs on one base, by name."""
    home = tmp_path_factory.mktemp("runs")
    path = worlds.make(home)
    raw = yaml.safe_load(path.read_text())
    del raw["data"]["eval_path"]
    raw["train"] |= {"max_steps": 3, "learning_rate": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEJAX_CACHE", str(home / "cache"))
        for seed, (name, method) in enumerate(RUNS.items()):
            raw |= {"output_dir": str(home / name), "method": method, "seed": seed}
            path.write_text(yaml.safe_dump(raw))
            assert cli.main(["train", str(path)]) == 0
    return home


def said(capsys, *args):
    capsys.readouterr()
    assert cli.main(["generate", *args, "--max-new-tokens", "4"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("names", [["q", "mlp", "v"], ["adapter", "another"]])
def test_logits_and_text_of_a_mixed_batch(runs, names, capsys):
    folders = [str(runs / n) for n in names]
    opened = merge.opened(folders)
    kernels = [r.loaded.params["layers"]["0"]["attention"]["q"]["kernel"] for r in opened]
    assert all(k is kernels[0] for k in kernels)  # the base is held once
    ids = [i % len(names) for i in (1, 0, 2, 1)]
    served = mixed.serve(opened)
    batch = full_batch(jnp.asarray(np.random.default_rng(0).integers(4, 20, (4, 9)), jnp.int32))
    found = logits(served.model, served.chosen(ids), batch)
    each = [logits(r.parts.model, r.params, batch) for r in opened]
    assert np.abs(each[0] - each[1]).max() > 1e-2
    for row, i in enumerate(ids):
        np.testing.assert_allclose(found[row], each[i][row], atol=1e-5)
    prompts = [x for p in PROMPTS for x in ("--prompt", p)]
    text = said(capsys, "--adapters", *folders, "--adapter-ids", *map(str, ids), *prompts)
    alone = [said(capsys, folders[i], "--prompt", p) for i, p in zip(ids, PROMPTS, strict=True)]
    shown = [f"> [{folders[i]}] {p}\n{t}" for i, p, t in zip(ids, PROMPTS, alone, strict=True)]
    assert [" ".join(x.split()) for x in text.split("> ")] == [" ".join(x.split()) for x in "".join(shown).split("> ")]


def test_a_frozen_head_must_be_that_of_all_rows(runs, tmp_path):
    for seed, rank, name in ((0, 2, "a"), (1, 2, "b"), (1, 3, "c"), (0, 3, "d")):
        method = f"method={{name: lora, rank: {rank}, targets: attention/q/kernel}}"
        options = [*worlds.classified(tmp_path), method, f"seed={seed}", f"output_dir={tmp_path / name}"]
        assert cli.main(["train", str(runs / "my.yaml"), *options]) == 0
    for pair in ("ab", "ac"):
        with pytest.raises(errors.ConfigError, match=r"heads of their own \(head/kernel, of other seeds\)"):
            mixed.serve(merge.opened([str(tmp_path / name) for name in pair]))
    opened = merge.opened([str(tmp_path / name) for name in "ad"])
    served, batch = mixed.serve(opened), full_batch(jnp.full((2, 5), 6, jnp.int32))
    found = logits(served.model, served.chosen([0, 1]), batch)
    for i, r in enumerate(opened):
        np.testing.assert_allclose(found[i], logits(r.parts.model, r.params, batch)[i], atol=1e-5)


def logits(model, params, batch):
    run = jax.jit(lambda p: model.logits(model.head(p), model.hidden(p, batch)[0]))
    return np.asarray(run(params))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--adapters", "q", "mlp", "--prompt", "a"], "1 prompts and 2 adapters"),
        (
            ["--adapters", "q", "adapter", "--adapter-ids", "1", "--prompt", "a"],
            "what else differs needs",
        ),
        (["--adapters", "q", "mlp", "--adapter-ids", "2", "--prompt", "a"], "no adapter 2"),
        (["--prompt", "a"], "generate needs a model folder"),
    ],
)
def test_mistakes_are_told(runs, args, message, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert cli.main(["generate", *args]) == 2
    assert message in capsys.readouterr().err


def test_runs_that_want_to_be_run_in_other_ways_share_no_batch(runs, tmp_path, capsys):
    """A number that a flag could have given is asked for."""
    other = str(tmp_path / "other")
    shutil.copytree(runs / "another", other)
    config = yaml.safe_load((tmp_path / "other/config.yaml").read_text())
    config["generation"]["max_new_tokens"] = 2
    (tmp_path / "other/config.yaml").write_text(yaml.safe_dump(config))
    command = ["generate", "--adapters", str(runs / "adapter"), other, "--prompt", "the", "--prompt", "a"]
    assert cli.main(command) == 2
    assert "differ in generation.max_new_tokens (4, 2), of which a batch has one: give --max-new-tokens" in (
        capsys.readouterr().err
    )
    assert cli.main([*command, "--max-new-tokens", "2"]) == 0
    config["model"]["dtype"] = "bfloat16"
    (tmp_path / "other/config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main([*command, "--max-new-tokens", "2"]) == 2
    assert "differ in model.dtype (float32, bfloat16), of which a batch has one: serve them apart" in (
        capsys.readouterr().err
    )
