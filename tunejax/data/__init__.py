"""Floor 2: files to examples to batches."""
