"""The small Video-LLaMA of the package: its sizes, and the training of its pretrained parts."""
