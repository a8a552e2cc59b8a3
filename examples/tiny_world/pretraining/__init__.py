"""The small Video-LLaMA of the package: its sizes, and the making of the parts that the real one takes pretrained."""
