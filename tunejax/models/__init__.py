"""Floor 2: blueprints in Flax NNX, handed up as the pure functions of core.model.Model."""
