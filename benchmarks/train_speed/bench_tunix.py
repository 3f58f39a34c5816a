"""Tunix: its Llama3 model, LoRA by qwix, its PeftTrainer's compiled step. One JSON line (see common.py).

Runs in an environment of its own: `pip install google-tunix==0.1.7`. The trainer's loop, checkpoints and metrics
are left out; the loss, gradients, update and the cached graph are Tunix's.
"""

import common
import numpy as np


def main() -> None:
    """Measures what the flags name."""
    args = common.arguments()
    common.measure("tunix", args, lambda: setup(args.mode, args.model))


def setup(mode: str, folder: str) -> common.Setup:
    """The training step of ``mode`` on the model in ``folder``, and how many parameters it trains."""
    import jax
    import optax
    import qwix
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params
    from tunix.sft import peft_trainer, utils

    config = llama.ModelConfig(
        num_layers=common.LAYERS,
        vocab_size=common.VOCAB,
        embed_dim=common.WIDTH,
        hidden_dim=common.MLP,
        num_heads=common.HEADS,
        head_dim=common.WIDTH // common.HEADS,
        num_kv_heads=common.HEADS,
        rope_theta=10000,
        norm_eps=1e-6,
        weight_tying=True,
    )
    model = params.create_model_from_safe_tensors(folder, config)
    if mode == "lora":
        names = "|".join(f".*{p}_proj" for p in common.PROJECTIONS)
        provider = qwix.LoraProvider(module_path=names, rank=common.RANK, alpha=common.ALPHA)
        model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())
    optimizer = optax.adamw(common.LEARNING_RATE, weight_decay=common.WEIGHT_DECAY)
    trainer = peft_trainer.PeftTrainer(model, optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=1000))

    def inputs(batch: peft_trainer.TrainingInput) -> dict:
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": utils.build_positions_from_mask(batch.input_mask),
            "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
        }

    train_step, _ = trainer.with_gen_model_input_fn(inputs).jit_train_and_eval_step(cache_nnx_graph=True)
    wrt = nnx.LoRAParam if mode == "lora" else nnx.Param
    mask = np.ones((common.BATCH, common.LENGTH), bool)

    def step(rows: np.ndarray) -> float:
        loss, _, _ = train_step(peft_trainer.TrainingInput(input_tokens=rows[:, :-1], input_mask=mask))
        return float(loss)

    return step, sum(x.size for x in jax.tree.leaves(nnx.state(model, wrt)))


if __name__ == "__main__":
    main()
