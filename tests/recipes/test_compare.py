"""`tunejax compare` on a tiny model: the table of real runs, going on, the page, and mistakes."""

import csv
import json
import re
import statistics

import pytest
import worlds
import yaml

from tunejax import cli, plots
from tunejax.config import compare as config
from tunejax.config import load
from tunejax.core import errors
from tunejax.recipes import compare, folder, latency, page, standings, train

OWN = """
from tunejax.core import method

def norms(start: float = 1.0):
    def init(key, params):
        from tunejax.core import holes, paths
        return holes.moved("norms", paths.select(params, "norm/scale").leaves)
    return method.method("norms", init, method.fill, targets=("norm/scale",))
"""


def make(folder, **more):
    """A comparison of two methods, one of them in a file of the user's own; returns its config's path."""
    raw = yaml.safe_load(worlds.make(folder).read_text())
    del raw["method"]
    (folder / "own.py").write_text(OWN)
    raw["output_dir"] = str(folder / "out")
    raw["train"] |= {"eval_steps": 2, "save_steps": 4}
    raw["evaluation"] = {"exact_match": False}
    raw["generation"] = {"num_samples": 0}
    # More rows than a batch has, or seeds would make no difference.
    worlds.jsonl(folder / "train.jsonl", worlds.ROWS + [{"prompt": "one ?", "completion": " two ."}] * 8)
    raw["compare"] = {
        "methods": {
            "small": {"name": "lora", "rank": 1, "targets": "attention/q/kernel"},
            "mine": {"method": {"name": f"{folder / 'own.py'}:norms"}, "train": {"learning_rate": 0.1}},
        },
        "seeds": [0, 1],
        "metric": "eval_loss",
        "target": 100.0,
        **more,
    }
    path = folder / "cmp.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def test_a_student_has_the_teacher_of_its_seed(tmp_path):
    path = make(tmp_path)
    raw = yaml.safe_load(path.read_text())
    raw["compare"]["methods"] = {
        "full": {"name": "full"},
        "taught": {"method": {"name": "full"}, "distill": {"teacher": "out/runs/full/seed_{seed}", "alpha": 0.2}},
    }
    path.write_text(yaml.safe_dump(raw))
    runs = config.load_comparison(path).runs
    assert [r.config.distill and r.config.distill.teacher for r in runs] == [
        None, None, "out/runs/full/seed_0", "out/runs/full/seed_1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A comparison that was stopped in its third run and has gone on; seen: the runs that were asked for."""
    folder = tmp_path_factory.mktemp("world")
    path = make(folder)
    real, seen = train.run, []

    def stopped(run_config):
        seen.append(run_config.output_dir)
        return {"stopped": "SIGTERM", "step": 1} if len(seen) == 3 else real(run_config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(train, "run", stopped)
        assert cli.main(["compare", str(path)]) == 0
        assert "2 of 2 runs not made yet" in (folder / "out" / "table.md").read_text()
        assert cli.main(["compare", str(path)]) == 0
        patch.setattr(train, "run", real)
        yield folder, [s.removeprefix(str(folder / "out")) for s in seen]


def test_finished_runs_are_kept_and_the_others_made(world):
    mine, small = ([f"/runs/{label}/seed_{n}" for n in (0, 1)] for label in ("mine", "small"))
    assert world[1] == [*small, mine[0], *mine]


def test_the_table_says_what_the_runs_came_to(world):
    out = world[0] / "out"
    summaries = {
        label: [json.loads((out / "runs" / label / f"seed_{n}" / "summary.json").read_text()) for n in (0, 1)]
        for label in ("small", "mine")
    }
    with (out / "table.csv").open() as file:
        rows = {r["method"]: r for r in csv.DictReader(file)}
    assert list(rows) == ["small", "mine"]
    for label, found in summaries.items():
        row, losses = rows[label], [s["eval_loss"] for s in found]
        assert losses[0] != losses[1]
        assert float(row["quality_mean"]) == pytest.approx(statistics.fmean(losses))
        assert float(row["quality_std"]) == pytest.approx(statistics.stdev(losses))
        assert (float(row["quality_min"]), float(row["quality_max"])) == (min(losses), max(losses))
        assert float(row["tokens_per_second"]) == pytest.approx(statistics.fmean(s["tokens_per_second"] for s in found))
        assert float(row["step_memory_bytes"]) == found[0]["step_memory_bytes"] > 4 * found[0]["all_parameters"]
        assert float(row["seconds_to_target"]) == 0.0
    # LoRA of rank 1 on the queries of two layers; the two norms of each layer and the last one.
    counts = {"small": 2 * (16 + 16), "mine": (2 * 2 + 1) * 16}
    assert {k: float(r["trained_parameters"]) for k, r in rows.items()} == counts
    for label, count in counts.items():
        # Two moments and the two counters of AdamW and its schedule.
        assert float(rows[label]["optimizer_bytes"]) == 2 * 4 * count + 2 * 4
    text = (out / "table.md").read_text()
    assert re.search(r"\| method \| eval_loss \| trained \| share .*\| time to 100 \| note \|", text)
    assert f"| mine | {float(rows['mine']['quality_mean']):.4f} ± " in text
    results = json.loads((out / "results.json").read_text())
    assert [r["quality"] for r in results["runs"]] == [s["eval_loss"] for v in summaries.values() for s in v]


def test_each_run_keeps_its_own_config(world):
    run = yaml.safe_load((world[0] / "out" / "runs" / "mine" / "seed_1" / "config.yaml").read_text())
    assert (run["seed"], run["train"]["learning_rate"], run["train"]["max_steps"]) == (1, 0.1, 4)


def test_the_page_stands_alone(world):
    text = (world[0] / "out" / "index.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", text)
    assert len(sources) == len(list((world[0] / "out" / "plots").glob("*.png"))) == 4
    assert all(s.startswith("data:image/png;base64,iVBOR") for s in sources)
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(", re.sub(r'src="[^"]*"', "", text))
    assert text.count("<tr>") == 3
    assert 'data-value="64.0"' in text
    assert "prefers-color-scheme: dark" in text


def test_a_page_shows_names_as_they_are(tmp_path):
    text = page.page("<b>", ["a & b"], [[("<script>", '"')]], ["x < y"], [])
    assert "<title>&lt;b&gt;</title>" in text
    assert '<td data-value="&quot;">&lt;script&gt;</td>' in text
    assert "x &lt; y" in text


def test_a_changed_config_is_refused_and_nothing_is_lost(world, capsys):
    before = (world[0] / "out" / "results.json").read_bytes()
    assert cli.main(["compare", str(world[0] / "cmp.yaml"), "compare.methods.mine.train.learning_rate=0.2"]) == 2
    said = capsys.readouterr().err
    assert "compare.methods.mine: " in said
    assert "train.learning_rate: 0.1 there, 0.2 now" in said
    assert f"remove {world[0] / 'out' / 'runs' / 'mine' / 'seed_0'} to make this run anew" in said
    assert (world[0] / "out" / "results.json").read_bytes() == before


def test_a_failed_method_stands_in_the_table(world, tmp_path, capsys):
    out = tmp_path / "out"
    expected = {"eval_loss": [0.0, 0.1]}
    easy = {"method": {"name": "lora", "rank": 1, "targets": "attention/q/kernel"}, "expected": expected}
    rates = {"learning_rate": 1e38, "max_grad_norm": None, "max_nonfinite_steps": 1, "logging_steps": 1}
    wild = {"method": {"name": "lora", "rank": 1, "targets": "attention/q/kernel"}, "train": rates}
    changes = [f"compare.methods.{k}={json.dumps(v)}" for k, v in (("wild", wild), ("small", easy))]
    only = ["compare.seeds=[0]", "--only", "wild,small"]
    command = ["compare", str(world[0] / "cmp.yaml"), f"output_dir={out}", *changes, *only]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "wild, seed 0: stopped at step" in said
    assert re.search(r"small, seed 0: eval_loss is \S+; the config expects 0 to 0.1", said)
    rows = {r["method"]: r for r in json.loads((out / "results.json").read_text())["methods"]}
    assert (rows["wild"]["failed"], rows["wild"]["quality_mean"]) == (1, None)
    assert "seed 0 failed: stopped at step" in rows["wild"]["note"]
    assert rows["small"]["finished"] == 1
    assert rows["mine"]["note"] == "1 of 1 runs not made yet"
    assert cli.main(command) == 1
    assert "remove " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["compare.metric=eval_acuracy"],
            "compare.metric: 'eval_acuracy' is not measured. Did you mean 'eval_accuracy'",
        ),
        (["compare.metric=exact_match"], "compare.metric: 'eval_exact_match' is not measured"),
        (["compare.metric=null"], "compare.metric: input should be a valid string"),
        (["compare.methods.x=lorra"], "compare.methods.x: method: 'lorra' is not known. Did you mean 'lora'"),
        (["compare.methods.x={name: lora, rnk: 1}"], "compare.methods.x: method 'lora':\n  rnk: unknown"),
        (["compare.methods.x={name: lora, targets: attn}"], "compare.methods.x: "),
        (["compare.methods.x={method: full, trian: {}}"], "compare.methods.x.trian: unknown key. Did you mean 'train'"),
        (["compare.methods.x={method: full, train: {lr: 1}}"], "train.lr: unknown key. It is train.learning_rate here"),
        (["compare.methods.x=7"], "a method is a mapping with a name"),
        (["compare.methods.Mine=full"], "two methods are labelled 'mine'"),
        (["compare.methods=[full, bitfit, full]"], "two methods are labelled 'full'"),
        (["compare.methods={}"], "at least 1 item"),
        (["compare.methods={../x: full}"], "label '../x'"),
        (["compare.methods={8: lora}"], "label 8 is no text to YAML: put it in quotes, as '8'"),
        (["compare.seeds=[1, 1]"], "seeds are different numbers"),
        (["compare.sed=1"], "unknown key. Did you mean 'seeds'"),
        (["seed=1"], "seed: the seeds of a comparison stand in compare.seeds"),
        (["method=full"], "method: the methods of a comparison stand in compare.methods"),
        (["many=[{seed: 1}]"], "many: a comparison's runs are one each"),
        (["data.eval_path=null", "train.eval_steps=null"], "set data.eval_path"),
        (["--only", "smal"], "Did you mean 'small'"),
    ],
)
def test_mistakes_are_one_message_before_anything_is_written(world, tmp_path, changes, said, capsys):
    out = tmp_path / "out"
    assert cli.main(["compare", str(world[0] / "cmp.yaml"), f"output_dir={out}", *changes]) == 2
    found = capsys.readouterr().err
    assert found.count("tunejax: ") == 1
    assert said in found
    assert not out.exists()


def test_bad_rows_are_no_methods_failure(world, tmp_path, capsys):
    data = worlds.jsonl(tmp_path / "rows.jsonl", [*worlds.ROWS, {"prompt": "red ?", "completion": ""}])
    command = ["compare", str(world[0] / "cmp.yaml"), f"output_dir={tmp_path / 'out'}", f"data.path={data}"]
    assert cli.main(command) == 2
    assert "rows.jsonl:9: empty 'completion'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_configs_of_runs_and_comparisons_are_told_apart(world, tmp_path, capsys):
    assert cli.main(["compare", str(world[0] / "my.yaml")]) == 2
    assert "has no section 'compare'" in capsys.readouterr().err
    assert cli.main(["train", str(world[0] / "cmp.yaml")]) == 2
    assert "is a config of tunejax compare" in capsys.readouterr().err
    (tmp_path / "empty.yaml").write_text("output_dir: x\ncompare:\n")
    assert cli.main(["compare", str(tmp_path / "empty.yaml")]) == 2
    assert "\n  compare: input should be" in capsys.readouterr().err
    (tmp_path / "empty.yaml").unlink()
    (tmp_path / "file").write_text("mine")
    assert cli.main(["compare", str(world[0] / "cmp.yaml"), f"output_dir={tmp_path}"]) == 2
    assert "not of a comparison" in capsys.readouterr().err


def test_an_entry_changes_its_runs_and_an_override_all(world):
    found = config.load_comparison(world[0] / "cmp.yaml", ["train.max_steps=2", "compare.seeds=[5]"])
    assert [(r.label, r.seed, r.config.train.max_steps) for r in found.runs] == [("small", 5, 2), ("mine", 5, 2)]
    rates = {r.label: r.config.train.learning_rate for r in found.runs}
    assert rates == {"small": 2e-4, "mine": 0.1}
    assert found.section.metric == "eval_loss"
    assert not found.section.higher_wins


def section(**more):
    return config.CompareSection(methods={"a": "full"}, metric="accuracy", **more)


def test_time_to_the_target_is_that_of_the_first_evaluation_that_reached_it():
    rows = [{"train_seconds": 1.0, "loss": 2.0}, {"train_seconds": 1.5, "eval_accuracy": 0.6},
            {"train_seconds": 2.5, "eval_accuracy": 0.8}, {"train_seconds": 3.0, "eval_accuracy": 0.7}]  # fmt: skip
    summary = {"before_accuracy": 0.5, "eval_accuracy": 0.75, "train_seconds": 4.0}
    want = {0.4: 0.0, 0.6: 1.5, 0.7: 2.5, 0.9: None}
    assert {t: standings.to_target(summary, rows, section(target=t)) for t in want} == want
    assert standings.to_target(summary, [], section(target=0.75)) == 4.0
    assert standings.to_target(summary, rows, section()) is None
    loss = config.CompareSection(methods={"a": "full"}, metric="loss", target=1.0)
    assert standings.to_target({"eval_loss": 0.9, "train_seconds": 4.0}, [], loss) == 4.0
    perplexity = config.CompareSection(methods={"a": "full"}, metric="perplexity", target=2.8)
    lost = [{"train_seconds": 1.0, "eval_loss": 1.1}, {"train_seconds": 2.0, "eval_loss": 1.0}]
    assert standings.to_target({"eval_perplexity": 2.7, "train_seconds": 4.0}, lost, perplexity) == 2.0


def test_what_some_seeds_reached_is_told_as_such():
    made = [standings.Outcome("a", n, "finished", "", q, t, {}) for n, q, t in ((0, 0.9, 2.0), (1, 0.7, None))]
    row = standings.summed("a", [*made, standings.Outcome("a", 2, "missing")], section(target=0.8))
    heads, cells = standings.Standings("x", section(target=0.8), made, [row]).cells()
    shown = {h: text for h, (text, _) in zip(heads, cells[0], strict=True)}
    assert shown["eval_accuracy"] == "0.8000 ± 0.1414"
    assert shown["time to 0.8"] == "2.0 s (1 of 2)"
    assert shown["trained"] == "-"
    assert shown["note"] == "1 of 3 runs not made yet"


def test_other_held_out_rows_are_told():
    made = [standings.Outcome(k, 0, "finished", held_out=n) for k, n in (("a", 4), ("b", 4), ("c", 3))]
    notes = standings.Standings("x", section(), made, []).notes()
    assert "Methods were measured on different held-out rows (a 4, b 4, c 3): do not compare their quality." in notes
    assert len(standings.Standings("x", section(), made[:2], []).notes()) == len(notes) - 1


def test_answers_that_were_drawn_in_other_ways_are_told():
    raw = {"output_dir": "x", "data": {"path": "x.jsonl"}, "method": "full"}
    ways = [{}, {"generation": {"temperature": 0.5}}, {"evaluation": {"max_rows": 50}}, {"train": {"max_steps": 3}}]
    asked = [standings.how_asked(load.check(raw | way)) for way in ways]
    assert asked[0] == asked[3] == "200 rows at most, max_new_tokens 64, temperature 0"
    made = [standings.Outcome("a", n, "finished", asked=text) for n, text in enumerate(asked)]
    notes = standings.Standings("x", section(), made, []).notes()
    [told] = [n for n in notes if "do not compare their quality" in n]
    assert "(200 rows at most, max_new_tokens 64, temperature 0: a, seed 0, a, seed 3; " in told
    assert "; 50 rows at most, max_new_tokens 64, temperature 0: a, seed 2)" in told
    assert len(standings.Standings("x", section(), [made[0], made[3]], []).notes()) == len(notes) - 1


def test_a_metric_that_is_no_number_is_a_failure(tmp_path):
    run = config.Run("a", 0, load.check({"output_dir": str(tmp_path), "data": {"path": "x"}, "method": "full"}))
    folder.write_json(tmp_path / "summary.json", {"eval_accuracy": float("nan"), "train_seconds": 1.0})
    assert '"eval_accuracy": null' in (tmp_path / "summary.json").read_text()
    folder.write_rows(tmp_path / "metrics.jsonl", [])
    found = standings.outcome(run, section(target=0.5))
    assert (found.status, found.reason, found.seconds_to_target) == ("failed", "eval_accuracy is nan", None)


def test_a_run_keeps_how_its_answers_were_drawn(tmp_path):
    raw = {"output_dir": str(tmp_path), "data": {"path": "x"}, "method": "full"}
    before, now = (load.check(raw | {"evaluation": {"max_rows": n}}) for n in (50, 200))
    folder.begin(before)
    folder.write_json(tmp_path / "summary.json", {"eval_exact_match": 0.5, "eval_accuracy": 0.5})
    folder.write_rows(tmp_path / "metrics.jsonl", [])
    for metric, asked in (("exact_match", "50 rows at most, max_new_tokens 64, temperature 0"), ("accuracy", "")):
        judged = config.CompareSection(methods={"a": "full"}, metric=metric)
        assert standings.outcome(config.Run("a", 0, now), judged).asked == asked


def test_a_budget_of_latency_is_measured_once_for_all_seeds(tmp_path, monkeypatch):
    """What one seed's run was begun with holds for the others."""
    budget = [{"name": "full"}, {"name": "shrink", "latency": 0.5, "keep": ["mlp"]}]
    comparison = config.load_comparison(make(tmp_path, methods={"small": budget, "full": "full"}))
    seen = []

    def measured(_, spec):
        seen.append(spec)
        return {**spec, "keep": {"mlp": 0.4}}

    monkeypatch.setattr(latency, "_measured", measured)
    runs = compare.resolved(comparison).runs
    assert [r.config.method[1]["keep"] for r in runs[:2]] == [{"mlp": 0.4}] * 2
    assert [r.config.method for r in runs[2:]] == [{"name": "full"}] * 2
    assert len(seen) == 1
    other = [budget[0], {**budget[1], "keep": {"mlp": 0.3}}]
    folder.begin(runs[1].config.model_copy(update={"method": other}))
    assert [r.config.method[1]["keep"] for r in compare.resolved(comparison).runs[:2]] == [{"mlp": 0.3}] * 2
    assert len(seen) == 1


def test_a_long_warm_up_is_no_mistake(world):
    changes = ["train.max_steps=20000", "train.warmup_steps=2000", f"output_dir={world[0] / 'long'}"]
    run = config.load_comparison(world[0] / "cmp.yaml", changes).runs[0]
    compare.check_method(run.config, "eval_loss")


def test_weights_say_how_many_classes_there_are_before_the_rows_do(world, tmp_path):
    changes = [*worlds.classified(tmp_path), "objective.class_weights=[1, 2, 3]", f"output_dir={tmp_path / 'out'}"]
    run = config.load_comparison(world[0] / "cmp.yaml", changes).runs[0]
    compare.check_method(run.config, "eval_accuracy")


def test_units():
    assert [standings.size(x) for x in (12, 1536, 3 * 2**20, 5000 * 2**30)] == [
        "12 B",
        "1.5 KiB",
        "3.0 MiB",
        "5,000.0 GiB",
    ]
    assert [standings.duration(x) for x in (1.26, 90, 5400)] == ["1.3 s", "1.5 min", "1.5 h"]


def test_the_front_is_what_nothing_beats(tmp_path):
    points = [plots.Point(*p) for p in (("a", 10, 0.9), ("b", 1, 0.5), ("c", 5, 0.4), ("d", 5, 0.8), ("e", 20, 0.9))]
    assert [p.label for p in plots.unbeaten(points)] == ["b", "d", "a"]
    assert [p.label for p in plots.unbeaten(points, higher_wins=False)] == ["b", "c"]
    drawn = plots.pareto(points, tmp_path / "a" / "p.png", xlabel="cost", ylabel="quality")
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert plots.pareto([], tmp_path / "none.png", xlabel="", ylabel="") is None


def test_an_unmeasured_metric_of_old_runs_is_told(world):
    found = config.load_comparison(world[0] / "cmp.yaml", ["compare.metric=eval_rouge"])
    with pytest.raises(errors.ConfigError, match="has no 'eval_rouge'"):
        standings.collect(found)
    assert compare.finished(found.runs[0])
