"""PyTorch: transformers' LlamaForCausalLM, LoRA by PEFT, torch.optim.AdamW. One JSON line (see common.py)."""

import common
import numpy as np


def main() -> None:
    """Measures what the flags name."""
    args = common.arguments(compile={"action": "store_true", "help": "torch.compile the model"})
    common.measure(
        "torch_compiled" if args.compile else "torch_eager", args, lambda: setup(args.mode, args.model, args.compile)
    )


def setup(mode: str, folder: str, compiled: bool) -> common.Setup:
    """The training step of ``mode`` on the model in ``folder``, and how many parameters it trains."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(folder)
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        names = [f"{p}_proj" for p in common.PROJECTIONS]
        model = get_peft_model(model, LoraConfig(r=common.RANK, lora_alpha=common.ALPHA, target_modules=names))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=common.LEARNING_RATE, weight_decay=common.WEIGHT_DECAY)
    forward = torch.compile(model) if compiled else model

    def step(rows: np.ndarray) -> float:
        inputs, targets = (torch.from_numpy(x.astype(np.int64)) for x in (rows[:, :-1], rows[:, 1:]))
        # shift_labels are targets that are already aligned.
        loss = forward(input_ids=inputs, labels=inputs, shift_labels=targets.contiguous()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, sum(p.numel() for p in trained)


if __name__ == "__main__":
    main()
