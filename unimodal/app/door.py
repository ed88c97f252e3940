"""Who may ask the page for what: this machine's own browser, for pictures of this machine, in requests of a bounded size.

A page of another site may send requests to 127.0.0.1 too, by a name of its own that it lets point there (DNS rebinding) or across origins.
So a request is answered when it names this machine and comes from the page itself. gradio would fetch a picture whose address it is given
in place of an upload; such a request is refused before gradio reads it, and no name is looked up.
"""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HOST = "127.0.0.1"
NAMES = (HOST, "localhost", "[::1]")
UPLOAD = 64 << 20  # bytes of the pictures in one request
WORDS = 1 << 20  # bytes of any other request
TOO_LARGE = f"a request is larger than the maximum allowed size of {UPLOAD >> 20} MB for pictures"  # gradio looks for some of these words
UPLOADS = "/gradio_api/upload"
# What the page posts to; gradio has more, among them what records sound or edits the page.
POSTED = re.compile(r"/gradio_api/(upload|queue/join|cancel|reset|(run|api|call)/[\w/]+)/?")
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"  # gradio's page runs scripts of its own


class Refused(Exception):
    """A request that is not answered: with which status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Door:
    """ASGI middleware that refuses what the page has no use for, and sends the content security policy with every answer.

    Args:
        app: what answers the other requests.
        too_large: makes the exception by which `app` ends an upload of which more arrives than is allowed.
    """

    def __init__(self, app: Any, too_large: Callable[[str], Exception]) -> None:
        self.app, self.too_large = app, too_large

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            check_origin(scope)
            await self.app(scope, await self._checked(scope, receive), with_policy)
        except Refused as refusal:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await with_policy({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await with_policy({"type": "http.response.body", "body": refusal.reason.encode()})

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """What hands on the body of a request: of an upload piece by piece, of any other once all of it was looked at.

        Raises:
            Refused: the body is too large, or names an address.
        """
        check_path(scope)
        upload = scope["path"].rstrip("/") == UPLOADS
        limit = UPLOAD if upload else WORDS
        length = b"".join(header(scope, b"content-length"))
        if length and (not length.isdigit() or int(length) > limit):
            raise Refused(413, TOO_LARGE)
        if upload:
            return self._counting(receive, limit)
        body, more = b"", scope["method"] not in ("GET", "HEAD")
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > limit:
                raise Refused(413, TOO_LARGE)
        check_links(body, b"".join(header(scope, b"host")).decode("latin-1"))
        first = iter([{"type": "http.request", "body": body, "more_body": False}] if body else [])

        async def again() -> Message:
            return next(first, None) or await receive()

        return again

    def _counting(self, receive: Receive, limit: int) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise self.too_large(TOO_LARGE)
            return message

        return counted


def header(scope: Scope, name: bytes) -> list[bytes]:
    """The values of a header; there may be several."""
    return [value for key, value in scope["headers"] if key == name]


def check_origin(scope: Scope) -> None:
    """Refuse a request that names another host than this machine, or that a page of another origin sends."""
    hosts = [host.decode("latin-1").lower() for host in header(scope, b"host")]
    if len(hosts) != 1 or re.sub(r":\d+$", "", hosts[0]) not in NAMES:
        raise Refused(403, f"this page is served on this machine alone, as http://{HOST}")
    for origin in header(scope, b"origin"):
        if origin.decode("latin-1").lower() not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
            raise Refused(403, "this page takes requests from itself alone")


def check_path(scope: Scope) -> None:
    """Refuse a request for something of another address, or to something that the page does not use."""
    path, method = scope["path"], scope["method"]
    if re.search(r"https?:/|/proxy=", path, re.IGNORECASE):
        raise Refused(403, "this page fetches nothing from other addresses")
    if method not in ("GET", "HEAD", "OPTIONS") and not (method == "POST" and POSTED.fullmatch(path)):
        raise Refused(404, "the page has no use for this")


def check_links(body: bytes, host: str) -> None:
    """Refuse a body of JSON in which a file is named by an address."""
    own = (f"http://{host}/", f"https://{host}/")
    try:
        left = [json.loads(body)] if body else []
    except (ValueError, RecursionError):
        raise Refused(400, "the request is not readable as JSON") from None
    while left:
        content = left.pop()
        if isinstance(content, dict):
            path, url = content.get("path"), content.get("url")
            if (
                "//" in str(path)
                and re.match(r"\s*(\w+:)?//", str(path))
                or url
                and not str(url).startswith(("/", *own))
            ):
                raise Refused(403, "a picture is uploaded; nothing is fetched from an address")
            left += content.values()
        elif isinstance(content, list):
            left += content
