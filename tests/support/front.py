"""A front before a local server, as a gateway is in the world: it passes on what it is asked, or answers 503 first."""

import re
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WRITES = ("POST", "PUT", "PATCH", "DELETE")
IDS = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")
OF_ONE_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class BusyFront(ThreadingHTTPServer):
    """Answers 503 to the n-th write of a kind where `busy(kind, n)`; everything else goes through.

    Attributes:
        seen: writes by kind: method and path, ids in it left out.
        refused: those of them that were answered 503.
    """

    daemon_threads = True

    def __init__(self, target: int, busy: Callable[[str, int], bool]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.busy = target, busy
        self.seen: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def refuses(self, method: str, path: str) -> bool:
        if method not in WRITES:
            return False
        kind = f"{method} {IDS.sub('ID', path)}"
        with self._counting:
            self.seen[kind] += 1
            refused = self.busy(kind, self.seen[kind])
            self.refused[kind] += refused
            return refused


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BusyFront

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses(self.command, self.path):
            self._answer(503, [("Retry-After", "0.05")], b"busy")
        elif self.headers.get("Upgrade"):
            self._tunnel()
        else:
            there = HTTPConnection("127.0.0.1", self.server.target, timeout=60)
            there.request(self.command, self.path, body, self._headers())
            answer = there.getresponse()
            self._answer(answer.status, answer.getheaders(), answer.read())
            there.close()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on

    def log_message(self, *arguments: object) -> None:
        """Nothing."""

    def _headers(self) -> dict[str, str]:
        return dict(self.headers.items()) | {"Host": f"127.0.0.1:{self.server.target}"}

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in OF_ONE_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _tunnel(self) -> None:
        """A WebSocket: both sides' bytes as they are."""
        self.close_connection = True
        with socket.create_connection(("127.0.0.1", self.server.target)) as there:
            head = "".join(f"{name}: {value}\r\n" for name, value in self._headers().items())
            there.sendall(f"GET {self.path} HTTP/1.1\r\n{head}\r\n".encode())
            sides = {there: self.connection, self.connection: there}
            while True:
                for side in select.select(list(sides), [], [])[0]:
                    try:
                        got = side.recv(65536)
                        sides[side].sendall(got)
                    except OSError:
                        return
                    if not got:
                        return


@contextmanager
def busy_front(target: int, busy: Callable[[str, int], bool]) -> Iterator[BusyFront]:
    """A front before the server at port `target` of this machine."""
    front = BusyFront(target, busy)
    threading.Thread(target=front.serve_forever, daemon=True).start()
    try:
        yield front
    finally:
        front.shutdown()
        front.server_close()
