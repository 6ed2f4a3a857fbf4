"""The benchmarks, tiny: they run, they verify, and their sums are right."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    floors,
    layers,
    load,
    overhead,
    quantization,
    rows,
    sampling,
    scaling,
    shapes,
    speculation,
    startup,
    steps,
    use_cache,
)
from benchmarks.load import Load, summarise
from benchmarks.paced_server import TICK
from benchmarks.raw_stream import Answer
from benchmarks.report import percentile, print_report, table
from benchmarks.streaming import StreamTimes, stream_completion
from reprise.engine import attention
from reprise.engine.native.library import built_variants
from reprise.engine.noise import draw_key
from support.one_order import need_products_that_do_not_repeat

FIXED_ATTENTION = attention.attend
ROOT = Path(__file__).parents[2]


def result_of(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    """The lines of the printed table, and the JSON line."""
    *lines, last = capsys.readouterr().out.splitlines()
    result: dict[str, Any] = json.loads(last)
    return lines, result


@pytest.mark.parametrize(
    "name",
    [
        *("load", "use_cache", "floors", "shapes", "rows", "steps", "peers", "convert_gguf", "layers", "quantization"),
        *("startup", "overhead", "scaling", "speculation", "sampling"),
    ],
)
def test_help(name: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "usage:" in finished.stdout


def test_load_measures_and_verifies_every_token(live_base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--url", live_base_url, "--concurrency", "1", "3", "--requests", "4"]
    assert load.main([*arguments, "--prompt-tokens", "8", "--output-tokens", "6"]) == 0
    lines, result = result_of(capsys)
    assert len(lines) == 3
    assert [measured["concurrency"] for measured in result["results"]] == [1, 3]
    for measured in result["results"]:
        assert measured["complete"] is True
        assert measured["num_requests"] == measured["num_complete_by_usage"] == measured["num_complete_by_count"] == 4
        assert measured["num_errors"] == 0
        assert 0 < measured["ttft_ms"]["p50"] <= measured["ttft_ms"]["p99"]
        # Where every answer came in one piece there is no time between two.
        assert measured["itl_ms"]["p50"] is None or measured["itl_ms"]["p50"] > 0
        assert measured["output_tokens_per_second"] == pytest.approx(24 / measured["seconds"])


@pytest.mark.skipif(not built_variants(), reason="the native decoder was not built for this CPU")
def test_quantization_tells_errors_and_perplexity(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "pocket", "--dtype", "float32", "--tokens", "900", "--sequences", "1"]
    assert quantization.main([*arguments, "--new-tokens", "4", "--repeats", "1"]) == 0
    lines, result = result_of(capsys)
    assert len(lines) == 4
    plain, eight, four = result["results"]
    assert [entry["quantize"] for entry in (plain, eight, four)] == ["none", "int8", "int4"]
    assert plain["logit_error"] == 0 < eight["logit_error"] < 0.05 < four["logit_error"] < 0.5
    assert plain["perplexity"] < four["perplexity"] < 2 * plain["perplexity"]
    assert eight["perplexity"] == pytest.approx(plain["perplexity"], rel=0.02)
    assert all(entry["tokens_per_second"]["1"] > 0 for entry in result["results"])


def test_speculation_compares_answers_and_counts_guesses(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tiny", "--dtype", "float32", "--prompts", "2", "--prompt-tokens", "20"]
    arguments += ["--pairs", "0", "3", "--pair-shape", "tiny", "--draft-layers", "1"]
    assert speculation.main([*arguments, "--new-tokens", "24", "--repeats", "1"]) == 0
    lines, result = result_of(capsys)
    assert len(lines) == 6 + 2 * 2
    by_way = {entry["way"]: entry for entry in result["models"]["tiny"]}
    assert [*by_way] == ["none", "ngram", "predicted", "mistaken", "draft"]
    assert by_way["none"]["num_guesses"] == 0
    assert by_way["predicted"]["kept_share"] == 1.0
    assert by_way["draft"]["kept_share"] == 1.0
    assert by_way["none"]["ratio"] == 1.0
    (_, always_right), (_, often_wrong) = (result["models"][f"tiny, later × {later}"] for later in (0, 3))
    assert always_right["kept_share"] == 1.0
    assert often_wrong["num_guesses"] > 0
    assert often_wrong["kept_share"] < 1.0


def test_sampling_compares_native_with_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert sampling.main(["--vocab", "500", "--rows", "3", "--repeats", "1"]) == 0
    lines, result = result_of(capsys)
    assert len(lines) == 1 + len(sampling.PARAMETERS)
    assert [entry["parameters"] for entry in result["results"]] == [*sampling.PARAMETERS]
    assert all(entry["agreement"] == 1.0 and entry["native_ms"] > 0 for entry in result["results"])


def test_sampling_without_the_native_library_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampling, "built_variants", list)
    assert sampling.main([]) == 0
    assert "was not built" in capsys.readouterr().out


def test_sampling_does_not_time_wrong_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    monkeypatch.setattr("reprise.engine.sampler.draw_key", lambda *words: draw_key(*words) + next(calls))
    with pytest.raises(RuntimeError, match="choose the same token for"):
        sampling.main(["--vocab", "500", "--rows", "3", "--repeats", "1"])


def test_load_with_openai_fields_alone(live_base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--url", live_base_url, "--concurrency", "1", "--requests", "1", "--no-extensions"]
    assert load.main([*arguments, "--output-tokens", "4"]) == 0
    assert result_of(capsys)[1]["results"][0]["num_complete_by_count"] is None


def test_load_counts_errors(live_base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--url", live_base_url, "--concurrency", "1", "--requests", "2", "--model", "nobody"]
    assert load.main(arguments) == 1
    (measured,) = result_of(capsys)[1]["results"]
    assert measured["num_errors"] == 2
    assert "404" in measured["first_error"]
    assert measured["complete"] is False


def test_a_server_that_is_not_there_is_an_error_not_a_crash() -> None:
    times = asyncio.run(stream_completion("http://127.0.0.1:9", {}))
    assert times.error is not None
    assert "ConnectionRefusedError" in times.error


def test_prompts_are_the_same_in_every_run_and_share_what_they_should() -> None:
    settings = Load(url="", model="m", prompt_tokens=10, output_tokens=5, shared_prefix_tokens=4)
    first, second = settings.body(0)["prompt"], settings.body(1)["prompt"]
    assert first == settings.body(0)["prompt"]
    assert first[:4] == second[:4]
    assert first[4:] != second[4:]
    assert len(first) == len(second) == 10


def test_sums() -> None:
    settings = Load(url="", model="m", prompt_tokens=1, output_tokens=3)
    good = StreamTimes(start=1.0, arrivals=[1.5, 1.6, 1.8], token_counts=[1, 1, 1], usage_tokens=3)
    short = StreamTimes(start=1.0, arrivals=[2.0], token_counts=[1], usage_tokens=3)
    measured = summarise(settings, [good, short], concurrency=2, seconds=2.0)
    assert measured["output_tokens_per_second"] == 3.0
    assert measured["ttft_ms"]["p50"] == pytest.approx(750)
    assert measured["itl_ms"]["p99"] == pytest.approx(199)
    assert (measured["num_complete_by_usage"], measured["num_complete_by_count"]) == (2, 1)
    assert measured["complete"] is False
    assert summarise(settings, [good], concurrency=1, seconds=1.0)["complete"] is True


def test_answers_of_one_piece_have_no_time_between_two(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Load(url="", model="m", prompt_tokens=1, output_tokens=3)
    whole = StreamTimes(start=1.0, arrivals=[2.0], token_counts=[3], usage_tokens=3)
    measured = summarise(settings, [whole], concurrency=1, seconds=1.0)
    assert measured["complete"] is True
    print_report(load.rows([measured]), {"results": [measured]})
    lines, result = result_of(capsys)
    assert lines[1].split() == ["1", "1", "0", "3.0", *["1,000.0"] * 3, *["–"] * 3, "yes"]
    assert result["results"][0]["itl_ms"] == {"p50": None, "p90": None, "p99": None}


def test_use_cache_compares_two_times_of_the_same_answer(
    live_base_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--url", live_base_url, "--new-tokens", "6", "--prompt-tokens", "4", "--repeats", "1"]
    assert use_cache.main(arguments) == 0
    lines, result = result_of(capsys)
    (measured,) = result["results"]
    assert measured["same_tokens"] is True
    assert 0 < measured["with_cache_seconds"] < 60
    assert 0 < measured["without_cache_seconds"] < 60
    assert len(lines) == 2


class Answers:
    """Stands for `use_cache.generate`: durations by whether the cache is used, in the order in which they come."""

    def __init__(self, with_cache: list[float], without_cache: list[float]) -> None:
        self.durations = {True: with_cache, False: without_cache}
        self.ids = {True: [5, 6], False: [5, 6]}

    def __call__(
        self, url: str, model: str, *, use_cache: bool, prompt_tokens: int, new_tokens: int
    ) -> tuple[float, list[int]]:
        assert (url, model, prompt_tokens, new_tokens) == ("http://server", "m", 4, 2)
        return self.durations[use_cache].pop(0), self.ids[use_cache]


USE_CACHE = ["--url", "http://server", "--model", "m", "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "3"]


def test_the_ratio_is_that_of_the_medians_and_warming_up_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = Answers([99.0, 2.0, 0.5, 7.0], [1.0, 30.0, 13.0, 12.0])
    monkeypatch.setattr(use_cache, "generate", answers)
    assert use_cache.main(USE_CACHE) == 0
    (head, line), result = result_of(capsys)
    (measured,) = result["results"]
    assert (measured["with_cache_seconds"], measured["without_cache_seconds"]) == (2.0, 13.0)
    assert measured["ratio"] == 6.5
    assert head.split() == ["model", "new", "tokens", "with", "cache", "without", "ratio", "same", "tokens"]
    assert line.split() == ["m", "2", "2.000", "s", "13.000", "s", "6.50", "yes"]
    assert answers.durations == {True: [], False: []}


@pytest.mark.parametrize("ids", [[5, 7], [5]])
def test_answers_that_differ_or_are_short_fail_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ids: list[int]
) -> None:
    answers = Answers([1.0] * 4, [2.0] * 4)
    answers.ids[False] = ids
    monkeypatch.setattr(use_cache, "generate", answers)
    assert use_cache.main(USE_CACHE) == 1
    assert result_of(capsys)[0][1].endswith("NO")


def test_use_cache_serves_a_shape_that_it_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(use_cache, "SHAPES_DIRECTORY", tmp_path)
    assert use_cache.main(["--model", "tiny", "--new-tokens", "3", "--repeats", "1"]) == 0
    assert result_of(capsys)[1]["results"][0]["model"] == "tiny"
    assert (tmp_path / "tiny/model.safetensors").exists()


def test_floors(capsys: pytest.CaptureFixture[str]) -> None:
    assert floors.main(["--seconds", "0.01", "--megabytes", "8", "--size", "64", "--device", "cpu"]) == 0
    lines, result = result_of(capsys)
    assert len(lines) == 6
    assert result["read_bytes_per_second"] > 1e6
    assert set(result["operations_per_second"]) == {"float32", "bfloat16"}


def test_a_shape_has_the_parameters_of_its_model_and_spells_every_id(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert shapes.write_model(tmp_path, "tiny") == 125_248
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(tokenizer) == 512
    assert tokenizer.decode([ord("H") - 0x21 + 33, 300]) != ""
    text = "Hello, world!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(("shape", "num_parameters"), [("smollm2-135m", 134_515_008), ("qwen3-0.6b", 596_049_920)])
def test_shapes_of_known_models_have_their_parameters(shape: str, num_parameters: int) -> None:
    import torch

    with torch.device("meta"):
        model = shapes.empty_model(shape)
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == num_parameters
    matrices = [parameter for name, parameter in parameters.items() if ".layers." in name and parameter.dim() == 2]
    assert sum(parameter.numel() for parameter in matrices) == shapes.layer_matrix_parameters(shape)


def test_table_and_percentiles() -> None:
    assert table([["name", "n"], ["a", "10"]]) == "name   n\na     10"
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.9) == pytest.approx(1.9)
    with pytest.raises(ValueError, match="no percentile of no values"):
        percentile([], 0.5)


def test_a_report_is_json_that_anyone_can_read() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_report([["name"]], {"value": float("nan")})


def test_rows_finds_none_that_differ_among_what_the_engine_computes(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows.main(["--max-rows", "48", "--max-outputs", "1600"]) == 0
    lines, result = result_of(capsys)
    assert result["multiples_of_4_that_differ"] == []
    assert len(lines) == 1 + len(result["differing"])


def test_steps_times_both_modes_of_both_tiers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tiny", "tiny-experts", "tiny-falcon", "--dtype", "float32"]
    assert steps.main([*arguments, "--sequences", "2", "--new-tokens", "4", "--repeats", "1"]) == 0
    lines, result = result_of(capsys)
    assert [measured["tier"] for measured in result["results"]] == ["paged", "paged", "padded"]
    for measured in result["results"]:
        assert measured["on_tokens_per_second"] == pytest.approx(2000 / measured["on_ms"])
        assert measured["off_tokens_per_second"] == pytest.approx(2000 / measured["off_ms"])
    assert len(lines) == 4


def test_startup_measures_times_and_memory_of_both_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "tiny", "--starts", "1", "--kv-cache-memory", str(1 << 20), "--peers", str(tmp_path)]
    assert startup.main(arguments) == 0
    (head, line), result = result_of(capsys)
    (measured,) = result["results"]
    assert len(measured["starts"]) == 1
    assert 0 < measured["listening_seconds"] <= measured["ready_seconds"] < measured["first_token_seconds"] < 120
    assert measured["limit_bytes"] == int(1.25 * (measured["weights_bytes"] + (1 << 20)) + 7e8)
    assert head.split()[:4] == ["shape", "starts", "listening", "ready"]
    assert line.startswith("tiny")
    if sys.platform == "linux":
        assert measured["busy_cores"] > 0
        assert measured["api_bytes"] + measured["engine_bytes"] == measured["both_bytes"]
        assert min(measured["api_bytes"], measured["engine_bytes"]) > 50e6
        assert measured["share_bytes"] > 100e6


def test_startup_takes_the_median_of_times_and_the_maximum_of_memory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    names = ("listening_seconds", "ready_seconds", "first_token_seconds", "busy_cores")
    sizes = ("api_bytes", "engine_bytes", "share_bytes")
    starts = [
        {**dict.fromkeys(names, float(time)), **dict.fromkeys(sizes, size)}
        for time, size in ((3, 10), (1, 700_000_000), (2, 30))
    ]
    measured = startup.summarise("tiny", tmp_path, 3000, starts)
    assert [measured[name] for name in names] == [2.0] * 4
    assert [measured[name] for name in sizes] == [700_000_000] * 3
    assert (measured["both_bytes"], measured["limit_bytes"]) == (1_400_000_000, 700_005_000)
    assert measured["within_limit"] is False


def layers_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and the result of each way."""
    code = layers.main(arguments)
    printed = capsys.readouterr().out.splitlines()
    return code, [json.loads(line) for line in printed if line.startswith("{")]


@pytest.mark.parametrize("model", ["pocket", "tiny-experts"])
def test_layers_finds_nothing_among_the_engines_ways(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = layers_of(capsys, ["--model", model, "--tokens", "140"])
    assert code == 0
    assert [result["way"] for result in found] == ["company", "chunks", "decode", "tokens"]
    for result in found:
        assert result["first_difference"] == "none"
        assert len(result["differences"]) > 10
        assert "lm_head" in result["differences"]


def test_layers_names_the_module_after_torchs_attention(capsys: pytest.CaptureFixture[str]) -> None:
    need_products_that_do_not_repeat()
    code, (found,) = layers_of(capsys, ["--attention", "torch", "--ways", "decode", "--tokens", "140"])
    assert code == 1
    assert ".self_attn." in found["first_difference"]
    assert found["differences"]["model.layers.0.input_layernorm"] == 0.0
    assert 0 < found["differences"][found["first_difference"]] < 1e-3
    assert attention.attend is FIXED_ATTENTION


def test_layers_names_the_first_product_where_steps_are_not_filled_up(capsys: pytest.CaptureFixture[str]) -> None:
    need_products_that_do_not_repeat()
    code, (found,) = layers_of(capsys, ["--off", "--ways", "decode", "--tokens", "140"])
    assert code == 1
    assert found["first_difference"] == "model.layers.0.self_attn.q_proj"


def test_layers_compares_the_padded_tier_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = layers_of(capsys, ["--model", "falcon-50m", "--ways", "decode", "padded", "--tokens", "40"])
    assert code == 1
    assert [result["way"] for result in found] == ["decode", "padded"]
    assert found[0]["first_difference"].startswith("transformer.h.0.")
    assert found[0]["differences"].keys() == found[1]["differences"].keys()


def test_overhead_counts_tokens_and_cpu_time_and_watches_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--streams", "3", "--pace", "400", "0", "--tokens", "600"]) == 0
    lines, result = result_of(capsys)
    assert len(lines) == 3
    paced, free = result["results"]
    assert [(measured["pace"], measured["num_errors"]) for measured in (paced, free)] == [(400, 0), (None, 0)]
    assert paced["at_once"] == 3
    assert 0 < paced["tokens_per_second"] < 440
    for measured in (paced, free):
        assert measured["tokens_per_stream"] == 200
        assert measured["api_cpu_seconds"] > 0
        assert measured["tokens_per_cpu_second"] > 0
        # The last event of a stream has the usage and no token.
        assert 0 < measured["tokens_per_event"] < 200
        assert 0 <= measured["loop_late_cpu_ms"]["p99"] <= measured["loop_late_ms"]["p100"]


def test_cpu_time_is_counted_below_the_ticks_of_the_kernel() -> None:
    before, own = overhead.cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() - own < 0.002:
        pass
    assert 0.002 <= overhead.cpu_seconds(os.getpid()) - before < 1
    with pytest.raises(OSError, match="no CPU clock of process 4194305"):
        overhead.cpu_seconds(4_194_305)


def test_overhead_counts_streams_that_fail_or_are_short() -> None:
    answers = [
        Answer(0.0, 1.0, 3.0, 8, 5, num_events=6),
        Answer(0.0, 2.0, 4.0, 8, 4, num_events=5),
        Answer(0.0, 3.5, 4.0, 8, 5, num_events=6),
        Answer(0.0, None, 1.0, error="refused"),
    ]
    measured = overhead.summarise(overhead.Cell(4, 5, 0.0), answers, [], seconds=2.0, cpu=0.5)
    assert (measured["num_errors"], measured["first_error"], measured["at_once"]) == (2, "4 tokens came", 2)
    assert (measured["tokens_per_second"], measured["tokens_per_cpu_second"]) == (7.0, 28.0)


def test_a_stall_of_the_loop_counts_for_all_that_would_have_come_in_it() -> None:
    measured = overhead.lateness([3.5 * TICK, 0.0])
    assert measured["p100"] == pytest.approx(3.5 * TICK * 1e3)
    assert measured["p50"] == pytest.approx(1.5 * TICK * 1e3)


def test_scaling_has_a_row_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--batch", "1", "3", "--context", "20", "40", "--waiting", "4", "30", "--steps", "4"]
    assert scaling.main(arguments) == 0
    lines, result = result_of(capsys)
    assert len(lines) == 1 + 2 + 2 + 6
    grown = [measured["of"] for measured in result["results"]]
    assert grown[::2] == ["batch", "context", "waiting for places", "waiting for blocks", "waiting for turn"]
    assert [measured["running"] for measured in result["results"]][:2] == [1, 3]
    for measured in result["results"]:
        assert 0 < measured["scheduling_us"] < measured["step_ms"] * 1e3
    for few, many in zip(result["results"][4::2], result["results"][5::2], strict=True):
        assert many["waiting"] - few["waiting"] == 26
        assert many["running"] == few["running"]
