"""The process that serves: where it listens, how it begins and how it ends."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Mapping, Sequence
from types import FrameType

import uvicorn

from flows.serving.app import make_app
from flows.serving.limits import Limits
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.serving.served import Served

LAST_WORDS_S = 5.0
"""After the grace: time for the errors that unfinished requests get to be sent."""


class ModelServer(uvicorn.Server):
    """Says where it is when it is ready; going down, requests under way have their time, and then an error."""

    def __init__(self, config: uvicorn.Config, models: Sequence[Served], limits: Limits, ready: str) -> None:
        super().__init__(config)
        self._models, self._limits, self._ready = models, limits, ready
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note that it was Ctrl-C: a shell that starts programs in the background has them ignore it afterwards."""
        self.interrupted = self.interrupted or sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        print(self._ready, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, let those that are there come to their end, or end them."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._limits.grace_s, lambda: loop.run_in_executor(None, self._close))
        await super().shutdown(sockets)
        timer.cancel()

    def _close(self) -> None:
        for model in self._models:
            model.close()


def make_server(models: Mapping[str, Served], limits: Limits, keys: Sequence[str], address: str) -> ModelServer:
    """A server that has not begun.

    Args:
        models: by every name that they have.
        address: of its socket, to be shown.
    """
    served = list(dict.fromkeys(models.values()))
    config = uvicorn.Config(
        make_app(models, limits, keys),
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(limits.grace_s + LAST_WORDS_S),
    )
    names = ", ".join(model.name for model in served)
    return ModelServer(config, served, limits, f"{names}: http://{address}/v1")


def run_server(models: Mapping[str, Served], limits: Limits, keys: Sequence[str], listener: socket.socket) -> None:
    """Serve until a signal ends it; the signal is then raised again, for whoever called.

    Args:
        listener: see `listen`.
    """
    try:
        server = make_server(models, limits, keys, shown(listener))
        server.run(sockets=[listener])
        if server.interrupted:
            raise KeyboardInterrupt
    finally:
        for model in models.values():
            model.close()


def shown(listener: socket.socket) -> str:
    """Host and port of a socket as they stand in an address."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address.

    Raises:
        EnvironmentProblem: it is taken, or is none of this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise EnvironmentProblem(
            f"{host}:{port}: cannot listen there ({error.strerror or error}). Fix: another --port, or --port 0 for any"
        ) from None


def check_exposure(host: str, keys: Sequence[str]) -> None:
    """Refuse to listen beyond loopback without a key.

    Raises:
        ConfigError: that is asked for.
    """
    if not keys and not is_loopback_address(host):
        raise ConfigError(
            f"--host {host}: others can reach it, and there is no key. Fix: RLHF_API_KEY in the environment or "
            "--api-key-file FILE, with TLS before it; or --host 127.0.0.1"
        )


def is_loopback_address(host: str) -> bool:
    """Whether nobody on another machine reaches a server there; `0.0.0.0` is every address, and so not one."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
