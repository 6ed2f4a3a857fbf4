"""What the operator sees of a start."""

from __future__ import annotations

import io
import json
import logging
import shlex
from unittest.mock import create_autospec

import pytest
from rich.console import Console

from reprise.generation.async_engine import AsyncEngine
from reprise.ipc.messages import LoadProgress, Ready
from reprise.logs import JsonFormatter
from reprise.settings import Settings
from reprise.startup import LoadingDisplay, announce, base_url, summary, try_command

READY = Ready(
    tier="paged",
    tier_reason="equal over 5 layers",
    device="cuda",
    device_name="NVIDIA H100",
    dtype="bfloat16",
    architecture="LlamaForCausalLM",
    num_parameters=134_515_008,
    vocab_size=49152,
    max_model_len=8192,
    num_kv_tokens=131_072,
    kv_cache_memory=2**30,
    max_sequence_tokens=8192,
    max_num_seqs=64,
    weights_fingerprint="f",
    load_seconds=1.26,
)


def test_summary_says_what_is_served_where_and_how_to_try_it() -> None:
    settings = Settings(model="some/model")
    lines = summary(settings, READY, has_chat_template=True).splitlines()
    assert lines[0].endswith("serves some/model at http://127.0.0.1:8000")
    assert [line.split()[0] for line in lines[1:]] == [
        "model",
        "tier",
        "kernels",
        "repeats",
        "memory",
        "context",
        "loaded",
        "try",
    ]
    text = "\n".join(lines)
    for fact in (
        "LlamaForCausalLM, 134.52 M parameters, bfloat16 on cuda (NVIDIA H100)",
        "paged: equal over 5 layers",
        "131,072 KV tokens, 64 sequences",
        "8,192 tokens of prompt and output",
        "in 1.3 s",
        try_command(settings, has_chat_template=True),
    ):
        assert fact in text


def test_for_machines_a_start_has_the_command_to_try_and_nothing_of_the_wire(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="reprise")
    engine = create_autospec(AsyncEngine, instance=True, info=READY)
    announce(Settings(model="some/model"), engine, has_chat_template=True)
    record = json.loads(JsonFormatter().format(caplog.records[0]))
    assert record["message"] == "serving some/model"
    assert record["url"] == "http://127.0.0.1:8000"
    assert record["try"] == try_command(Settings(model="some/model"), has_chat_template=True)
    assert record["engine"] == {name: getattr(READY, name) for name in Ready.__struct_fields__}
    assert "type" not in record["engine"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),  # noqa: S104 # no address is bound
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_the_address_is_one_that_a_client_can_use(host: str, expected: str) -> None:
    assert base_url(Settings(host=host)) == expected


@pytest.mark.parametrize("has_chat_template", [True, False])
def test_the_command_to_try_is_one_request_for_the_shell(has_chat_template: bool) -> None:
    settings = Settings(served_model_name=["it's"], api_key=["sk-1"])
    command = try_command(settings, has_chat_template=has_chat_template)
    words = shlex.split(command)
    body = json.loads(words[words.index("-d") + 1])
    assert words[0] == "curl"
    assert body["model"] == "it's"
    assert ("messages" in body) is has_chat_template
    assert words[2].endswith("/v1/chat/completions" if has_chat_template else "/v1/completions")
    assert "Authorization: Bearer $REPRISE_API_KEY" in words
    assert "sk-1" not in command


def test_without_a_terminal_each_stage_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="reprise")
    with LoadingDisplay(Console(file=io.StringIO())) as display:
        for stage, fraction in (("loading weights", 0.0), ("loading weights", 0.5), ("checks", 1.0)):
            display.show(LoadProgress(stage=stage, fraction=fraction))
    assert caplog.messages == ["loading: weights", "loading: checks"]


def test_on_a_terminal_there_is_a_bar_that_goes_away(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="reprise")
    screen = io.StringIO()
    with LoadingDisplay(Console(file=screen, force_terminal=True, width=100)) as display:
        display.show(LoadProgress(stage="loading weights", fraction=0.5))
        display.close()
    assert "weights" in screen.getvalue()
    assert "loading weights" not in screen.getvalue()
    assert "50%" in screen.getvalue()
    assert caplog.messages == []
