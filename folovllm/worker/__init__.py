"""From scheduled work to tensors and back."""
