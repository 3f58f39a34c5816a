"""Floor 4: Hugging Face checkpoints and adapters, both ways."""
