"""`python -m flows.local.prefect_server <port>`: Prefect's server behind a check of Host and Origin.

Prefect checks neither. Without it a page from elsewhere could reach the server through a name that resolves to the
loopback address, or open its event stream, since browsers let any page open a WebSocket.
"""

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tasks.loopback import reach_loopback_directly

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REFUSAL = b"Refused: this server answers its own page and local programs only.\n"


class OwnPageOnly:
    """ASGI application that passes a request on only when Host, and Origin where given, are this server's own."""

    def __init__(self, app: App, port: int) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "lifespan" or self._welcome(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(REFUSAL)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})

    def _welcome(self, scope: Scope) -> bool:
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == b"host"]
        origins = [value for name, value in headers if name == b"origin"]
        return len(hosts) == 1 and hosts[0] in self._hosts and all(origin in self._origins for origin in origins)


def main(arguments: list[str]) -> None:
    """Serve until told to end."""
    reach_loopback_directly()
    import uvicorn
    from prefect.server.api.server import create_app

    port = int(arguments[0])
    app: Any = create_app(final=True)
    uvicorn.run(OwnPageOnly(app, port), host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=3)


if __name__ == "__main__":
    main(sys.argv[1:])
