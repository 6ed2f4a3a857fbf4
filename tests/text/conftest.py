from __future__ import annotations

import pytest

from reprise.text.tokenizer import Tokenizer
from support.tiny_tokenizers import BUILDERS, add_start_token, save_model


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Every kind of tokenizer by its name, loaded from a model directory."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: Tokenizer.load(str(save_model(root / name, add_start_token(build())))) for name, build in BUILDERS.items()
    }


@pytest.fixture(params=list(BUILDERS))
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """Each kind in turn."""
    return tokenizers[request.param]


@pytest.fixture
def byte_tokenizer(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["byte_level"]
