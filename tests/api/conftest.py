from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from reprise.settings import Settings
from reprise.text.tokenizer import Tokenizer
from support.loopback import Loopback, Start, serving
from support.scripted_engine import ScriptedEngine
from support.tiny_tokenizers import add_start_token, byte_level, save_model


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("model")
    return Tokenizer.load(str(save_model(directory, add_start_token(byte_level()))))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


@pytest.fixture
def start(tokenizer: Tokenizer, engine: ScriptedEngine) -> Start:
    """Start a server with these settings, over a socket."""

    def start(**settings: Any) -> AbstractAsyncContextManager[Loopback]:
        settings.setdefault("served_model_name", ["test/model", "alias"])
        settings.setdefault("drain_timeout", 5)
        return serving(Settings(**settings), tokenizer, engine)

    return start


@pytest.fixture
async def server(start: Start) -> AsyncIterator[Loopback]:
    async with start() as loopback:
        yield loopback
