"""The config: names, types, overrides, every problem in one message, and a resolved copy that reads back."""

import pytest
import yaml

from tunejax.config import load, locate, schema
from tunejax.core import errors

RAW = {"output_dir": "runs/x", "data": {"path": "rows.jsonl"}, "method": {"name": "lora", "rank": 4}}


def check(**more):
    return load.check({**RAW, **more})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e-3", -2.5e-3),
        (".5e1", 5.0),
        ("3", 3),
        ("'1e-4'", "1e-4"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("true", True),
        ("null", None),
        ("[a, 1e-2]", ["a", 0.01]),
    ],
)
def test_yaml_reads_numbers_as_people_write_them(text, value):
    found = load.parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_a_key_given_twice_is_refused():
    with pytest.raises(errors.ConfigError, match="given twice: a"):
        load.parse_yaml("a: 1\na: 2", "here")


def test_defaults_are_filled_and_the_head_follows_the_objective():
    assert check().model.head == "lm"
    assert check(objective={"name": "classification"}).model.head == "classification"
    assert check().data.path == [schema.Source(path="rows.jsonl")]
    with pytest.raises(errors.ConfigError, match=r"needs model\.head: classification"):
        check(objective={"name": "classification"}, model={"head": "lm"})


def test_every_problem_is_in_one_message_with_its_full_key():
    raw = {
        "output_dir": "x",
        "data": {"path": "x", "colums": {}, "max_length": "long"},
        "method": "full",
        "train": {"learning_rte": 1, "bf16": True},
        "lerning_rate": 1,
        "mesh": {"data": 0},
    }
    with pytest.raises(errors.ConfigError) as caught:
        load.check(raw, "my.yaml")
    said = str(caught.value)
    assert said.startswith("my.yaml: 6 problems")
    for part in (
        "data.colums: unknown key. Did you mean 'data.columns'?",
        "data.max_length: input should be a valid integer",
        "train.learning_rte: unknown key. Did you mean 'train.learning_rate'?",
        "train.bf16: unknown key. It is model.dtype=bfloat16 here.",
        "lerning_rate: unknown key. Did you mean 'train.learning_rate'?",
        "mesh: data, fsdp, tensor are (0, 1, 1)",
    ):
        assert part in said


def test_a_key_of_a_source_is_hinted_by_its_place():
    raw = {"output_dir": "x", "data": {"path": [{"path": "a", "wieght": 2}]}, "method": "none"}
    with pytest.raises(errors.ConfigError, match=r"path\.0\.wieght: unknown key. Did you mean 'data\.path\.0\.weight'"):
        load.check(raw)


@pytest.mark.parametrize("name", ["learning_rate", "packing", "max_length", "remat"])
def test_a_known_key_in_the_wrong_section_is_pointed_to_the_right_one(name):
    right = {"learning_rate": "train", "packing": "data", "max_length": "data", "remat": "model"}[name]
    with pytest.raises(errors.ConfigError, match=f"Did you mean '{right}.{name}'"):
        load.check({**RAW, name: 1})


def test_overrides_are_typed_nested_and_ordered():
    raw = load.override(RAW, ["train.learning_rate=1e-4", "data.packing=true", "method.rank=8", "seed=1", "seed=2"])
    config = load.check(raw)
    assert (config.train.learning_rate, config.data.packing, config.seed) == (1e-4, True, 2)
    assert config.method == {"name": "lora", "rank": 8}
    assert RAW["method"]["rank"] == 4


def test_overrides_walk_into_lists_and_named_methods():
    raw = load.override({**RAW, "method": ["bitfit", {"name": "lora"}]}, ["method.1.rank=2", "method.0.lr=3"])
    assert raw["method"] == [{"name": "bitfit", "lr": 3}, {"name": "lora", "rank": 2}]
    with pytest.raises(errors.ConfigError, match="not a place in a list of 2"):
        load.override(raw, ["method.5.rank=2"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.learning_rat=1", "Did you mean 'train.learning_rate'"),
        ("learning_rate=1", "Did you mean 'train.learning_rate'"),
        ("seed", "not of the form key=value"),
        ("seed=[1", "is not YAML"),
        ("output_dir.x=1", "unknown key"),
    ],
)
def test_bad_overrides(text, said):
    with pytest.raises(errors.ConfigError, match=said.replace("[", r"\[")):
        load.override(RAW, [text])


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "not both"),
        ({"train_batch_size": 8, "per_device_train_batch_size": 1}, "not both"),
        ({"train_batch_size": 7, "gradient_accumulation_steps": 2}, "multiple"),
        ({"early_stopping_patience": 2}, "set eval_steps too"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"report_to": "mlflow"}, "'tensorboard' or 'wandb'"),
    ],
)
def test_settings_that_do_not_go_together(train, said):
    with pytest.raises(errors.ConfigError, match=said):
        check(train=train)


def test_what_hugging_face_users_write_is_understood():
    config = check(train={"report_to": "none", "max_steps": -1, "lr_scheduler_type": "cosine"}, method="full")
    assert config.train.report_to == []
    assert config.train.max_steps is None
    assert config.method == {"name": "full"}


def test_the_resolved_config_reads_back_equal():
    config = check(expected={"eval_accuracy": [0.5, 1]}, data={"path": ["a", {"path": "b", "weight": 2}]})
    again = load.check(yaml.safe_load(load.dump(config)))
    assert again == config
    assert load.differences(again, config) == {}
    other = check(seed=3, method={"name": "lora", "rank": 5}, data={"path": ["a", {"path": "b", "weight": 2}]})
    assert set(load.differences(config, other)) == {"seed", "method", "expected"}


def test_every_key_is_listed_with_its_default():
    listed = load.fields_help()
    for key in ("train.learning_rate", "data.on_bad_row", "mesh.fsdp", "output_dir"):
        assert key in listed


def test_files_that_are_no_configs(tmp_path):
    (tmp_path / "ok.yaml").write_text("seed: 1")
    with pytest.raises(errors.ConfigError, match=r"no config file at .*Did you mean 'ok.yaml'"):
        load.read_file(tmp_path / "okk.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(errors.ConfigError, match="expected a mapping of sections, found list"):
        load.read_file(tmp_path / "list.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    with pytest.raises(errors.ConfigError, match="not UTF-8"):
        load.read_file(tmp_path / "bytes.yaml")


def test_paths_in_packages_and_variables(monkeypatch):
    assert locate.locate("package:tunejax/core/paths.py").endswith("core/paths.py")
    monkeypatch.setenv("HERE_I_AM", "/some/where")
    assert locate.locate("${HERE_I_AM}/x") == locate.locate("$HERE_I_AM/x") == "/some/where/x"
    monkeypatch.delenv("HERE_I_AM")
    with pytest.raises(errors.ConfigError, match="HERE_I_AM"):
        locate.locate("$HERE_I_AM/x")
    with pytest.raises(errors.ConfigError, match="no package 'no_such_thing' is installed"):
        locate.locate("package:no_such_thing/model")
    with pytest.raises(errors.ConfigError, match=r"holds no 'core/path.py'. Did you mean 'core/paths.py'"):
        locate.locate("package:tunejax/core/path.py")


def test_a_run_folder_may_be_named_by_home_and_variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert check(output_dir="~/runs/x").output_dir == "/home/me/runs/x"
    assert check(output_dir="${SCRATCH}/x").output_dir == "/scratch/x"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(errors.ConfigError, match="SCRATCH"):
        check(output_dir="${SCRATCH}/x")


def test_a_seed_is_one_that_keys_can_hold():
    assert check(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(errors.ConfigError, match="seed: input should be less than 4294967296"):
        check(seed=2**32)
