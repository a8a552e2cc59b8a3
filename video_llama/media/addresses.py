"""Download a media file from an address of the web: only if the user allowed it, within limits.

A server of its own network may trust whoever can reach it, so an address that somebody else chose must not lead there:
only addresses of the public internet are connected to. The name is looked up once, all that it stands for is checked,
and the connection goes to the very address that was checked. Redirections are checked like the first address.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import IO
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from video_llama.errors import MediaError
from video_llama.media.reasons import describe_error

__all__ = ["DownloadLimits", "download", "is_public", "resolve"]

_CHUNK_BYTES = 1 << 16
_REDIRECTIONS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
# Addresses of version 6 that stand for one of version 4, which could be any: mapped, translated (NAT64), 6to4, Teredo.
_STANDING_FOR_OTHERS = tuple(
    map(ipaddress.IPv6Network, ("::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))
)
_SAFE = "/%:@!$&'()*+,;=~-._"
_BY_HAND = "download it yourself, and give the file"


@dataclass(frozen=True)
class DownloadLimits:
    """How much one download may take."""

    max_bytes: int = 2_000_000_000
    connect_seconds: float = 10.0
    # Of the whole download, redirections included.
    total_seconds: float = 600.0
    max_redirections: int = 5


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and stands for no other."""
    try:
        # A scope behind % is of a link-local address.
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.is_site_local or any(parsed in network for network in _STANDING_FOR_OTHERS):
            return False
    elif parsed in ipaddress.IPv4Network("192.88.99.0/24"):
        # Relays of 6to4.
        return False
    is_special = parsed.is_private or parsed.is_loopback or parsed.is_link_local or parsed.is_multicast
    return parsed.is_global and not is_special and not parsed.is_reserved and not parsed.is_unspecified


def resolve(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host; `OSError` or `UnicodeError` if there are none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def download(address: str, file: IO[bytes], limits: DownloadLimits | None = None) -> None:
    """Write what an http or https address holds into a file, and flush it.

    Proxies of the environment are not used, as the address could not be checked; cookies and passwords are not sent.

    Raises:
        MediaError: the address is not of the public internet, does not answer in time, or holds nothing or too much.
    """
    limits = limits or DownloadLimits()
    deadline = time.monotonic() + limits.total_seconds
    current = address
    for _ in range(limits.max_redirections + 1):
        parts = _split(address, current)
        try:
            with _request(address, parts, limits, deadline) as response:
                if response.status not in _REDIRECTIONS:
                    _save(address, response, file, limits, deadline)
                    return
                current = urljoin(current, response.headers.get("Location", ""))
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                reason = f"the download took longer than {limits.total_seconds:.0f} seconds"
                raise MediaError(address, reason, _BY_HAND) from error
            raise MediaError(address, f"cannot be downloaded: {describe_error(error)}", _BY_HAND) from error
        if parts.scheme == "https" and not current.lower().startswith("https:"):
            raise MediaError(address, "redirected from https to an address without it", _BY_HAND)
    raise MediaError(address, f"redirected more than {limits.max_redirections} times", _BY_HAND)


def _split(address: str, current: str) -> SplitResult:
    """Return the parts of an address that may be asked.

    Raises:
        MediaError: it has another scheme, no host, or a password in it.
    """
    try:
        parts = urlsplit(current)
        port = parts.port
    except ValueError as error:
        raise MediaError(address, f"not a valid address: {error}") from error
    if parts.scheme not in _PORTS or not parts.hostname or port == 0:
        raise MediaError(address, "not an address of http or https", _BY_HAND)
    if parts.username is not None or parts.password is not None:
        raise MediaError(address, "an address with a user's name in it", _BY_HAND)
    if any(character <= " " or character == "\x7f" for character in current):
        raise MediaError(address, "an address with white space in it", "quote it: %20 stands for a space")
    return parts


@contextmanager
def _request(
    address: str, parts: SplitResult, limits: DownloadLimits, deadline: float
) -> Iterator[http.client.HTTPResponse]:
    """Ask for an address, at the IP address that was checked."""
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    connection = _connect(address, host, port, limits)
    client = http.client.HTTPConnection(host, port, timeout=limits.connect_seconds)
    if parts.scheme == "https":
        client = http.client.HTTPSConnection(host, port, timeout=limits.connect_seconds)
        context = ssl.create_default_context()
        connection = context.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
    # With a connection of its own, the client makes none.
    client.sock = connection
    # Each wait is short, but a server may make very many of them.
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, [connection])
    timer.daemon = True
    timer.start()
    try:
        with closing(connection), closing(client):
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            headers = {"User-Agent": "video_llama", "Accept-Encoding": "identity", "Connection": "close"}
            client.request("GET", _target(parts), headers=headers)
            with client.getresponse() as response:
                yield response
    finally:
        timer.cancel()


def _target(parts: SplitResult) -> str:
    """Return what is asked of the server; what is quoted already stays so."""
    target = quote(parts.path, safe=_SAFE) or "/"
    if parts.query:
        target += "?" + quote(parts.query, safe=_SAFE + "?")
    return target


def _connect(address: str, host: str, port: int, limits: DownloadLimits) -> socket.socket:
    """Connect to a host of the public internet.

    Raises:
        MediaError: the host is unknown, or not of the public internet.
        OSError: it does not answer.
    """
    try:
        found = resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise MediaError(address, f"the host {host} is not known: {describe_error(error)}") from error
    # One that is not public is enough: which of them answers could be the other side's choice.
    if not found or not all(map(is_public, found)):
        reason = f"the host {host} is not on the public internet"
        raise MediaError(address, reason, "addresses of this machine and of private networks are refused")
    failure: OSError = OSError("it does not answer")
    for candidate in found:
        try:
            return socket.create_connection((candidate, port), limits.connect_seconds)
        except OSError as error:
            failure = error
    raise failure


def _save(
    address: str, response: http.client.HTTPResponse, file: IO[bytes], limits: DownloadLimits, deadline: float
) -> None:
    """Write the body of an answer.

    Raises:
        MediaError: it is no success, too large, or shorter than it says.
    """
    if response.status != http.client.OK:
        raise MediaError(address, f"the server answers {response.status} {response.reason}", _BY_HAND)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise MediaError(address, "the server sends it compressed", _BY_HAND)
    declared = response.length
    too_large = MediaError(address, f"larger than {limits.max_bytes / 1e6:.0f} MB", _BY_HAND)
    if declared is not None and declared > limits.max_bytes:
        raise too_large
    total = 0
    # One wait for each piece: the deadline is looked at between them.
    while piece := response.read1(_CHUNK_BYTES):
        total += len(piece)
        if total > limits.max_bytes:
            raise too_large
        if time.monotonic() >= deadline:
            raise TimeoutError("it takes too long")
        file.write(piece)
    if time.monotonic() >= deadline:
        raise TimeoutError("it takes too long")
    if declared is not None and total < declared:
        raise MediaError(address, f"the download broke off: {total} of {declared} bytes came", "try it again")
    file.flush()


def _shut(connection: socket.socket) -> None:
    """End the waiting of a thread that reads from a connection."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It is closed already.
        return
