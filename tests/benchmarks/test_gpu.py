"""The GPU benchmark where there is no GPU: it says so, and its parts run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from reprise.engine.cuda import decoder
from reprise.ipc.messages import EngineConfig
from reprise.types import SamplingParams

ROOT = Path(__file__).parents[2]
REHEARSAL = [
    *("--device", "cpu", "--shape", "tiny", "--sequences", "1", "3", "--prompt-tokens", "90", "--repeats", "1"),
    *("--check-tokens", "5", "--kv-cache-memory", "4000000"),
]


def test_without_a_gpu_it_says_so_and_ends_well() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert finished.stdout.splitlines() == [
        "there is no GPU that torch sees: nothing was run (--device cpu --shape tiny rehearses)"
    ]


def test_a_rehearsal_goes_through_all_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "MODELS", {name: gpu.MODELS[name] for name in ("mistral", "gpt_neox")})
    monkeypatch.setattr(gpu, "NEW_TOKENS", 6)
    assert gpu.main(REHEARSAL) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["passed"], result["device"], result["not_run"]) == (True, "cpu", [])
    assert [found["kernels"].split(",")[0] for found in result["models"]] == ["cuda", "cuda", "torch", "torch"]
    assert [found["dtype"] for found in result["models"]] == ["float32", "bfloat16"] * 2
    for found in result["models"]:
        assert found["repeats"]
        assert not found["differing"]
        assert found["num_preemptions"]
    assert [found["sequences"] for found in result["decoding"]] == [1, 3]
    assert result["prefill"]["tokens"] == 90
    assert all(found["engine"] > 0 and found["transformers"] > 0 for found in result["beside"])
    for share in (result["decoding"][0]["share_of_floor"], result["prefill"]["share_of_rate"]):
        assert 0 < share < 1


def test_a_wrong_decoder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gate is turned off: a rotation of nothing gives other answers."""
    monkeypatch.setattr(decoder, "_rotate", lambda heads, *_, into: into.copy_(heads))
    monkeypatch.setattr("reprise.engine.execution.cuda_layers_gate", lambda *_: "")
    monkeypatch.setattr("reprise.engine.decoder_gate.NativeGate.difference", lambda *_: "")
    for dtype in gpu.DTYPES:
        found = gpu.check_model("llama", dtype, "cpu", 5)
        assert not found["right"]
        assert not found["passed"]


def test_when_the_time_is_over_it_says_what_was_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*REHEARSAL, "--deadline", "0.5"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["not_run"]
    assert any(line.startswith("not run: ") for line in lines)


def test_a_part_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "MODELS", {"llama": gpu.MODELS["llama"]})
    monkeypatch.setattr(gpu, "NEW_TOKENS", 3)

    def broken(*_: object) -> float:
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu, "seconds_a_step", broken)
    monkeypatch.setattr(gpu, "rate_of_transformers", broken)
    assert gpu.main(REHEARSAL) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    parts = ["decoding 1", "decoding 3", *(f"transformers' continuous batching of {count}" for count in (1, 3))]
    assert [failure["part"] for failure in result["failures"]] == parts
    assert "failed: decoding 1: ValueError: no such kernel" in lines
    assert result["prefill"]["tokens"] == 90
    assert not result["passed"]


def test_a_lost_gpu_is_the_end_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(gpu, "check_model", broken)
    monkeypatch.setattr(gpu, "is_lost", lambda _: True)
    assert gpu.main(REHEARSAL) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [failure["part"] for failure in result["failures"]] == ["llama in float32"]
    assert result["not_run"] == ["all after the part that broke the GPU"]


def test_a_sequence_that_ends_in_an_error_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be the same in every circumstance, and take no time."""
    execution = gpu.execute(gpu.small_model("llama", torch.float32, "cpu"), EngineConfig(model="m", max_num_seqs=4))

    def broken(_: object) -> None:
        raise ValueError("no such kernel")

    monkeypatch.setattr(execution.runner, "run", broken)
    with pytest.raises(RuntimeError, match="sequence 0 ended with forward_error"):
        gpu.answers(gpu.make_core(execution), [([3, 4], SamplingParams(seed=1, max_tokens=2))])
