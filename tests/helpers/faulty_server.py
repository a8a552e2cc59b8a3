"""A server on this machine that stands for an object store: it knows ranges, and fails as the test says.

It also answers as S3 does to a client with its address as endpoint: folders are buckets, and a bucket can be listed.
"""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

Fault = Literal["500", "hang", "cut"]
HANG_SECONDS = 3.0


class FaultyServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        faults: by file name, what happens to its next requests for content.
        always: by file name, what happens to all of them.
        requests: by file name, the number of requests for content.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.requests: dict[str, int] = defaultdict(int)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        address = urlsplit(self.path)
        path = self.server.folder / address.path.lstrip("/")
        if path.is_dir() and "list-type" in (query := parse_qs(address.query)):
            self._list(path, query.get("prefix", [""])[0])
            return
        if not path.is_file():
            self.send_error(404)
            return
        fault: Fault | None = None
        if with_content:
            self.server.requests[path.name] += 1
            fault = self.server.always.get(path.name)
            if self.server.faults[path.name]:
                fault = self.server.faults[path.name].pop(0)
        if fault == "500":
            self.send_error(500)
            return
        if fault == "hang":
            time.sleep(HANG_SECONDS)
        content = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        piece = content
        self.send_response(206 if asked else 200)
        if asked:
            start, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            piece = content[start : last + 1]
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if fault == "cut":
            self.wfile.write(piece[: len(piece) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        elif with_content:
            self.wfile.write(piece)

    def _list(self, bucket: Path, prefix: str) -> None:
        """Answer as S3's ListObjectsV2 does, without folders in it."""
        keys = {path.relative_to(bucket).as_posix(): path.stat() for path in bucket.rglob("*") if path.is_file()}
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{stat.st_size}</Size><ETag>&quot;{stat.st_mtime_ns}&quot;</ETag>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for key, stat in sorted(keys.items())
            if key.startswith(prefix)
        )
        name, xmlns = escape(bucket.name), "http://s3.amazonaws.com/doc/2006-03-01/"
        body = f"<ListBucketResult xmlns='{xmlns}'><Name>{name}</Name><IsTruncated>false</IsTruncated>{contents}"
        content = f"<?xml version='1.0' encoding='UTF-8'?>{body}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
