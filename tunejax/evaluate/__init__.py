"""Floor 4: metrics over data sets."""
