"""Checkpoints that PyTorch transformers wrote, read here, written here, and read by it again: bit for bit."""

import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tunejax.core import digest, errors, paths
from tunejax.interop import hf, tensors
from tunejax.methods import bitfit

COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32}
CASES = {
    "llama": ("LlamaForCausalLM", "lm", {**COMMON, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaForCausalLM", "lm", {**COMMON, "tie_word_embeddings": True}),
    "llama_biased": ("LlamaForCausalLM", "lm", {**COMMON, "attention_bias": True, "mlp_bias": True}),
    "llama_classes": ("LlamaForSequenceClassification", "classification", {**COMMON, "num_labels": 3}),
    "mistral": ("MistralForCausalLM", "lm", {**COMMON, "sliding_window": 8, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", "lm", COMMON),
    "qwen3": ("Qwen3ForCausalLM", "lm", {**COMMON, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", "lm", GPT2),
    "bert_mlm": ("BertForMaskedLM", "mlm", COMMON),
    "bert_classes": ("BertForSequenceClassification", "classification", {**COMMON, "num_labels": 3}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """name -> (folder that transformers wrote, its class, head)."""
    made = {}

    def make(name):
        if name not in made:
            transformers = pytest.importorskip("transformers")
            torch = pytest.importorskip("torch")
            architecture, head, sizes = CASES[name]
            cls = getattr(transformers, architecture)
            torch.manual_seed(0)
            model = cls(cls.config_class(**{k: v for k, v in sizes.items() if v is not None}))
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.1)  # biases and norms are 0 and 1 until then
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = (folder, cls, head)
        return made[name]

    return make


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the llama checkpoint, to damage."""
    shutil.copytree(checkpoint("llama")[0], tmp_path / "llama")
    return tmp_path / "llama"


def read(folder, head="lm", **kw):
    return hf.load(folder, hf.read_config(folder), head=head, **kw)


@pytest.mark.parametrize("name", CASES)
def test_load_save_load_is_bit_identical(name, checkpoint, tmp_path):
    folder, cls, head = checkpoint(name)
    config = hf.read_config(folder)
    params, report = hf.load(folder, config, head=head, cuts=(1,))
    assert report == hf.LoadReport([], [])
    hf.save(tmp_path / "out", params, config, head=head)
    before, after = cls.from_pretrained(folder), cls.from_pretrained(tmp_path / "out")
    theirs, ours = before.state_dict(), after.state_dict()
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(value.numpy(), ours[key].numpy(), err_msg=key)
    a, b = before.config.to_dict(), after.config.to_dict()
    ignored = {"_name_or_path", "transformers_version", "n_inner", "torch_dtype", "layer_types", "head_dim"}
    assert {k: v for k, v in a.items() if k not in ignored} == {k: v for k, v in b.items() if k not in ignored}
    again, _ = hf.load(tmp_path / "out", hf.read_config(tmp_path / "out"), head=head)
    assert digest.digest(again) == digest.digest(params)


def test_layers_heads_and_parts_land_where_they_should(checkpoint):
    from safetensors.numpy import load_file

    folder, _, _ = checkpoint("gpt2")
    theirs = load_file(folder / "model.safetensors")
    params, _ = read(folder, cuts=(2,))
    fused = theirs["transformer.h.2.attn.c_attn.weight"]
    np.testing.assert_array_equal(params["layers"]["1"]["attention"]["k"]["kernel"][0], fused[:, 16:32])
    folder, _, _ = checkpoint("llama")
    theirs = load_file(folder / "model.safetensors")
    params, _ = read(folder)
    np.testing.assert_array_equal(
        params["layers"]["0"]["mlp"]["up"]["kernel"][1], theirs["model.layers.1.mlp.up_proj.weight"].T
    )


def test_types_and_shards(checkpoint, tmp_path):
    folder, cls, head = checkpoint("qwen2")
    config = hf.read_config(folder)
    params, _ = hf.load(folder, config, head=head, param_dtype=jnp.bfloat16)
    hf.save(tmp_path / "out", params, config, head=head, max_shard_size=4000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    back = cls.from_pretrained(tmp_path / "out", dtype="auto")
    theirs = cls.from_pretrained(folder)
    assert str(back.dtype) == "torch.bfloat16"
    for key, value in theirs.state_dict().items():
        np.testing.assert_array_equal(value.bfloat16().float().numpy(), back.state_dict()[key].float().numpy())
    again, _ = read(tmp_path / "out")
    np.testing.assert_array_equal(again["embed"]["table"], params["embed"]["table"].astype(jnp.float32))
    hf.save(tmp_path / "out", params, config, head=head, dtype=jnp.float16)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert read(tmp_path / "out")[0]["embed"]["table"].shape == (40, 16)


def test_straight_into_a_sharding(checkpoint):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(path):
        spec = PartitionSpec(None, "fsdp", "tensor") if path.endswith("kernel") and path.startswith("layers") else None
        return NamedSharding(mesh, spec or PartitionSpec())

    for name in ("llama", "gpt2"):
        folder = checkpoint(name)[0]
        spread, _ = read(folder, shardings=place)
        assert spread["layers"]["0"]["attention"]["q"]["kernel"].addressable_shards[0].data.shape == (3, 4, 8)
        assert digest.digest(spread) == digest.digest(read(folder)[0])


def test_a_head_that_is_missing_is_fresh_and_reported(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _, _ = checkpoint("bert_mlm")
    config = hf.read_config(folder)
    import dataclasses

    config = dataclasses.replace(config, num_labels=4)
    params, report = hf.load(folder, config, head="classification", key=jax.random.key(3))
    assert report.fresh == ["classifier/bias", "classifier/kernel", "pooler/bias", "pooler/kernel"]
    assert "cls.predictions.bias" in report.unused
    assert params["classifier"]["kernel"].shape == (16, 4)
    assert np.abs(params["classifier"]["kernel"]).max() > 0
    hf.save(tmp_path / "out", params, config, head="classification")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 4
    np.testing.assert_array_equal(model.classifier.weight.detach().numpy(), params["classifier"]["kernel"].T)


@pytest.mark.parametrize("name", CASES)
def test_a_head_that_is_there_says_how_many_classes_it_tells_apart(checkpoint, name):
    folder = checkpoint(name)[0]
    assert hf.trained_classes(folder, hf.read_config(folder)) == (3 if "classes" in name else 0)


def test_a_classifier_of_tokens_is_none_of_texts(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForTokenClassification(transformers.BertConfig(**COMMON, num_labels=3))
    model.save_pretrained(tmp_path)
    assert "classifier.weight" in tensors.open_folder(tmp_path)
    assert hf.trained_classes(tmp_path, hf.read_config(tmp_path)) == 0


def test_names_without_their_prefix(checkpoint, tmp_path):
    pytest.importorskip("transformers")
    folder, cls, _ = checkpoint("bert_mlm")
    cls.from_pretrained(folder).bert.save_pretrained(tmp_path / "bare")
    params, report = read(tmp_path / "bare", head="none")
    assert all(p.startswith("pooler/") for p in report.fresh)
    np.testing.assert_array_equal(params["embed"]["table"], read(folder, head="none")[0]["embed"]["table"])


def test_filled_biases(checkpoint, tmp_path):
    """Llama's config can say that there are biases; Qwen2's cannot."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder, _, _ = checkpoint("llama")
    config = hf.read_config(folder)
    params, _ = read(folder)
    start = bitfit.bitfit("{attention/q,mlp/up}/bias").init(jax.random.key(0), params)
    filled = paths.replace(params, {p: x + 0.5 for p, x in start.train.items()})
    hf.save(tmp_path / "biased", filled, config, head="lm")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "biased")
    assert torch.all(model.model.layers[2].self_attn.q_proj.bias == 0.5)
    assert torch.all(model.model.layers[2].self_attn.o_proj.bias == 0)
    folder, _, _ = checkpoint("qwen2")
    params, _ = read(folder)
    hole = paths.replace(params, {"layers/0/attention/q/bias": None})
    with pytest.raises(errors.CheckpointError, match="layers/attention/q/bias: missing in 3 layers"):
        hf.save(tmp_path / "no", hole, hf.read_config(folder), head="lm")
    start = bitfit.bitfit("mlp/up/bias").init(jax.random.key(0), params)
    with pytest.raises(errors.CheckpointError, match="layers/mlp/up/bias: qwen2 checkpoints have no place"):
        hf.save(tmp_path / "no", paths.replace(params, start.train), hf.read_config(folder), head="lm")
    assert not (tmp_path / "no").exists()


def test_save_refuses_holes_and_operators_and_leaves_what_is_there(checkpoint, copy):
    from tunejax.core import low_rank

    config, (params, _) = hf.read_config(copy), read(copy)
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    with pytest.raises(errors.CheckpointError, match="norm/scale: missing"):
        hf.save(copy, paths.replace(params, {"norm/scale": None}), config, head="lm")
    wrapped = low_rank.LowRank(params["head"]["kernel"], jnp.zeros((16, 1)), jnp.zeros((1, 40)))
    with pytest.raises(errors.CheckpointError, match="merge the method"):
        hf.save(copy, paths.replace(params, {"head/kernel": wrapped}), config, head="lm")
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert [p.name for p in copy.parent.iterdir()] == ["llama"]


def test_the_tokenizer_comes_along(checkpoint, assets, tmp_path):
    folder = assets / "models" / "stories260k"
    config = hf.read_config(folder)
    params, report = hf.load(folder, config, head="lm")
    assert report.fresh == []
    hf.save(tmp_path / "out", params, config, head="lm", tokenizer_from=folder, texts={"chat_template.jinja": "a"})
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "a"
    assert hf.generation_config(tmp_path / "out") == {} != hf.generation_config(folder)
    text = "Once upon a time"
    assert hf.tokenizer(tmp_path / "out")(text)["input_ids"] == hf.tokenizer(folder)(text)["input_ids"]
    with pytest.raises(errors.CheckpointError, match="has no tokenizer"):
        hf.tokenizer(checkpoint("llama")[0])


def rewrite(folder, change):
    """The checkpoint with its tensors changed: (dict of arrays) -> None."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    raw.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def break_two(arrays):
    del arrays["model.layers.1.mlp.up_proj.weight"]
    arrays["model.norm.weight"] = np.zeros(17, np.float32)


def cut_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def spoil_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 20) + b"{" * 20)


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / tensors.INDEX).write_text(json.dumps(index))


def spoil_index(folder):
    (folder / tensors.INDEX).write_text("[]")


DAMAGE = {
    "missing tensor": (lambda f: rewrite(f, break_two), ["model.layers.1.mlp.up_proj.weight", "(17,), expected (16,)"]),
    "truncated": (cut_file, ["model.safetensors is truncated", "incomplete, such as '"]),
    "truncated header": (cut_header, ["truncated: its header"]),
    "corrupt header": (spoil_header, ["header is corrupt"]),
    "no file": (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), ["not a safetensors file"]),
    "longer": (lambda f: (f / "model.safetensors").open("ab").write(b"x"), ["corrupt: expected"]),
    "pickle": (only_pickle, ["pytorch_model.bin", "save_pretrained"]),
    "missing shard": (missing_shard, ["model-00002-of-00002.safetensors: named in"]),
    "index": (spoil_index, [f"{tensors.INDEX} is damaged"]),
    "family": (lambda f: edit_config(f, model_type="lama"), ["Did you mean 'llama'"]),
    "no family": (lambda f: edit_config(f, model_type=...), ["no model_type"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "config": (lambda f: (f / "config.json").write_text("{"), ["config.json is not JSON"]),
    "config list": (lambda f: (f / "config.json").write_text("[]"), ["holds a list"]),
    "key": (lambda f: edit_config(f, hidden_size=...), ["hidden_size"]),
    "sizes": (lambda f: edit_config(f, vocab_size=50), ["model.embed_tokens.weight", "(40, 16), expected (50, 16)"]),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error(name, copy):
    damage, says = DAMAGE[name]
    damage(copy)
    with pytest.raises(errors.CheckpointError) as caught:
        read(copy)
    for text in says:
        assert text in str(caught.value)


def test_resolve(tmp_path):
    (tmp_path / "llama-small").mkdir()
    assert hf.resolve(tmp_path / "llama-small") == tmp_path / "llama-small"
    with pytest.raises(errors.CheckpointError, match="Did you mean 'llama-small'"):
        hf.resolve(tmp_path / "llama-smal")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.CheckpointError, match="give the folder"):
        hf.resolve(tmp_path / "file")
    with pytest.raises(errors.CheckpointError, match="no local folder, and as a Hugging Face id"):
        hf.resolve("nobody/no-such-model")
    with pytest.raises(errors.CheckpointError, match="no local folder"):
        hf.resolve("not a name at all")
