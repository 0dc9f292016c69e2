"""What other sites show beside a link to the page: title, description and picture instead of Gradio's own."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

TITLE = "attngen"
ABOUT = "Image generation with attention at linear cost: drag the mediators, see what they change and save."
PATH = "/card.png"
# Gradio writes its own name and picture into the page, and has no argument for them.
TAG = re.compile(rb'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>\s*')


class Card:
    """ASGI middleware: puts the tags into the page, and serves the picture.

    Args:
        app: the page.
        picture: PNG file, 1200 x 630 pixels.
    """

    def __init__(self, app: Any, picture: Path) -> None:
        self.app, self.picture = app, picture.read_bytes() if picture.is_file() else b""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] not in ("/", PATH):
            await self.app(scope, receive, send)
        elif scope["path"] == PATH:
            headers = [(b"content-type", b"image/png"), (b"content-length", b"%d" % len(self.picture))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": self.picture})
        else:
            await self._page(scope, receive, send)

    async def _page(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        start: dict[str, Any] = {}
        body = bytearray()

        async def hold(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            headers = {name.lower(): value for name, value in start["headers"]}
            content = bytes(body)
            if headers.get(b"content-type", b"").startswith(b"text/html") and b"content-encoding" not in headers:
                content = TAG.sub(b"", content).replace(b"</head>", tags(scope) + b"</head>", 1)
            kept = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
            await send({**start, "headers": [*kept, (b"content-length", b"%d" % len(content))]})
            await send({"type": "http.response.body", "body": content})

        await self.app(scope, receive, hold)


def tags(scope: MutableMapping[str, Any]) -> bytes:
    """The tags for the address that was asked for; a host that is none is left out."""
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    scheme = headers.get(b"x-forwarded-proto", scope.get("scheme", "http").encode()).decode("latin-1")
    safe = re.fullmatch(r"[\w.:\[\]-]+", host) and scheme in ("http", "https")
    picture = f"{scheme}://{host}{PATH}" if safe else PATH
    named = {"og:type": "website", "og:title": TITLE, "og:description": ABOUT, "og:image": picture}
    twitter = {"twitter:card": "summary_large_image", "description": ABOUT}
    told = [f'<meta property="{name}" content="{value}">' for name, value in named.items()]
    told += [f'<meta name="{name}" content="{value}">' for name, value in twitter.items()]
    return "".join(told).encode()
