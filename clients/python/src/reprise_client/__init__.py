"""A small typed client for a Reprise server, synchronous and asynchronous."""

from reprise_client.client import Client, Stream
from reprise_client.client_async import AsyncClient, AsyncStream
from reprise_client.errors import APIError, ClientError, ConnectionFailedError, StreamBrokenError
from reprise_client.results import Choice, Chunk, Completion, Usage
from reprise_client.wire import Message, Prompt

__all__ = [
    "APIError",
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Chunk",
    "Client",
    "ClientError",
    "Completion",
    "ConnectionFailedError",
    "Message",
    "Prompt",
    "Stream",
    "StreamBrokenError",
    "Usage",
]
