"""The command itself: it starts at once, and it ends cleanly."""

import subprocess
import sys
import types

import pytest

from tunejax import cli
from tunejax.core import errors

VERBS = (
    "train", "compare", "validate", "preprocess", "evaluate", "generate", "export", "merge", "unmerge", "shrink",
    "methods", "env", "distill-cache", "distill-generate",
)  # fmt: skip


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from tunejax import cli; cli.main(['--help']); "
        "heavy = {'jax', 'numpy', 'yaml', 'pydantic', 'transformers'} & set(sys.modules); sys.exit(len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert "usage: tunejax " + verb in capsys.readouterr().out


def test_env_names_versions_and_devices(capsys):
    assert cli.main(["env"]) == 0
    said = capsys.readouterr().out
    for part in ("python", "jax ", "transformers", "backend", "device"):
        assert part in said


def test_keys_are_listed_without_a_config(capsys):
    assert cli.main(["train", "--keys"]) == 0
    assert "train.learning_rate" in capsys.readouterr().out


def test_overrides_may_stand_after_an_option(monkeypatch):
    seen = fake(monkeypatch, lambda args: 0)
    assert cli.main(["preprocess", "a.yaml", "--rows", "3", "seed=1", "data.packing=true"]) == 0
    assert seen[0].overrides == ["seed=1", "data.packing=true"]
    assert seen[0].rows == 3


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["generate", "embedded", "--seed", "99999999999999999999"], "--seed: '99999999999999999999' is no seed"),
        (["merge", "a", "b", "--output", "c", "--seed", "-1"], "--seed: '-1' is no seed; expected a whole number in"),
        (["generate", "embedded", "--prompt", "x", "--adapter-ids", "0"], "give --adapters RUN RUN"),
        (["shrink", "a", "b", "--metric", "loss"], "--metric is of the search that --parameters or --flops asks for"),
        (["shrink", "a", "b", "--evaluations", "50"], "--evaluations is of the search"),
        (["shrink", "a", "b", "--seed", "0"], "--seed is of the search"),
        (["merge", "a", "b", "--output", "c", "--weights", "nan", "1"], "--weights nan 1: expected finite numbers"),
    ],
)
def test_a_flag_without_effect_or_meaning_is_told(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    assert said in capsys.readouterr().err


def failing(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.DataError("x.jsonl:3: empty"), 2, "tunejax: x.jsonl:3: empty"),
        (KeyboardInterrupt(), 130, "tunejax: interrupted"),
        (PermissionError(13, "Permission denied", "/x"), 2, "tunejax: cannot use /x: Permission denied"),
        (OSError(28, "No space left on device", "/y"), 2, "tunejax: cannot use /y: No space left on device"),
    ],
)
def test_how_it_ends(error, code, said, monkeypatch, capsys):
    fake(monkeypatch, failing(error))
    assert cli.main(["env"]) == code
    assert capsys.readouterr().err == said + "\n"


def test_a_mistake_of_the_program_is_not_hidden(monkeypatch):
    fake(monkeypatch, failing(RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["env"])


def fake(monkeypatch, main):
    """Puts ``main`` in place of every recipe; returns the list of what it was called with."""
    seen = []
    recipe = types.SimpleNamespace(main=lambda args: seen.append(args) or main(args))
    monkeypatch.setattr("importlib.import_module", lambda name: recipe)
    return seen
