"""One file a model family: its configuration and its tensor names in Hugging Face checkpoints."""
