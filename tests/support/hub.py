"""A small server that speaks the hub's protocol on loopback: what `huggingface_hub` asks for one repository."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

COMMIT = "3f2c1a" + "0" * 34


class Hub:
    """A repository `org/tiny` with branch `main` and one commit.

    Attributes:
        files: its content by name.
        kind: of the repository.
        licence: of its card; None for a repository without one.
        token: who asks without it is told there is nothing; None for a public one.
        cut_after: bytes after which answers with a file of weights break off, while there are any.
        stall_after: bytes after which they stop, with the connection open, while there are any.
        stalled: is set when one has.
        spoilt: whether weights come with one byte changed on the way.
        asked: method, path and range of every request, in order.
    """

    def __init__(self, files: Mapping[str, bytes], kind: Literal["models", "datasets"] = "models") -> None:
        self.files, self.kind = dict(files), kind
        self.licence: str | None = "apache-2.0"
        self.token: str | None = None
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.stalled = threading.Event()
        self.spoilt = False
        self.asked: list[tuple[str, str, str]] = []
        self.url = ""

    def info(self) -> dict[str, Any]:
        return {
            "id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "private": False, "gated": False, "disabled": False,
            "tags": [], "downloads": 0, "likes": 0, "cardData": {"license": self.licence} if self.licence else None,
            "siblings": [{"rfilename": name, "size": len(text)} for name, text in self.files.items()],
        }  # fmt: skip

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Files below a folder, and where it is not recursive the folders in it."""
        found: dict[str, dict[str, Any]] = {}
        for name, text in self.files.items():
            if name.startswith(folder):
                inside = name.removeprefix(folder)
                if "/" in inside and not recursive:
                    path = folder + inside.partition("/")[0]
                    found[path] = {"type": "directory", "path": path, "oid": "0" * 40}
                else:
                    found[name] = {"type": "file", "path": name, "size": len(text), "oid": etag(text)}
        return list(found.values())


def etag(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a model folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve until the end of the block."""

    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query.lower()
            home = "" if hub.kind == "models" else f"/{hub.kind}"
            hub.asked.append((self.command, path, self.headers.get("Range", "")))
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._json(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
            elif re.fullmatch(rf"/api/{hub.kind}/org/tiny(/revision/(main|{COMMIT}))?", path):
                self._json(200, hub.info())
            elif path.startswith(f"/api/{hub.kind}/org/tiny/revision/"):
                self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            elif found := re.fullmatch(rf"/api/{hub.kind}/org/tiny/tree/{COMMIT}(/.*)?", path):
                folder = f"{found[1].strip('/')}/" if found[1] else ""
                self._json(200, hub.tree(folder, recursive="recursive=true" in query))
            elif (name := path.removeprefix(f"{home}/org/tiny/resolve/{COMMIT}/")) in hub.files:
                self._file(name, body=body)
            elif "/resolve/" in path:
                self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            else:
                self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

        def _json(self, code: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
            text = json.dumps(content).encode()
            self.send_response(code)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(text))}.items():
                self.send_header(key, value)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        def _file(self, name: str, *, body: bool) -> None:
            content = hub.files[name]
            first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, "0"])[1])
            self.send_response(206 if first else 200)
            headers = {
                "ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes",
                "Content-Length": str(len(content) - first),
            }  # fmt: skip
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if not body:
                return
            if hub.stall_after is not None and name.endswith(".safetensors"):
                self.wfile.write(content[first : first + hub.stall_after])
                self.wfile.flush()
                hub.stalled.set()
                released.wait(60)
                self.close_connection = True
                return
            if hub.cut_after is not None and name.endswith(".safetensors"):
                self.wfile.write(content[first : first + hub.cut_after])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            if hub.spoilt and name.endswith(".safetensors"):
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.wfile.write(content[first:])

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        released.set()
        server.shutdown()
        server.server_close()
        thread.join()
