"""Floor 3: cached decoding, sampling and stopping."""
