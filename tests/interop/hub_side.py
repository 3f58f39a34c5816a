"""AdapterHub's library `adapters`, run by an interpreter that has it: reads requests, JSON a line, and answers so.

    python tests/interop/hub_side.py --listing > tests/interop/adapterhub_listing.json

remakes the listing of what version 1.3.0 writes, which `test_adapterhub` compares with where the library is absent.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import load_file, save_file

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 32, "initializer_range": 0.3}  # fmt: skip
GPT2 = {"vocab_size": 31, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "initializer_range": 0.3}
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**SIZES, "num_labels": 3}),
    "mlm": ("BertForMaskedLM", "BertConfig", SIZES),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
}
TOKENS = [[3, 14, 15, 9, 26, 5, 8], [2, 7, 18, 28, 1, 8, 2]]
NAME = "there"
UNIONS = {"mam": adapters.MAMConfig, "unipelt": adapters.UniPELTConfig}
PARTS = {"prefix_tuning": adapters.PrefixTuningConfig, "adapter": adapters.SeqBnConfig, "lora": adapters.LoRAConfig}
"""What a union is made of, by the name of its argument."""
SMALL = {"prefix_tuning": {"prefix_length": 3, "bottleneck_size": 5}, "adapter": {"reduction_factor": 4}}
LISTED = {
    "double_seq_bn": {"reduction_factor": 4},
    "seq_bn": {"reduction_factor": 4},
    "par_bn": {"reduction_factor": 4},
    "compacter": {"reduction_factor": 4, "phm_dim": 2},
    "compacter++": {"reduction_factor": 4, "phm_dim": 2, "leave_out": [0]},
    "lora": {"r": 2},
    "prefix_tuning_flat": {"prefix_length": 3, "leave_out": [1]},
    "mam": SMALL,
    "unipelt": {**SMALL, "prefix_tuning": {"prefix_length": 3, "flat": True}, "lora": {"r": 2, "alpha": 2}},
}


def base(kind, out):
    """A random model, saved."""
    torch.manual_seed(0)
    model, config, sizes = MODELS[kind]
    getattr(transformers, model)(getattr(transformers, config)(**sizes)).save_pretrained(out)


def opened(folder):
    """The model in that folder, with adapters made possible."""
    name = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager")
    adapters.init(model)
    return model.eval()


def logits(model):
    """In double precision."""
    with torch.no_grad():
        return model.double()(torch.tensor(TOKENS)).logits.tolist()


def configured(config, overrides):
    """The config of that name; overrides of a union are those of its parts."""
    if config not in UNIONS:
        return adapters.AdapterConfig.load(config, **overrides)
    parts = {**PARTS, "adapter": adapters.ParBnConfig} if config == "mam" else PARTS
    return UNIONS[config](**{k: parts[k](**given) for k, given in overrides.items()})


def save(model, out, with_head):
    """Saves the adapter without pickles.

    The library cannot do so itself where there is a prefix: its tensors have another name in each layer's module, and
    safetensors refuses tensors that share memory. So they are saved as it does, and kept once.
    """
    model.save_adapter(out, NAME, with_head=with_head)
    for name in ("adapter", "model_head"):
        pickle = Path(out, f"pytorch_{name}.bin")
        if pickle.exists():
            tensors = {k: x for k, x in torch.load(pickle, weights_only=True).items() if ".pool." not in k}
            save_file(tensors, Path(out, f"{name}.safetensors"))
            pickle.unlink()


def added(folder, config, overrides):
    """The model with a random adapter, and a random head where one is saved with it."""
    model = opened(folder)
    model.add_adapter(NAME, config=configured(config, overrides), set_active=True)
    model.train_adapter(NAME)
    model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{NAME}." in name or name.startswith("classifier."):
                parameter.copy_(0.4 * torch.randn_like(parameter))
    return model


def write(base, config, overrides, out):
    """Saves a random adapter; the head too where it is of its own."""
    model = added(base, config, overrides)
    own = type(model).__name__.startswith("BertForSequence")
    save(model, out, own)
    return {"logits": logits(model)}


def read(base, folder):
    """Loads an adapter folder."""
    model = opened(base)
    info = {}
    name = model.load_adapter(folder, use_safetensors=True, set_active=True, loading_info=info)
    return {"logits": logits(model), "name": name, **{k: list(v) for k, v in info.items()}}


def listing():
    """Names and shapes of the tensors, and the configs, of what the library writes."""
    found = {}
    for kind in ("bert", "llama"):
        for config, overrides in LISTED.items():
            with tempfile.TemporaryDirectory() as home:
                base(kind, f"{home}/base")
                write(f"{home}/base", config, overrides, f"{home}/out")
                files = sorted(p.name for p in Path(home, "out").iterdir())
                found[f"{kind} {config}"] = {
                    "overrides": overrides,
                    "tensors": {
                        f: {k: list(x.shape) for k, x in sorted(load_file(Path(home, "out", f)).items())}
                        for f in files
                        if f.endswith(".safetensors")
                    },
                    "configs": {
                        f: {**json.loads(Path(home, "out", f).read_text()), "model_name": "base"}
                        for f in files
                        if f.endswith(".json")
                    },
                }
    return found


def serve(requests, answers):
    """Answers requests until there are no more."""
    calls = {"base": base, "write": write, "read": read}
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"answer": calls[request.pop("call")](**request)}
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")  # the library prints to stdout too
    os.dup2(2, 1)
    if "--listing" in sys.argv:
        text = json.dumps(listing(), indent=1, sort_keys=True)
        lists = re.compile(r"\[\s*([\d,\s]*?)\s*\]")
        print(lists.sub(lambda m: f"[{', '.join(m[1].replace(',', ' ').split())}]", text), file=answers)
    else:
        serve(sys.stdin, answers)
