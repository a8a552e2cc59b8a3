"""Build modules without filling them: the import path that scripts for the original use."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

__all__ = ["disable_torch_init"]

_SKIPPED_LAYERS = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d, nn.Conv3d)


class disable_torch_init(contextlib.AbstractContextManager[None]):
    """Skip the default random initialisation of layers that a checkpoint fills anyway.

    Works as `with disable_torch_init(): …` and only inside the block, so that no other module is left
    uninitialised. The bare call `disable_torch_init()`, as scripts for the original write it, changes nothing:
    the loaders of this package never initialise weights that they load.
    """

    def __enter__(self) -> None:
        self._saved = {layer: layer.reset_parameters for layer in _SKIPPED_LAYERS}
        for layer in _SKIPPED_LAYERS:
            layer.reset_parameters = lambda self: None  # type: ignore[method-assign]

    def __exit__(self, *exception: Any) -> None:
        for layer, reset_parameters in self._saved.items():
            layer.reset_parameters = reset_parameters  # type: ignore[method-assign]
