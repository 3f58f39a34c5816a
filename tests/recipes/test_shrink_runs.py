"""Shrinking by whole commands: a run that masks, resumed to the same bytes, cut, and loaded by transformers."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors import numpy as safetensors

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.config import load
from tunejax.core import errors
from tunejax.core.model import full_batch
from tunejax.models import build, cost, cut
from tunejax.recipes import artefact, evaluate, folder, latency, shrink
from tunejax.recipes import search as search_lib
from tunejax.train import loop

SPEC = "method=[{name: full}, {name: shrink, keep: {heads: 0.5, mlp: 0.5, depth: 0.5}, steps: 3, every: 1}]"
QUICK = ["train.max_steps=6", "train.save_steps=100", "generation.num_samples=0", "evaluation.exact_match=false"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a finished run."""
    folder = tmp_path_factory.mktemp("world")
    assert cli.main(["train", str(worlds.make(folder)), SPEC, *QUICK]) == 0
    return folder


def loss_of(model):
    """Mean loss a token of the completions of the held-out rows, by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.config.name_or_path)
    total = count = 0
    for row in worlds.ROWS[:4]:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        rest = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + rest])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(scores, torch.tensor(rest), reduction="sum").item()
        count += len(rest)
    return total / count


def test_the_cut_model_is_what_the_run_says(world, tmp_path, capsys):
    out = tmp_path / "small"
    assert cli.main(["shrink", str(world / "run"), str(out), "--batch", "2", "--length", "8"]) == 0
    said = capsys.readouterr().out
    assert "warning" not in said
    tuned = artefact.open_run(str(world / "run"))
    tokens = np.random.default_rng(0).integers(0, 20, (2, 8)).astype(np.int32)
    model, params = tuned.parts.model, tuned.params
    expected = model.logits(model.head(params), model.hidden(params, full_batch(tokens))[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        found = theirs(torch.tensor(tokens, dtype=torch.long)).logits
    np.testing.assert_allclose(found, expected, atol=1e-4)
    c = theirs.config
    assert (c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.intermediate_size) == (1, 1, 1, 12)
    numbers = json.loads((out / "shrink.json").read_text())
    assert numbers["after"]["parameters"] == sum(p.numel() for p in theirs.parameters())
    assert numbers["difference"] < 1e-5
    assert numbers["kept"] == {"heads": "1 of 2", "mlp": "12 of 24", "depth": "1 of 2"}
    # The scores: of the files by transformers, of the masked run as its summary has them, of the base before it.
    quality, summary = numbers["quality"], json.loads((world / "run" / "summary.json").read_text())
    assert (quality["rows"], quality["of"]) == (4, f"{world / 'model'}, untuned")
    np.testing.assert_allclose(quality["cut"]["loss"], loss_of(theirs), rtol=1e-5)
    np.testing.assert_allclose(quality["masked"]["loss"], summary["eval_loss"], rtol=1e-5)
    np.testing.assert_allclose(quality["whole"]["loss"], summary["before_loss"], rtol=1e-5)
    assert f"{100 * quality['cut']['loss'] / quality['whole']['loss']:.1f}%" in said
    assert (out / "shrink.png").stat().st_size > 1000
    again = ["shrink", str(world / "run"), str(out), "--batch", "2", "--length"]
    assert cli.main([*again, "8"]) == 0
    assert capsys.readouterr().out.replace(f"{out} is finished; this is what it says\n", "") == said
    assert cli.main([*again, "9"]) == 2
    assert "was left by another command (length: 8 there, 9 now)" in capsys.readouterr().err
    for name in ("parameters", "flops_per_token", "latency_ms"):
        assert numbers["before"][name] > 0
        assert name in said
    assert (
        transformers.AutoTokenizer.from_pretrained(out)("cat")["input_ids"] == tuned.parts.tokenizer("cat")["input_ids"]
    )
    assert cli.main(["generate", str(out), "--raw", "--prompt", "what is", "--max-new-tokens", "2"]) == 0


def test_flops_are_those_of_the_products():
    config = artefact.hf.read_config(artefact.locate.model("embedded"))
    c, length = config, 10
    layer = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) + 3 * c.embed_dim * c.mlp_dim
    products = c.num_layers * (layer + 2 * length * c.num_heads * c.head_dim) + c.vocab_size * c.embed_dim
    assert cost.forward_flops(config, "lm", length) == 2 * products
    assert cost.forward_flops(config, "lm", 1) < 2 * cost.parameters(config, "lm")


def test_a_run_that_was_stopped_ends_with_the_same_masks(world, monkeypatch):
    """Stopped in the middle of the schedule, and run again."""
    from tunejax.train import step

    real, calls = step.Step.__call__, []

    def three(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    again = ["train", str(world / "my.yaml"), SPEC, *QUICK, f"output_dir={world / 'again'}", "train.save_steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr(step.Step, "__call__", three)
        assert cli.main(again) == 130
    assert cli.main(again) == 0
    one, two = (safetensors.load_file(world / n / "adapter" / "adapter.safetensors") for n in ("run", "again"))
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes(), name


def test_sizes_of_one_run_while_it_is_taught(world, tmp_path):
    out, model = world / "super", world / "model"
    changes = ["method=[full, {name: supernet, keep: {mlp: 0.5, hidden: 0.5}, sizes: 3}]", f"output_dir={out}",
               f"distill={{teacher: {model}, alpha: 0.5}}"]  # fmt: skip
    assert cli.main(["train", str(world / "my.yaml"), *changes, *QUICK]) == 0
    for size, (mlp, hidden) in enumerate(((24, 16), (18, 12), (12, 8))):
        small = tmp_path / str(size)
        assert cli.main(["shrink", str(out), str(small), f"method.1.size={size}", "data.eval_path=null"]) == 0
        c = transformers.AutoModelForCausalLM.from_pretrained(small).config
        assert (c.intermediate_size, c.hidden_size) == (mlp, hidden)


def test_one_command_trains_the_teacher_and_the_student_and_cuts(world, tmp_path, capsys, monkeypatch):
    """Stopped while the student trains, and started again; then it is finished."""
    teacher = yaml.safe_load((world / "my.yaml").read_text())
    teacher |= {"output_dir": str(tmp_path / "whole"), "method": "full"}
    teacher["train"] |= {"learning_rate": 0.01, "max_steps": 2, "save_steps": 100}
    teacher |= {"generation": {"num_samples": 0}, "evaluation": {"exact_match": False}}
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(teacher))
    shrink = "method=[full, {name: shrink, keep: {mlp: 0.5}, steps: 2, every: 1}]"
    command = ["shrink", str(world / "my.yaml"), str(tmp_path / "half"), shrink, f"output_dir={tmp_path / 'run'}",
               f"distill={{teacher: {tmp_path / 'whole.yaml'}, alpha: 0.5}}", *QUICK, "train.max_steps=3"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", stopping(loop.fit, at=2))
        assert cli.main(command) == 0
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert not (tmp_path / "half").exists()
    assert cli.main(command) == 0
    numbers = json.loads((tmp_path / "half" / "shrink.json").read_text())
    whole, run = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "run"))
    assert numbers["quality"]["of"] == f"{tmp_path / 'whole'}, the teacher"
    np.testing.assert_allclose(numbers["quality"]["whole"]["loss"], whole["eval_loss"], rtol=1e-5)
    np.testing.assert_allclose(numbers["quality"]["cut"]["loss"], run["eval_loss"], rtol=1e-5)
    assert any("soft" in row for row in folder.read_rows(tmp_path / "run" / "metrics.jsonl"))
    capsys.readouterr()
    assert cli.main(command) == 0
    assert f"{tmp_path / 'half'} is finished" in capsys.readouterr().out


def stopping(fit, at):
    """`loop.fit` whose second call, the student's, gets a SIGTERM at a batch."""
    calls = []

    def wrapped(one, begun, base, loader, options, **rest):
        calls.append(1)
        if len(calls) == 2:
            loader = Stopping(loader, at)
        return fit(one, begun, base, loader, options, **rest)

    return wrapped


class Stopping:
    """A loader that stops its process."""

    def __init__(self, loader, at):
        self.loader, self.left = loader, at

    def __iter__(self):
        return self

    def __next__(self):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)


def test_the_best_mixture_for_a_budget(world, tmp_path, capsys, monkeypatch):
    """Where all are tried, it is the one with the least loss by brute force; what was tried is not tried again."""
    out = world / "mixtures"
    changes = ["method=[full, {name: supernet, keep: {heads: 0.5, mlp: 0.25}, sizes: 3, mixed: true}]",
               f"output_dir={out}", "train.gradient_accumulation_steps=3", "train.train_batch_size=24"]  # fmt: skip
    assert cli.main(["train", str(world / "my.yaml"), *changes, *QUICK, "train.max_steps=2"]) == 0
    search = ["shrink", str(out), str(tmp_path / "best"), "--parameters"]
    assert cli.main([*search, "0.1"]) == 2
    assert "the smallest mixture leaves 0." in capsys.readouterr().err
    assert cli.main([*search, "0.9"]) == 0
    said = capsys.readouterr().out
    tried = folder.read_rows(out / "search.jsonl")
    assert len(tried) == len({json.dumps(r["kept"]) for r in tried}) == 6
    whole = artefact.open_run(str(out)).parts.model_config
    total, losses = cost.parameters(whole, "lm"), {}
    for row in tried:
        if cost.parameters(cut.smaller(whole, row["kept"]), "lm") <= 0.9 * total:
            losses[row["scores"]["loss"]] = row
    best = losses[min(losses)]
    numbers = json.loads((tmp_path / "best" / "shrink.json").read_text())
    assert numbers["search"]["sizes"] == best["sizes"]
    assert numbers["after"]["parameters"] == cost.parameters(cut.smaller(whole, best["kept"]), "lm")
    # What the search saw is what the method gives at that size, and what the cut model scores.
    sized = artefact.open_run(str(out), [f"method.1.size={json.dumps(best['sizes'])}"])
    scores = evaluate.scores(sized.parts, sized.base, sized.train, sized.state)
    np.testing.assert_allclose([scores["loss"], numbers["quality"]["cut"]["loss"]], best["scores"]["loss"], rtol=1e-5)
    largest = next(r["scores"] for r in tried if r["kept"] == {"heads": 2, "mlp": 24})
    np.testing.assert_allclose(numbers["quality"]["whole"]["loss"], largest["loss"], rtol=1e-5)
    front = numbers["search"]["front"]
    assert all(a["left"] < b["left"] and a["quality"] > b["quality"] for a, b in itertools.pairwise(front))
    assert said.count("<- chosen") == 1
    assert (tmp_path / "best" / "pareto.png").stat().st_size > 1000

    def no(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(search_lib, "judge", lambda *args: no)
    tuned = artefact.open_run(str(out))
    again = search_lib.run(tuned, str(out), search_lib.Asked("parameters", 0.9))[1]
    assert again["sizes"] == best["sizes"]


def test_the_search_by_evolution():
    """On a made-up quality it finds the best mixture, or nearly, with a fraction of the evaluations."""
    shape = artefact.hf.read_config(artefact.locate.model("embedded"))
    shapes = jax.eval_shape(build.build(shape, head="lm").init, jax.random.key(0))
    sizes = cut.sizes(shape)
    counts = {k: [round(sizes[k] * (1 - i / 16)) for i in range(9)] for k in ("mlp", "hidden", "depth")}
    asked = search_lib.Asked("flops", 0.6, evaluations=40, seed=1)
    space = search_lib.Space(counts, shapes, shape, "lm", asked)

    def loss(by_size, kept):
        return sum((1 - kept[k] / sizes[k]) ** 2 * w for k, w in (("mlp", 1.0), ("hidden", 4.0), ("depth", 2.0)))

    found = search_lib.search(space, loss, asked)
    assert len(found) == 40
    within = sorted(loss({}, space.kept(c)) for c, left in space.left.items() if left <= 0.6)
    best = search_lib.chosen(space, found, asked)
    assert space.left[best] <= 0.6
    assert len(within) > 200
    assert found[best] <= within[5]
    assert list(search_lib.search(space, loss, asked)) == list(found)


def test_what_is_to_be_fast(world, monkeypatch, capsys):
    """Of a model whose latency is 1 and 9 times its part of the MLP; measured once for a run."""
    calls = []

    def timed(configs, head, dtype, length):
        calls.append([c.mlp_dim for c in configs])
        return [1.0 + 9 * c.mlp_dim / 24 for c in configs]

    monkeypatch.setattr(latency, "milliseconds", timed)
    command = ["train", str(world / "my.yaml"), f"output_dir={world / 'fast'}", *QUICK, "train.max_steps=1",
               "method=[full, {name: shrink, keep: [mlp], latency: 0.7, schedule: one_shot}]"]  # fmt: skip
    assert cli.main(command) == 0
    assert calls == [[24, 18, 12, 6]]
    tuned = artefact.open_run(str(world / "fast"))
    part = 16 / 24  # the largest with (1 + 9 part) / 10 <= 0.7
    assert tuned.parts.config.method[1] == {
        "name": "shrink",
        "keep": {"mlp": part},
        "latency": 0.7,
        "schedule": "one_shot",
    }
    assert int(cut.masks(tuned.params, tuned.parts.model_config)["mlp"][0].sum()) == 16
    assert cli.main(command) == 0
    assert "is finished" in capsys.readouterr().out
    assert len(calls) == 1
    assert cli.main([*command[:-1], command[-1].replace("0.7", "0.05")]) == 2
    assert "with 0.25 of each dimension it is 0.325" in capsys.readouterr().err


def test_a_schedule_of_another_method_may_go_on(world):
    """Only masks that are to be cut must come down."""
    sparse = "{name: lt_sft, mask_steps: 50, targets: /norm/scale}"
    for steps, fits in ((4, True), (5, False)):
        masks = f"{{name: shrink, begin: 2, steps: {steps}, every: 1}}"
        config = load.load(world / "my.yaml", [f"method=[{sparse}, {masks}]", *QUICK])
        if fits:
            shrink.check(config)
            continue
        with pytest.raises(errors.ConfigError, match="6 steps, and shrink ends at update 7: "):
            shrink.check(config)


def test_masks_that_never_come_down(world, tmp_path, capsys):
    """Told before the run, and where an older state is cut; what is told has an end that is out of reach."""
    command = [str(world / "my.yaml"), "method=[full, {name: shrink, begin: 2, steps: 5, every: 1}]", *QUICK]
    new = [f"output_dir={tmp_path / 'new'}", "data.eval_path=null"]
    said = "the run has 6 steps, and shrink ends at update 7"
    assert cli.main(["shrink", command[0], str(tmp_path / "none"), *command[1:], *new]) == 2
    assert said in capsys.readouterr().err
    epochs = ["train.max_steps=null", "train.num_train_epochs=6"]
    assert cli.main(["shrink", command[0], str(tmp_path / "none"), *command[1:], *new, *epochs]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert cli.main(["train", *command, *new]) == 0
    assert f"warning: {said}" in capsys.readouterr().out
    assert cli.main(["shrink", str(tmp_path / "new"), str(tmp_path / "cut"), "--batch", "1", "--length", "4"]) == 0
    kept = json.loads((tmp_path / "cut" / "shrink.json").read_text())["kept"]["mlp"]
    assert f"warning: mlp: {kept} are kept, and the target is 12" in capsys.readouterr().out
    assert kept == "13 of 24"  # 12 + ceil(12 (1 - 4/5)^3)


def test_what_cannot_be_shrunk(world, tmp_path, capsys):
    assert cli.main(["shrink", str(world / "run"), str(world / "model")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    lora = ["method={name: lora, rank: 2}", f"output_dir={world / 'lora'}", *QUICK, "train.max_steps=1"]
    assert cli.main(["train", str(world / "my.yaml"), *lora]) == 0
    assert cli.main(["shrink", str(world / "lora"), str(tmp_path / "none")]) == 2
    assert "masks nothing: its method is lora" in capsys.readouterr().err
    assert cli.main(["shrink", str(world / "my.yaml"), str(tmp_path / "none"), f"output_dir={tmp_path / 'new'}"]) == 2
    assert "masks nothing: its method is lora" in capsys.readouterr().err
    full = "method=[full, {name: supernet, keep: {heads: 0.5}}]"
    for changes, says in (
        (["method=[full, {name: shrink, keep: {hidden: 0.8}}]"], "embed_dim (13) is no multiple"),
        (["method=[{name: houlsby, width: 2}, {name: shrink}]"], "no plain kernel"),
        (["method=[full, {name: shrink}, {name: lora, targets: mlp/down/kernel}]"], "stands above the mask"),
        (["method=[full, {name: shrink}]", "--flops", "0.9"], "offers no sizes to choose from"),
        ([full, "--flops", "0.1"], "the smallest mixture leaves 0."),
        ([full, "--flops", "0.9", "data.eval_path=null"], "no rows to search by"),
    ):
        command = ["shrink", str(world / "my.yaml"), str(tmp_path / "none"), f"output_dir={tmp_path / 'new'}"]
        assert cli.main([*command, *changes]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    assert cli.main(["shrink", str(world / "run"), str(tmp_path / "none"), "--flops", "0.5"]) == 2
    assert "offers no sizes to choose from" in capsys.readouterr().err
    other = tmp_path / "other.yaml"
    other.write_text((world / "my.yaml").read_text().replace(f"{world / 'run'}", "nowhere/run"))
    section = f"distill={{teacher: {other}, cache: {tmp_path / 'cache'}}}"
    assert cli.main(["distill-cache", str(world / "my.yaml"), section, f"output_dir={tmp_path / 'new'}"]) == 2
    assert "the run nowhere/run is not there yet: tunejax train" in capsys.readouterr().err
    itself = tmp_path / "itself.yaml"
    raw = yaml.safe_load((world / "my.yaml").read_text())
    itself.write_text(yaml.safe_dump({**raw, "distill": {"teacher": str(itself)}}))
    assert cli.main(["train", str(itself), f"output_dir={tmp_path / 'new'}"]) == 2
    assert "would teach itself" in capsys.readouterr().err
    assert cli.main(["shrink", str(world / "run"), str(tmp_path / "none"), "--length", "1000"]) == 2
    assert "1 to 64 tokens" in capsys.readouterr().err
    assert cli.main(["export", str(world / "run"), "--output", str(tmp_path / "none")]) == 2
    assert "the run masks layers" in capsys.readouterr().err
    assert cut.head_counts(artefact.open_run(str(world / "run")).parts.model_config, "lm") == (1, 2)
