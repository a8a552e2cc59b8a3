"""The small Video-LLaMA of the package: its sizes, and the training of the parts that are pretrained in the full model."""
