"""A hub on this machine: as much of its HTTP interface as uploading and downloading a model takes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

SHA = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_writer":
            return self._answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return self._answer({"url": f"{self._address()}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        name, action = re.fullmatch(r"/api/models/(\w+/[\w-]+)/(\w+)/main", self.path.split("?")[0]).groups()
        if action == "preupload":
            files = json.loads(body)["files"]
            kinds = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._answer({"files": kinds})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self._answer({"commitUrl": f"{self._address()}/{name}/commit/{SHA}", "commitOid": SHA, "success": True})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        info = re.match(r"/api/models/(\w+/[\w-]+)(?:/revision/\w+)?$", path)
        if info and info[1] in self.repositories:
            files = [_sibling(name, content) for name, content in self.repositories[info[1]].items()]
            return self._answer({"id": info[1], "modelId": info[1], "sha": SHA, "siblings": files, "tags": []})
        tree = re.match(r"/api/models/(\w+/[\w-]+)/tree/\w+(/.+)?$", path)
        if tree and not tree[2] and tree[1] in self.repositories:
            sizes = {name: len(content) for name, content in self.repositories[tree[1]].items()}
            return self._answer([{"type": "file", "path": n, "size": size, "oid": SHA} for n, size in sizes.items()])
        file = re.match(r"/(\w+/[\w-]+)/resolve/\w+/(.+)$", path)
        content = self.repositories.get(file[1], {}).get(file[2]) if file else None
        if content is None:
            missing = "EntryNotFound" if file or tree else "RepoNotFound"
            return self._answer({"error": "not found"}, 404, X_Error_Code=missing, X_Repo_Commit=SHA)
        return self._answer(content, X_Repo_Commit=SHA, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET

    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def log_message(self, *_: Any) -> None:
        pass


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    """A file as the hub lists it: large ones, and all weights are, have a checksum."""
    found: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": SHA}
    if name.endswith((".pth", ".safetensors", ".bin")):
        digest = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
    return found


@contextmanager
def fake_hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Serve a hub; its address, and the files of its repositories. It lets the token "hf_writer" write."""
    repositories: dict[str, dict[str, bytes]] = {}
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", repositories
    finally:
        server.shutdown()
        server.server_close()
