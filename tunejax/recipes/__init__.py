"""Floor 5: what each command does, top to bottom."""
