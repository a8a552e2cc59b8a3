"""Tensors to loss and text: the two media branches, the language model, and their checkpoints."""
