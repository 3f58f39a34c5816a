"""Floor 2: one tuning method a file, each a transform of the parameter pytree."""
