"""The losses: softmax (CLIP and everything with soft targets)."""
