"""Adapter folders of HF PEFT, both ways: what one library wrote the other reads, with the same logits."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from tunejax.core import errors
from tunejax.core.method import Context, apply_edits
from tunejax.core.model import full_batch
from tunejax.interop import found as found_lib
from tunejax.interop import hf, peft_read
from tunejax.interop import peft as ours
from tunejax.methods import registry
from tunejax.models import build

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
LAYERS = 3


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
        )
    )  # fmt: skip


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=LAYERS, n_head=4, n_positions=32, initializer_range=0.2
        )
    )


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
            max_position_embeddings=32, initializer_range=0.2, num_labels=3,
        )
    )  # fmt: skip


MODELS = {"llama": (llama, "lm"), "gpt2": (gpt2, "lm"), "bert": (bert, "classification")}


@pytest.fixture(params=MODELS, scope="module")
def base(request, tmp_path_factory):
    """(folder of a random model, its head)."""
    torch.manual_seed(0)
    make, head = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make().save_pretrained(folder)
    return folder, head


def their_model(folder, head):
    auto = {"lm": transformers.AutoModelForCausalLM, "classification": transformers.AutoModelForSequenceClassification}
    return auto[head].from_pretrained(folder).eval()


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def our_logits(config, head, cuts, params):
    model = build.build(config, head=head, cuts=cuts)
    run = jax.jit(lambda p: model.logits(model.head(p), model.hidden(p, full_batch(jnp.asarray(TOKENS)))[0]))
    logits = run(params)
    return np.asarray(logits[:, 0] if head == "classification" else logits)


def randomised(model):
    """The PEFT model with every trained weight random, its head's too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.1)
    return model.eval()


def read(folder, base_folder, head):
    """(logits of the adapter read here, what `peft_read` found, what trains of it by site)."""
    config = hf.read_config(base_folder)
    found, method, train, shapes = read_arrays(folder, base_folder, head)
    cuts = method.cuts(config.num_layers)
    params = loaded(base_folder, head, cuts)
    state = found_lib.state_of(found, method, jax.jit(lambda p: method.init(jax.random.key(0), p).state)(params))
    params = apply_edits(params, shapes.edits)
    return our_logits(config, head, cuts, method.bind(params, train, state, Context())), found, by_site(method, train)


def read_arrays(folder, base_folder, head):
    """(what `peft_read` found, its method, what trains, the shapes of a start)."""
    config = hf.read_config(base_folder)
    found = peft_read.read(folder, config, head=head)
    method = registry.build(found.specs)
    cuts = method.cuts(config.num_layers)
    shapes = jax.eval_shape(method.init, jax.random.key(0), loaded(base_folder, head, cuts))
    train = found_lib.trained(found, method, shapes.train, cuts)
    assert jax.tree.map(jnp.shape, train) == jax.tree.map(jnp.shape, shapes.train)
    return found, method, train, shapes


@functools.cache
def loaded(folder, head, cuts=()):
    return hf.load(folder, hf.read_config(folder), head=head, cuts=cuts)[0]


def by_site(method, train):
    """Arrays by path and name, whatever parts a chain has."""
    parts = list(train.values()) if method.parts else [train]
    return {p: x for part in parts for p, x in part.items()}


TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "bert": ["query", "output.dense"],
}
THEIRS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 2, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"r": 2, "lora_alpha": 4, "rank_pattern": {"P": 5}, "alpha_pattern": {"P": 7}},
    "some layers": {"r": 2, "lora_alpha": 4, "layers_to_transform": [1, 2]},
    "one layer and another": {"r": 2, "lora_alpha": 4, "layers_to_transform": [0, 2]},
}


@pytest.mark.parametrize("kind", THEIRS)
def test_theirs_is_read(base, kind, tmp_path):
    folder, head = base
    family = hf.read_config(folder).family
    options = {k: ({TARGETS[family][0]: v["P"]} if isinstance(v, dict) else v) for k, v in THEIRS[kind].items()}
    task = "SEQ_CLS" if head == "classification" else "CAUSAL_LM"
    fused = family == "gpt2"
    config = peft.LoraConfig(target_modules=TARGETS[family], task_type=task, fan_in_fan_out=fused, **options)
    theirs = randomised(peft.get_peft_model(their_model(folder, head), config))
    theirs.save_pretrained(tmp_path)
    found, _, _ = read(tmp_path, folder, head)
    np.testing.assert_allclose(found, their_logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", ["all", "lora_only"])
def test_their_biases_are_read(base, trained, tmp_path):
    folder, head = base
    family = hf.read_config(folder).family
    task = "SEQ_CLS" if head == "classification" else "CAUSAL_LM"
    config = peft.LoraConfig(
        r=2, target_modules=TARGETS[family], task_type=task, fan_in_fan_out=family == "gpt2", bias=trained
    )
    theirs = randomised(peft.get_peft_model(their_model(folder, head), config))
    theirs.save_pretrained(tmp_path)
    logits, found, _ = read(tmp_path, folder, head)
    np.testing.assert_allclose(logits, their_logits(theirs), atol=1e-5, rtol=1e-5)
    assert any("bias" in t for s in found.specs for t in s["targets"]) == (family != "llama")


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
@pytest.mark.parametrize("kind", ["ia3", "dora"])
def test_a_module_of_three_kernels_is_read(base, kind, tmp_path):
    options = {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    if kind == "ia3":
        config = peft.IA3Config(feedforward_modules=[], **options)
    else:
        config = peft.LoraConfig(r=2, use_dora=True, **options)
    theirs = randomised(peft.get_peft_model(their_model(*base), config))
    theirs.save_pretrained(tmp_path)
    logits, found, _ = read(tmp_path, *base)
    np.testing.assert_allclose(logits, their_logits(theirs), atol=1e-5, rtol=1e-5)
    assert found.specs[0]["name"] == kind


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_a_part_of_a_module_is_written_with_ones_beside_it(base, tmp_path):
    specs = [{"name": "ia3", "targets": ["attention/{k,v}/kernel", "mlp/up/kernel"], "feedforward": []}]
    written_and_read(base, specs, tmp_path)


LAYER_NORMS = {"llama": ["input_layernorm", "norm"], "gpt2": ["ln_1", "ln_f"], "bert": ["LayerNorm"]}


def test_their_layer_norms_are_read(base, tmp_path):
    folder, head = base
    family = hf.read_config(folder).family
    task = "SEQ_CLS" if head == "classification" else "CAUSAL_LM"
    config = peft.LNTuningConfig(target_modules=LAYER_NORMS[family], task_type=task)
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        theirs = randomised(peft.get_peft_model(their_model(folder, head), config))
    theirs.save_pretrained(tmp_path)
    logits, found, _ = read(tmp_path, folder, head)
    np.testing.assert_allclose(logits, their_logits(theirs), atol=1e-5, rtol=1e-5)
    assert [s["name"] for s in found.specs] == ["norm_tuning", "full"][: len(found.specs)]


OURS = {
    "lora": [{"name": "lora", "rank": 3, "alpha": 6}],
    "rslora": [{"name": "lora", "rank": 2, "rslora": True, "targets": "attention/{q,v}/kernel"}],
    "two ranks": [{"name": "lora", "rank": 2, "targets": "attention/q/kernel"},
                  {"name": "lora", "rank": 4, "alpha": 3, "targets": "mlp/down/kernel"}],
    "last layers": [{"name": "lora", "rank": 2, "layers": "-2:"}],
    "norms": [{"name": "norm_tuning"}],
    "norms of some layers": [{"name": "norm_tuning", "layers": "-1:", "targets": "mlp/norm/*"}],
    "norms too": [{"name": "lora", "rank": 2}, {"name": "full", "targets": "norm/*"}],
}  # fmt: skip


def written_and_read(base, specs, tmp_path):
    """What `peft_read` finds of random arrays of a method, which PEFT and we then compute the same from."""
    folder, head = base
    config = hf.read_config(folder)
    method = registry.build(specs)
    cuts = method.cuts(config.num_layers)
    params, _ = hf.load(folder, config, head=head, cuts=cuts)
    start = method.init(jax.random.key(0), params)
    rng = np.random.default_rng(2)
    train = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), start.train)
    params = apply_edits(params, start.edits)
    mine = our_logits(config, head, cuts, method.bind(params, train, start.state, Context()))
    tuned = ours.Tuned(specs, method, params, train, start.state)
    ours.write(tmp_path, tuned, config, head=head, base_name=str(folder))
    theirs = peft.PeftModel.from_pretrained(their_model(folder, head), tmp_path).eval()
    np.testing.assert_allclose(their_logits(theirs), mine, atol=1e-5, rtol=1e-5)
    again, found, _ = read(tmp_path, folder, head)
    np.testing.assert_allclose(again, mine, atol=1e-5, rtol=1e-5)
    assert found.base == str(folder)
    return found


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", OURS)
def test_ours_is_written_and_read_back(base, kind, tmp_path):
    written_and_read(base, OURS[kind], tmp_path)


KINDS = {
    "dora": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_dora": True}, {"rank": 3, "alpha": 5.0}),
    "ia3": ("IA3Config", {"feedforward_modules": "F"}, {}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3}, {"rank": 2, "alpha": 3.0}),
    "lokr": (
        "LoKrConfig",
        {"r": 1, "alpha": 2, "decompose_both": True, "decompose_factor": 4},
        {"rank": 1, "alpha": 2.0, "decompose_both": True, "factor": 4},
    ),
    "vera": ("VeraConfig", {"r": 5, "projection_prng_key": 3}, {"rank": 5, "seed": 3}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}, {"block_size": 4, "neumann": False}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}, {"block_size": 4}),
    "hra": ("HRAConfig", {"r": 4}, {"rank": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, "scaling": 50.0}, {"n_frequency": 20, "scaling": 50.0}),
    "miss": ("MissConfig", {"r": 5}, {"rank": 5}),
    "pissa": ("LoraConfig", {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"}, {"rank": 3, "alpha": 5.0}),
    "olora": (
        "LoraConfig",
        {"r": 3, "lora_alpha": 5, "init_lora_weights": "olora", "use_rslora": True},
        {"rank": 3, "alpha": 5.0, "rslora": True},
    ),
    "adalora": (
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 2, "total_step": 20, "tinit": 3, "deltaT": 2, "lora_alpha": 3},
        {"rank": 4, "target_rank": 2, "total_steps": 20, "warmup_steps": 3, "every": 2, "alpha": 3.0},
    ),
}
"""Method -> (PEFT's config, its entries, our arguments)."""
WRITTEN = {k: arguments for k, (_, _, arguments) in KINDS.items()} | {
    "krona": {"alpha": 0.7},
    "pissa": {"rank": 2, "alpha": 3.0},
    "olora": {"rank": 2, "alpha": 3.0, "rslora": True},
}
WITH_BIAS = ("boft", "dora", "hra", "ia3", "vera")
"""What is tried on BERT too: where a bias might be scaled, or modules of several shapes share."""
FEEDFORWARD = {"llama": ["down_proj"], "bert": ["output.dense"]}
quiet = pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")


BIASED = {
    "bitfit": {"name": "bitfit"},
    "queries": {"name": "full", "targets": "attention/q/bias"},
    "values": {"name": "full", "targets": ["attention/v/bias", "/embed_norm/*"]},
}


@quiet
@pytest.mark.parametrize(
    ("base", "name", "beside"),
    [
        *(("bert", "lora", b) for b in BIASED),
        *(("bert", n, "bitfit") for n in ("boft", "dora", "fourierft", "hra", "miss", "oft", "vera")),
        ("gpt2", "lora", "bitfit"),
        ("gpt2", "lora", "queries"),  # a third of a bias there
    ],
    indirect=["base"],
)
def test_biases_beside_an_adapter_are_written_and_read_back(base, name, beside, tmp_path):
    targets = ["attention/{q,k,v}/kernel", "mlp/down/kernel"]
    found = written_and_read(
        base, [{"name": name, "targets": targets, **WRITTEN.get(name, {})}, BIASED[beside]], tmp_path
    )
    settings = json.loads((tmp_path / ours.CONFIG).read_text())
    assert settings["bias"].endswith("_only")
    assert {s["name"] for s in found.specs} == {name, "full"}


def cases(kinds):
    listed = [("llama", k) for k in kinds] + [("bert", k) for k in kinds if k in WITH_BIAS]
    return pytest.mark.parametrize(("base", "kind"), listed, indirect=["base"])


def their_adapter(base, kind, **more):
    """A random adapter under PEFT."""
    folder, head = base
    family = hf.read_config(folder).family
    name, entries, _ = KINDS[kind]
    entries = {k: FEEDFORWARD[family] if v == "F" else v for k, v in {**entries, **more}.items()}
    task = "SEQ_CLS" if head == "classification" else "CAUSAL_LM"
    torch.manual_seed(1)
    config = getattr(peft, name)(target_modules=TARGETS[family], task_type=task, **entries)
    theirs = peft.get_peft_model(their_model(folder, head), config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return theirs


@quiet
@cases(KINDS)
def test_every_kind_of_theirs_is_read(base, kind, tmp_path):
    theirs = their_adapter(base, kind)
    theirs.save_pretrained(tmp_path)
    logits, found, _ = read(tmp_path, *base)
    np.testing.assert_allclose(logits, their_logits(theirs.double()), atol=1e-5, rtol=1e-5)
    assert KINDS[kind][2].items() <= found.specs[0].items()
    assert found.specs[0]["name"] == kind


@quiet
@cases(WRITTEN)
def test_every_kind_of_ours_is_written_and_read_back(base, kind, tmp_path):
    folder, head = base
    config = hf.read_config(folder)
    spec = {"name": kind, "targets": ["attention/{q,v}/kernel", "mlp/down/kernel"], **WRITTEN[kind]}
    method = registry.build(spec)
    params = loaded(folder, head)
    start = method.init(jax.random.key(0), params)
    rng = np.random.default_rng(2)
    train = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), start.train)
    mine = our_logits(config, head, (), method.bind(params, train, start.state, Context()))
    tuned = ours.Tuned([spec], method, params, train, start.state)
    ours.write(tmp_path, tuned, config, head=head, base_name=str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unexpected keyword arguments")
        warnings.filterwarnings("error", ".*retrain")
        theirs = peft.PeftModel.from_pretrained(their_model(folder, head), tmp_path).eval()
    np.testing.assert_allclose(their_logits(theirs.double()), mine, atol=1e-5, rtol=1e-5)
    found, again, back, _ = read_arrays(tmp_path, folder, head)
    if kind in ("pissa", "olora"):
        assert found.specs[0]["name"] == "lora"
        np.testing.assert_allclose(read(tmp_path, folder, head)[0], mine, atol=1e-5, rtol=1e-5)
        return
    back = by_site(again, back)
    jax.tree.map(np.testing.assert_array_equal, {p: back[p] for p in train}, train)
    jax.tree.map(np.testing.assert_array_equal, found.shared, dict(start.state.get("shared", {})))


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_ranks_that_adalora_pruned_are_zero(base, tmp_path):
    """PEFT leaves them out of the folder, and says which they were."""
    theirs = their_adapter(base, "adalora")
    kept = {
        "model.layers.0.self_attn.q_proj.lora_E.default": [True, False, True, False],
        "model.layers.2.mlp.down_proj.lora_E.default": [False, True, False, False],
    }
    weights = dict(theirs.base_model.model.named_parameters())
    with torch.no_grad():
        for name, rows in kept.items():
            weights[name][~torch.tensor(rows)] = 0.0
    theirs.peft_config["default"].rank_pattern = kept
    logits = their_logits(theirs.double())
    theirs.float().save_pretrained(tmp_path)
    assert safetensors.load_file(tmp_path / ours.WEIGHTS)[f"{ours.PREFIX}{next(iter(kept))[:-8]}"].shape == (2, 1)
    found, _, _ = read(tmp_path, *base)
    np.testing.assert_allclose(found, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_shared_draw_that_was_not_saved_is_refused(base, tmp_path):
    their_adapter(base, "vera", save_projection=False).save_pretrained(tmp_path)
    with pytest.raises(errors.CheckpointError, match="vera_A"):
        read(tmp_path, *base)


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_a_kind_that_peft_lacks_for_these_modules_is_refused(base, tmp_path):
    folder, head = base
    spec = {"name": "loha", "targets": "mlp/up/kernel"}
    method = registry.build(spec)
    start = method.init(jax.random.key(0), loaded(folder, head))
    tuned = ours.Tuned([spec], method, loaded(folder, head), start.train, start.state)
    with pytest.raises(errors.ConfigError, match="no loha for this model"):
        ours.write(tmp_path / "out", tuned, hf.read_config(folder), head=head, base_name="x")


@pytest.fixture
def written(base, tmp_path):
    """(adapter that PEFT wrote, base folder, head)."""
    folder, head = base
    task = "SEQ_CLS" if head == "classification" else "CAUSAL_LM"
    family = hf.read_config(folder).family
    config = peft.LoraConfig(r=2, target_modules=TARGETS[family], task_type=task, fan_in_fan_out=family == "gpt2")
    peft.get_peft_model(their_model(folder, head), config).save_pretrained(tmp_path)
    return tmp_path, folder, head


def changed(folder, **entries):
    file = folder / ours.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"peft_type": "LORE"}, "LORA"),
        ({"peft_type": "MISS", "init_weights": "bat"}, "MISS with init_weights: 'bat' is not known here"),
        ({"use_bdlora": True}, "use_bdlora"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
    ],
)
def test_an_adapter_that_would_be_misread_is_refused(written, entries, said):
    adapter, folder, head = written
    changed(adapter, **entries)
    with pytest.raises(errors.CheckpointError, match=said):
        read(adapter, folder, head)


def test_a_bias_of_an_adapter_is_refused(written):
    adapter, folder, head = written
    tensors = safetensors.load_file(adapter / ours.WEIGHTS)
    name = next(k for k in tensors if k.endswith("lora_B.weight"))
    tensors[name.removesuffix("weight") + "bias"] = np.ones(len(tensors[name]), np.float32)
    safetensors.save_file(tensors, adapter / ours.WEIGHTS)
    with pytest.raises(errors.CheckpointError, match=r"knows nothing of .*lora_B\.bias"):
        read(adapter, folder, head)
    changed(adapter, lora_bias=True)
    with pytest.raises(errors.CheckpointError, match="lora_bias: True"):
        read(adapter, folder, head)


def test_an_alpha_that_is_not_said_is_pefts_own(written):
    adapter, folder, head = written
    settings = json.loads((adapter / ours.CONFIG).read_text())
    del settings["lora_alpha"]
    (adapter / ours.CONFIG).write_text(json.dumps(settings))
    theirs = peft.PeftModel.from_pretrained(their_model(folder, head), adapter).eval()
    logits, found, _ = read(adapter, folder, head)
    np.testing.assert_allclose(logits, their_logits(theirs), atol=1e-5, rtol=1e-5)
    assert found.specs[0]["alpha"] == 8.0


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_an_alpha_that_dora_does_not_say_is_pefts_own(base, tmp_path):
    their_adapter(base, "dora").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / ours.CONFIG).read_text())
    del settings["lora_alpha"]
    (tmp_path / ours.CONFIG).write_text(json.dumps(settings))
    theirs = peft.PeftModel.from_pretrained(their_model(*base), tmp_path).eval()
    np.testing.assert_allclose(read(tmp_path, *base)[0], their_logits(theirs), atol=1e-5, rtol=1e-5)


def test_a_tensor_without_a_place_is_named(written):
    adapter, folder, head = written
    tensors = safetensors.load_file(adapter / ours.WEIGHTS)
    name = next(k for k in tensors if "lora_A" in k)
    tensors["base_model.model.elsewhere.lora_A.weight"] = tensors.pop(name)
    safetensors.save_file(tensors, adapter / ours.WEIGHTS)
    with pytest.raises(errors.CheckpointError, match="elsewhere"):
        read(adapter, folder, head)


def test_a_missing_tensor_is_named(written):
    adapter, folder, head = written
    tensors = safetensors.load_file(adapter / ours.WEIGHTS)
    name = next(k for k in tensors if "lora_B" in k)
    del tensors[name]
    safetensors.save_file(tensors, adapter / ours.WEIGHTS)
    with pytest.raises(errors.CheckpointError, match="lora_B"):
        read(adapter, folder, head)


def test_what_has_no_form_in_peft_is_refused(base, tmp_path):
    folder, head = base
    config = hf.read_config(folder)
    params, _ = hf.load(folder, config, head=head)
    spec = [{"name": "full"}]
    method = registry.build(spec)
    start = method.init(jax.random.key(0), params)
    with pytest.raises(errors.ConfigError, match="--format hf"):
        ours.write(
            tmp_path / "out", ours.Tuned(spec, method, params, start.train, {}), config, head=head, base_name="x"
        )
    assert not (tmp_path / "out").exists()


PROMPTS = {
    "prompt_tuning": ({"name": "prompt_tuning", "length": 4}, "PROMPT_TUNING"),
    "p_tuning": ({"name": "p_tuning", "length": 4, "hidden": 8}, "P_TUNING"),
    "prefix_tuning": ({"name": "prefix_tuning", "length": 4, "project": True}, "PREFIX_TUNING"),
    "p_tuning_v2": ({"name": "p_tuning_v2", "length": 4}, "PREFIX_TUNING"),
}


def prompted(config, head, method, params):
    """Our logits of `TOKENS` after the method's virtual tokens."""
    model = build.build(config, head=head, cuts=())
    virtual = np.broadcast_to(np.arange(config.vocab_size, config.vocab_size + method.prompt), (2, method.prompt))
    tokens = np.concatenate([virtual, TOKENS], axis=1).astype(np.int32)
    logits = model.logits(model.head(params), model.hidden(params, full_batch(jnp.asarray(tokens)))[0])
    return np.asarray(logits[:, method.prompt :])


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_written_and_read_back(kind, tmp_path):
    torch.manual_seed(0)
    folder, head = tmp_path / "base", "lm"
    llama().save_pretrained(folder)
    config, (spec, peft_type) = hf.read_config(folder), PROMPTS[kind]
    method, params = registry.build(spec), loaded(folder, head)
    start = method.init(jax.random.key(0), params)
    mine = prompted(config, head, method, method.bind(params, start.train, start.state, Context()))
    tuned = ours.Tuned([spec], method, params, start.train, start.state)
    ours.write(tmp_path / "adapter", tuned, config, head=head, base_name=str(folder))
    theirs = peft.PeftModel.from_pretrained(their_model(folder, head), tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].peft_type == peft_type
    np.testing.assert_allclose(their_logits(theirs)[:, -TOKENS.shape[1] :], mine, atol=1e-5, rtol=1e-5)
    found, again, train, _ = read_arrays(tmp_path / "adapter", folder, head)
    assert found.specs[0]["length"] == 4
    np.testing.assert_allclose(prompted(config, head, again, again.bind(params, train, {}, Context())), mine, atol=1e-6)


@pytest.mark.parametrize("network", [{}, {"prefix_projection": True, "encoder_hidden_size": 6}], ids=["", "projected"])
def test_theirs_with_a_prompt_is_read(network, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, **network}
    theirs = randomised(peft.get_peft_model(their_model(folder, "lm"), peft.PrefixTuningConfig(**options)))
    theirs.save_pretrained(tmp_path / "adapter")
    config, params = hf.read_config(folder), loaded(folder, "lm")
    _, method, train, _ = read_arrays(tmp_path / "adapter", folder, "lm")
    mine = prompted(config, "lm", method, method.bind(params, train, {}, Context()))
    np.testing.assert_allclose(mine, their_logits(theirs)[:, -TOKENS.shape[1] :], atol=1e-5, rtol=1e-5)


def test_a_prompt_that_does_not_fit_is_told(tmp_path):
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    config, params = hf.read_config(folder), loaded(folder, "lm")
    spec = {"name": "prefix_tuning", "length": 2, "layers": "-1:"}
    method = registry.build(spec)
    cut = loaded(folder, "lm", method.cuts(LAYERS))
    start = method.init(jax.random.key(0), cut)
    with pytest.raises(errors.ConfigError, match="in every layer"):
        ours.write(tmp_path / "a", ours.Tuned([spec], method, cut, start.train, {}), config, head="lm", base_name="b")
    both = [{"name": "prompt_tuning", "length": 2}, {"name": "lora", "rank": 2}]
    method = registry.build(both)
    start = method.init(jax.random.key(0), params)
    with pytest.raises(errors.ConfigError, match="a prompt and lora"):
        ours.write(tmp_path / "a", ours.Tuned(both, method, params, start.train, start.state), config, head="lm",
                   base_name="b")  # fmt: skip
    assert not (tmp_path / "a").exists()
