"""Floor 3: the sharded step, its state, the loop and checkpoints. Knows no method and no model."""
