"""Bulk captioning on a cluster of Ray: decoding on all CPUs, a model on each GPU, one file of captions.

The driver (`driver.py`) is the only one that knows what is done: it hands out clips, takes captions back and writes
them. Decoding is done by tasks (`decoding.py`), captioning by actors (`captioner.py`). Any of their processes, and any
node but the driver's, may be lost at any time; what it had is done again elsewhere.
"""
