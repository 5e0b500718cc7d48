"""Who runs in a step, and which blocks of the cache they have. No tensors here."""
