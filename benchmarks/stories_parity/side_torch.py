"""PyTorch transformers and PEFT on stories260k. Writes the initial adapter that the other side begins from."""

import common
import numpy as np


def main() -> None:
    """Trains and prints one JSON line with the loss of every step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = common.arguments()
    torch.manual_seed(0)
    folder = args.assets / "models/stories260k"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    names = [f"{p}_proj" for p in common.PROJECTIONS]
    model = get_peft_model(model, LoraConfig(r=common.RANK, lora_alpha=common.ALPHA, target_modules=names))
    save(model, args.adapter)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=common.LEARNING_RATE, weight_decay=0.0)
    losses = []
    for rows in common.batches(tokenizer, args.assets, args.steps):
        ids = torch.from_numpy(rows.astype(np.int64))
        here, ahead = ids[:, :-1], ids[:, 1:].contiguous()
        labels = torch.where(ahead < 0, -100, ahead)
        out = model(input_ids=here.clamp(min=0), attention_mask=(here >= 0).long(), labels=labels, shift_labels=labels)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach()))
    common.report("torch", losses)


def save(model: object, file: object) -> None:
    """Every initial A, stacked over layers as [layers, in, rank], by site."""
    stacks = {}
    for site in common.PROJECTIONS:
        part = "mlp" if site in ("gate", "up", "down") else "self_attn"
        sites = [getattr(getattr(x, part), f"{site}_proj") for x in model.base_model.model.model.layers]
        stacks[site] = np.stack([x.lora_A["default"].weight.detach().numpy().T for x in sites])
    np.savez(file, **stacks)


if __name__ == "__main__":
    main()
