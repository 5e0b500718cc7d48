"""From a scheduler output to tensors and back."""
