"""A generated world of moving shapes with sounds: clips, images and audio files with a complete ground truth.

`corpus.py` writes it to disk in the layouts that training reads; examples/tiny_world/README.md describes it. It does
not depend on models.
"""
