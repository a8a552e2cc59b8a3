"""Connections that keep a server waiting: the heads and the bodies of requests must arrive in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["BODY_SECONDS", "HEAD_SECONDS", "SlowHeads", "in_time"]

HEAD_SECONDS = 20.0
"""For the head of a request, from the first sight of its connection on."""

BODY_SECONDS = 60.0
"""Between two pieces of the body of a request."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class SlowHeads:
    """Close connections on which no request comes to the end of its head: uvicorn waits for ever.

    Call `sweep` now and then, from any thread.
    """

    def __init__(self) -> None:
        self._since: dict[Any, float] = {}

    def sweep(self, server: Any) -> None:
        """Close what has waited for too long; `server` is uvicorn's."""
        now, since = time.monotonic(), {}
        for connection in list(server.server_state.connections):
            # The cycle of a request and its answer begins with a whole head.
            if connection.cycle is not None and not connection.cycle.response_complete:
                continue
            since[connection] = self._since.get(connection, now)
            if now - since[connection] >= HEAD_SECONDS:
                connection.loop.call_soon_threadsafe(connection.transport.close)
        self._since = since


def in_time(receive: Receive) -> Receive:
    """Return what receives the pieces of a request, and raises `asyncio.TimeoutError` if one does not come."""
    is_complete = False

    async def receive_in_time() -> MutableMapping[str, Any]:
        nonlocal is_complete
        # Then only the end of the connection is waited for, while the answer is computed.
        if is_complete:
            return await receive()
        message = await asyncio.wait_for(receive(), BODY_SECONDS)
        is_complete = not message.get("more_body", False)
        return message

    return receive_in_time
