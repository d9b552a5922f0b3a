"""A small server that speaks the hub's protocol on loopback: what `huggingface_hub` asks for one repository.

It takes a repository too: made, its files named, the large ones put by LFS, and committed.
"""

import base64
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
        commit: the one that `main` stands for.
        exists: whether the repository is there; one that is not can be made.
        visibility: as it was asked for when it was made.
        writer: token that may write; None for everybody.
        objects: large files that were put, by SHA-256.
        large: SHA-256 of files that were put by LFS, by name.
        branches: made beside `main`; all stand for the same commit.
        messages: of the commits that were taken.
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
        self.commit, self.exists, self.visibility = COMMIT, True, ""
        self.writer: str | None = None
        self.objects: dict[str, bytes] = {}
        self.large: dict[str, str] = {}
        self.branches: list[str] = []
        self.messages: list[str] = []

    def take(self, lines: list[dict[str, Any]]) -> str:
        """One commit: all of its files, or an error before any."""
        files, large = dict(self.files), dict(self.large)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                    large.pop(value["path"], None)
                case "lfsFile":
                    files[value["path"]], large[value["path"]] = self.objects[value["oid"]], value["oid"]
                case "deletedFile":
                    del files[value["path"]]
        head = lines[0]["value"]
        if head.get("parentCommit", self.commit) != self.commit:
            raise KeyError("parentCommit")
        self.files, self.large = files, large
        self.messages.append(head["summary"])
        names = "".join(f"{name}{etag(files[name])}" for name in sorted(files))
        self.commit = hashlib.sha1((self.commit + names).encode(), usedforsecurity=False).hexdigest()
        return self.commit

    def etag(self, name: str) -> str:
        """What names a file's content: SHA-256 of a large one, and else what git calls it."""
        return self.large.get(name) or etag(self.files[name])

    def info(self) -> dict[str, Any]:
        return {
            "id": "org/tiny", "modelId": "org/tiny", "sha": self.commit,
            "private": self.visibility == "private", "gated": False, "disabled": False,
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
                    found[name] = {"type": "file", "path": name, "size": len(text), "oid": etag(text)} | self._lfs(name)
        return list(found.values())

    def _lfs(self, name: str) -> dict[str, Any]:
        if name not in self.large:
            return {}
        return {"lfs": {"oid": self.large[name], "size": len(self.files[name]), "pointerSize": 134}}


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

        def do_POST(self) -> None:
            path, content = unquote(urlsplit(self.path).path), self.rfile.read(self._length())
            hub.asked.append((self.command, path, ""))
            if path == "/api/validate-yaml":
                self._json(200, {"errors": [], "warnings": []})
            elif hub.writer and self.headers.get("Authorization") != f"Bearer {hub.writer}":
                self._json(403, {"error": "You don't have the rights to write"})
            elif path == "/api/repos/create":
                self._create(json.loads(content))
            elif not hub.exists:
                self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            elif path.startswith("/api/models/org/tiny/branch/"):
                hub.branches.append(path.rpartition("/")[2])
                self._json(200, {})
            elif path.startswith("/api/models/org/tiny/preupload/"):
                files = [self._mode(file) for file in json.loads(content)["files"]]
                self._json(200, {"files": files})
            elif path == "/org/tiny.git/info/lfs/objects/batch":
                objects = [self._slot(one) for one in json.loads(content)["objects"]]
                self._json(200, {"transfer": "basic", "objects": objects})
            elif path.startswith("/api/models/org/tiny/commit/"):
                self._commit([json.loads(line) for line in content.splitlines()])
            else:
                self._json(404, {"error": "no such thing"})

        def do_PUT(self) -> None:
            content = self.rfile.read(self._length())
            hub.asked.append((self.command, urlsplit(self.path).path, ""))
            hub.objects[self.path.rpartition("/")[2]] = content
            self._json(200, {})

        def _length(self) -> int:
            return int(self.headers.get("Content-Length") or 0)

        def _create(self, asked: Mapping[str, Any]) -> None:
            if hub.exists:
                self._json(409, {"error": "You already created this model repo"})
                return
            hub.exists, hub.visibility, hub.files = True, asked.get("visibility", ""), {}
            hub.files[".gitattributes"] = b"*.safetensors filter=lfs\n"
            self._json(200, {"url": f"{hub.url}/org/tiny"})

        def _mode(self, file: Mapping[str, Any]) -> dict[str, Any]:
            mode = "lfs" if file["path"].endswith((".safetensors", ".gguf", ".onnx")) else "regular"
            oid = etag(hub.files[file["path"]]) if file["path"] in hub.files else None
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        def _slot(self, one: Mapping[str, Any]) -> dict[str, Any]:
            place = {"href": f"{hub.url}/lfs/{one['oid']}"}
            return {"oid": one["oid"], "size": one["size"], "actions": {"upload": place}}

        def _commit(self, lines: list[dict[str, Any]]) -> None:
            try:
                made = hub.take(lines)
            except KeyError as error:
                self._json(412, {"error": f"lacks {error}"})
                return
            self._json(200, {"commitUrl": f"{hub.url}/org/tiny/commit/{made}", "commitOid": made})

        def _answer(self, *, body: bool) -> None:
            path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query.lower()
            home = "" if hub.kind == "models" else f"/{hub.kind}"
            known = "|".join(["main", hub.commit, *hub.branches])
            hub.asked.append((self.command, path, self.headers.get("Range", "")))
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._json(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
            elif not hub.exists:
                self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            elif re.fullmatch(rf"/api/{hub.kind}/org/tiny(/revision/({known}))?", path):
                self._json(200, hub.info())
            elif path.startswith(f"/api/{hub.kind}/org/tiny/revision/"):
                self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            elif found := re.fullmatch(rf"/api/{hub.kind}/org/tiny/tree/({known})(/.*)?", path):
                folder = f"{found[2].strip('/')}/" if found[2] else ""
                self._json(200, hub.tree(folder, recursive="recursive=true" in query))
            elif (name := path.removeprefix(f"{home}/org/tiny/resolve/{hub.commit}/")) in hub.files:
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
                "ETag": f'"{hub.etag(name)}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes",
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
