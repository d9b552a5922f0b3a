"""This machine's own addresses are never asked through a proxy, whichever HTTP client asks.

urllib, requests (MLflow), httpx and websockets (Prefect) and aiohttp (DVC) all take proxies from the environment, and
all heed `NO_PROXY` there. A proxy cannot reach our loopback address, so a server that is well would look dead.
"""

import ipaddress
import os
import socket
import urllib.request
from collections.abc import Iterator, MutableMapping
from importlib.util import find_spec
from urllib.parse import urlsplit

OWN_NAMES = ("127.0.0.1", "localhost", "::1")
EXCEPTIONS = ("no_proxy", "NO_PROXY")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
ADDRESSES = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")


def reach_loopback_directly(environment: MutableMapping[str, str] | None = None) -> list[str]:
    """Except this machine's own addresses from every proxy, for this process and the ones it starts.

    What the user excepts stays excepted. Prefect's client takes up every proxy before it asks anything, so one that it
    cannot use at all (`socks://`, a port that is no number) would keep it from our own server too; such a variable is
    left out.

    Args:
        environment: is changed; `os.environ` unless given.

    Returns:
        One line for each variable that was left out.
    """
    env = os.environ if environment is None else environment
    named = sorted((name for name in env if name.lower() == "no_proxy"), reverse=True)  # clients read any case
    given = [host.strip() for name in named for host in env[name].split(",")]
    if "*" not in given:  # which excepts every address, and only while it stands alone
        # httpx takes an IPv6 address without brackets only
        kept = [_without_brackets(host) for host in given if host]
        own = [*OWN_NAMES, *(host for name in ADDRESSES if (host := _host(env.get(name, ""))) and _is_own(host))]
        exceptions = ",".join(dict.fromkeys([*kept, *own]))
        env.update(dict.fromkeys(EXCEPTIONS, exceptions))
    else:
        env.update(dict.fromkeys(EXCEPTIONS, "*"))
    return list(_leave_out_unusable(env))


def _leave_out_unusable(env: MutableMapping[str, str]) -> Iterator[str]:
    for name in [name for name in env if name.lower() in PROXIES]:
        problem = _why_unusable(env.get(name, ""))
        if problem:
            del env[name]
            yield f"{name}: {problem}; it is left out here. Fix: an http:// proxy, or unset it"


def _why_unusable(proxy: str) -> str:
    """Why Prefect's HTTP client could not even start with this proxy; empty where it can."""
    if not proxy:
        return ""
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError as error:
        return str(error)
    if parts.scheme in ("socks5", "socks5h"):
        return "" if find_spec("socksio") else "a SOCKS proxy needs the package socksio"
    return "" if parts.scheme in ("http", "https") else f"no client here speaks {parts.scheme}://"


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine's own address."""
    return _is_own(_host(url))


def open_url(url: str, timeout_s: float) -> int:
    """Status of a plain GET; no proxy is asked for this machine's own address.

    Raises:
        OSError: nothing answers.
    """
    handlers = [urllib.request.ProxyHandler({})] if is_loopback(url) else []
    with urllib.request.build_opener(*handlers).open(url, timeout=timeout_s) as answer:
        return int(answer.status)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_own(host: str) -> bool:
    """Whether a name or address is this machine's, however it is written: `127.1`, `localhost.`, `0.0.0.0`."""
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(name))  # short forms, which clients take too
        except OSError:
            return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback or address.is_unspecified


def _without_brackets(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host
