"""Give back what the server holds of pages that were closed."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from typing import Any

__all__ = ["ClosedPages", "return_memory"]

_PARTING_SECONDS = 10.0
"""Gradio runs what belongs to the closing of a page after it has called it closed, and would make its record anew, as
that of an open page, if it were forgotten before."""


class ClosedPages:
    """What Gradio keeps of pages that were closed, all they showed: it would for as long as the server runs.

    Args:
        holder: Gradio's `StateHolder` of the running app.
    """

    def __init__(self, holder: Any) -> None:
        self._holder = holder
        self._seen: dict[str, float] = {}

    def forget(self) -> int:
        """Forget those that have been closed for a while; how many they were."""
        now = time.monotonic()
        closed = [key for key, state in list(self._holder.session_data.items()) if state.is_closed]
        self._seen = {key: self._seen.get(key, now) for key in closed}
        parted = [key for key, since in self._seen.items() if now - since >= _PARTING_SECONDS]
        with self._holder.lock:
            for key in parted:
                self._holder.session_data.pop(key, None)
                self._holder.time_last_used.pop(key, None)
        return len(parted)


def return_memory() -> None:
    """Give what ended sessions held back to the system; glibc would keep it for later."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
