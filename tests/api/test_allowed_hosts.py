"""A web page whose name was made to lead to this machine gets no answer (DNS rebinding)."""

from __future__ import annotations

import pytest

from reprise.api.allowed_hosts import LOOPBACK_NAMES, hosts_allowed
from support.loopback import Loopback, Start

pytestmark = pytest.mark.anyio


async def status_of(server: Loopback, host: str) -> int:
    response = await server.get("/v1/models", headers={"host": host})
    if response.status_code != 200:
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "host_not_allowed")
        assert response.headers["x-request-id"]
    return response.status_code


async def test_loopback_answers_to_its_own_names_only(server: Loopback) -> None:
    for own in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST", "localhost.", f"localhost:{server.port}", "[::1]:80"):
        assert await status_of(server, own) == 200, own
    for foreign in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "::2", ""):
        assert await status_of(server, foreign) == 421, foreign


async def test_no_key_is_looked_at_for_a_foreign_name(start: Start) -> None:
    async with start(api_key=["k"]) as server:
        assert await status_of(server, "evil.example") == 421


async def test_names_can_be_added(start: Start) -> None:
    async with start(allowed_hosts=["example.org"]) as server:
        assert await status_of(server, "example.org:443") == 200
        assert await status_of(server, "localhost") == 200
        assert await status_of(server, "example.com") == 421
    async with start(allowed_hosts=["*"]) as server:
        assert await status_of(server, "evil.example") == 200


async def test_without_the_header(server: Loopback) -> None:
    reader, writer = await server.connect()
    writer.write(b"GET /health HTTP/1.0\r\n\r\n")
    assert b" 200 " in await reader.readline()
    writer.close()


async def test_two_names(server: Loopback) -> None:
    reader, writer = await server.connect()
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert b" 421 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize(
    ("host", "configured", "addresses", "allowed"),
    [
        ("0.0.0.0", [], ["0.0.0.0"], None),  # noqa: S104 - nothing is bound
        ("::", [], ["::"], None),
        ("192.0.2.7", [], ["192.0.2.7"], None),
        ("fe80::1%eth0", [], ["fe80::1%eth0"], None),
        ("example.org", [], ["192.0.2.7"], None),
        ("example.org", [], ["127.0.0.1", "192.0.2.7"], None),
        ("127.0.0.2", [], ["127.0.0.2"], {"127.0.0.2", *LOOPBACK_NAMES}),
        ("::1", [], ["::1"], {*LOOPBACK_NAMES}),
        ("LocalHost.", [], ["127.0.0.1", "::1"], {*LOOPBACK_NAMES}),
        ("127.1", [], ["127.0.0.1"], {"127.1", *LOOPBACK_NAMES}),
        ("my-machine", [], ["127.0.1.1"], {"my-machine", "127.0.1.1", *LOOPBACK_NAMES}),
        ("::ffff:127.0.0.1", [], ["::ffff:127.0.0.1"], {"[::ffff:127.0.0.1]", *LOOPBACK_NAMES}),
        ("0.0.0.0", ["Example.org:80", "::1"], ["0.0.0.0"], {"example.org", "0.0.0.0", *LOOPBACK_NAMES}),  # noqa: S104 - as above
        ("127.0.0.1", ["a", "*"], ["127.0.0.1"], None),
    ],
)
async def test_what_is_allowed(
    host: str, configured: list[str], addresses: list[str], allowed: set[str] | None
) -> None:
    assert hosts_allowed(host, configured, addresses) == allowed
