"""A generated world of moving shapes with sounds: clips, pictures and sounds of which everything is known.

`corpus.py` writes it to disk in the layouts that training reads; docs/clipworld.md describes it. Knows nothing of
models or of the rest of the package.
"""
