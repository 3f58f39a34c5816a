"""Floor 5: what a config may say, and how it is read."""
