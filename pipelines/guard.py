"""What stands in front of the page: only its own host, no request from another site, and log-in that cannot be hurried.

A browser sends any page's requests to a server on the same machine; without this any web page could use this one.
"""

from __future__ import annotations

import hmac
import ipaddress
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
MAX_WRONG, WITHIN_SECONDS = 10, 60.0
# The page's own scripts are inline; nothing may come from, or go to, another host.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)


class Guard:
    """ASGI middleware: refuses foreign hosts and requests from other sites, and tells browsers to be strict.

    Args:
        app: what is guarded.
        hosts: names the page may be called by, without port; ("*",) for any.
        framed: whether other sites may show the page in a frame, as Spaces do.
    """

    def __init__(self, app: Any, hosts: Iterable[str], framed: bool = False) -> None:
        self.app, self.hosts = app, frozenset(host.lower() for host in hosts)
        ancestors = "" if framed else "; frame-ancestors 'self'"
        self.headers = [
            (b"content-security-policy", (POLICY + ancestors).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"cross-origin" if framed else b"same-origin"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self.why_not(scope)
        if refusal is not None:
            await _refuse(scope, send, *refusal)
            return

        async def strict_send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.headers]
            await send(message)

        await self.app(scope, receive, strict_send)

    def why_not(self, scope: Scope) -> tuple[int, str] | None:
        """(status, reason) where a request is refused."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if "*" not in self.hosts and _name_of(host) not in self.hosts:
            return 400, "this page is not served under that name"
        if scope["type"] == "http" and scope["method"] in SAFE_METHODS:
            return None
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "requests from other sites are refused"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "requests from other sites are refused"
        return None


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


def _name_of(host: str) -> str:
    """A host header without its port."""
    if host.startswith("["):
        return host[1:].split("]")[0].lower()
    return host.rsplit(":", 1)[0].lower() if host.count(":") == 1 else host.lower()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class LogIn:
    """Checks name and password; after `MAX_WRONG` wrong ones within a minute it refuses everything for as long.

    Args:
        user: the name.
        password: of at least 8 characters, so that guessing at that speed takes for ever.
    """

    def __init__(self, user: str, password: str) -> None:
        self._user, self._password = user.encode(), password.encode()
        self._wrong: deque[float] = deque(maxlen=MAX_WRONG)
        self._lock = threading.Lock()

    def __call__(self, user: str, password: str) -> bool:
        with self._lock:
            now = time.monotonic()
            if len(self._wrong) == MAX_WRONG and now - self._wrong[0] < WITHIN_SECONDS:
                return False
            right_user = hmac.compare_digest(user.encode(), self._user)
            if hmac.compare_digest(password.encode(), self._password) and right_user:
                return True
            self._wrong.append(now)
            return False
