"""Every path needs a key but those on a short list."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from reprise.api.errors import HttpError

PUBLIC_PATHS = frozenset({"/health", "/ready"})


class RequireKey:
    """Pure ASGI. Decides on `scope["path"]`, the very string that the router matches, by equality.

    All keys are compared, by digest and in constant time, so the time taken tells nothing.
    """

    def __init__(self, app: ASGIApp, *, keys: Iterable[str], public_paths: frozenset[str] = PUBLIC_PATHS) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._public_paths = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._public_paths and not self._has_key(scope):
            raise HttpError(
                401,
                "A valid API key is needed, in the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, digest = _given_key(scope)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def key_digest(scope: Scope) -> bytes:
    """A digest of a request's key. Only for one that was let in by its key."""
    return _given_key(scope)[1]


def _given_key(scope: Scope) -> tuple[bytes, bytes]:
    """The scheme, and the key's digest."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    return scheme, _digest(key.strip())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
