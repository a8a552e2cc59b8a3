"""Whether an address can be had, found out before the model is loaded, and said in words for people."""

from __future__ import annotations

import errno
import os
import socket

from video_llama.errors import VideoLlamaError

__all__ = ["check_address"]


def check_address(host: str, port: int | None) -> None:
    """Whether the page can be served at an address.

    Args:
        host: a name or a number.
        port: None for whichever is free.

    Raises:
        VideoLlamaError: no such host, not this machine's, or the port is taken or not for everybody.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise VideoLlamaError(f"--host {host}: no such host") from error
    try:
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # elsewhere this would share a port that is in use
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"--port {port}: something else is served there; choose another, or leave it out"
        elif isinstance(error, PermissionError):
            message = f"--port {port}: not for you; choose one above 1023"
        elif error.errno == errno.EADDRNOTAVAIL:
            message = f"--host {host}: not an address of this machine"
        else:
            message = f"--host {host}: the page cannot be served there: {error.strerror}"
        raise VideoLlamaError(message) from error
