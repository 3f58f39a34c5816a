"""Floor 2: losses as sums and weights."""
