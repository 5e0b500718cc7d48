"""Which sequences run in a step, and which cache blocks they have. No tensors here."""
