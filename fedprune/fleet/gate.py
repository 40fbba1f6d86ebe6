"""What other machines may reach of a SuperLink: the interface of its nodes, and nothing else.

Flower answers everything on one port: nodes, which prove their keys, and commands (`flwr run`,
`flwr supernode register`), which prove nothing. Whoever reaches the latter runs code on the server
and on every node. So the SuperLink listens on this machine alone, and this process hands through
what nodes ask.
"""

from __future__ import annotations

import re
import ssl
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import uvicorn

MAX_BODY = 64 * 2**20  # Flower cuts messages into chunks of 5 MiB
_OPEN = re.compile(r"POST /v1/fleet/[a-z-]+|GET /health")
_NOT_HANDED_ON = {b"host", b"connection", b"transfer-encoding", b"content-length"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gate:
    """An ASGI app that hands requests of nodes to a SuperLink.

    Args:
        upstream: the SuperLink's own address, host:port.
        authority: file of the authority of its certificate.
    """

    def __init__(self, upstream: str, authority: str) -> None:
        self._client = httpx.AsyncClient(
            base_url=f"https://{upstream}",
            verify=ssl.create_default_context(cafile=authority),
            timeout=httpx.Timeout(60.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # past any proxy of the user's
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        assert scope["type"] == "http"
        status, headers, body = await self._answer(scope, receive)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def close(self) -> None:
        """Let go of the connections to the SuperLink."""
        await self._client.aclose()

    async def _answer(
        self, scope: Scope, receive: Receive
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        asked = f"{scope['method']} {scope['path']}"
        if not _OPEN.fullmatch(asked):
            return 404, [], b"nodes alone are served here"
        body = bytearray()
        while True:
            part = await receive()
            body += part.get("body", b"")
            if len(body) > MAX_BODY:
                return 413, [], b"too large"
            if not part.get("more_body"):
                break
        headers = [(k, v) for k, v in scope["headers"] if k not in _NOT_HANDED_ON]
        try:
            answer = await self._client.request(
                scope["method"], scope["path"], headers=headers, content=bytes(body)
            )
        except httpx.HTTPError:
            return 503, [], b"the SuperLink does not answer"
        kept = [(k, v) for k, v in answer.headers.raw if k.lower() not in _NOT_HANDED_ON]
        kept = [(k, v) for k, v in kept if k.lower() != b"content-encoding"]  # decoded by httpx
        return answer.status_code, kept, answer.content


def main() -> None:
    """Serve: port, upstream, and the files of authority, certificate and key, as arguments."""
    port, upstream, authority, certificate, key = sys.argv[1:]
    uvicorn.run(
        Gate(upstream, authority),
        host="0.0.0.0",
        port=int(port),
        ssl_certfile=certificate,
        ssl_keyfile=key,
        lifespan="off",
        ws="none",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
