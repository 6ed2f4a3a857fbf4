"""The comparison with other servers: what it asks, how it sums up, and that it runs with real servers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.peer_builds import NotAvailableError, model_directory
from benchmarks.peer_cells import CELLS
from benchmarks.peer_servers import SERVERS, Command, Server

FLOORS = {"read_bytes_per_second": 1e10, "operations_per_second": {"bfloat16": {"many_rows": 2e11}}}
TWO_CELLS = [CELLS["c1"], CELLS["prefill"]]


def one_round(c1: float | None, prefill: float | None, **others: Any) -> dict[str, Any]:
    cells = {"c1": c1, "prefill": prefill}
    measures = {
        name: {
            "tokens_per_second": figure,
            "decode_tokens_per_second": figure and 2 * figure,
            "client_cpu_share": 0.01,
        }
        for name, figure in cells.items()
    }
    return {"cells": measures, **others}


def test_figures_are_medians_and_missing_where_a_round_has_none() -> None:
    rounds = {"reprise": [one_round(10.0, 5.0), one_round(30.0, None)], "vllm": [{"cells": {}, "error": "broken"}]}
    assert peers.figures(rounds, TWO_CELLS) == {
        "reprise": {"c1": 20.0, "prefill": None},
        "vllm": {"c1": None, "prefill": None},
    }


def test_ratios_are_to_the_best_peer_of_each_cell_with_the_same_weights() -> None:
    measured: dict[str, dict[str, float | None]] = {
        "reprise": {"c1": 30.0, "prefill": 200.0},
        "reprise-nondeterministic": {"c1": 1e6, "prefill": 1e6},
        "llama.cpp": {"c1": 20.0, "prefill": 50.0},
        "vllm": {"c1": 15.0, "prefill": 400.0},
        "llama.cpp-q8_0": {"c1": 90.0, "prefill": 900.0},
        "reprise-int8": {"c1": 45.0, "prefill": None},
    }
    ratios = peers.ratios(measured, TWO_CELLS)
    assert ratios["reprise"]["cells"] == {
        "c1": {"ratio": 1.5, "best_peer": "llama.cpp"},
        "prefill": {"ratio": 0.5, "best_peer": "vllm"},
    }
    assert ratios["reprise"]["geometric_mean"] == pytest.approx((1.5 * 0.5) ** 0.5)
    assert ratios["reprise"]["complete"] is True
    assert ratios["reprise-int8"]["cells"] == {"c1": {"ratio": 0.5, "best_peer": "llama.cpp-q8_0"}}
    assert ratios["reprise-int8"]["complete"] is False
    assert set(ratios) == {"reprise", "reprise-nondeterministic", "reprise-int8"}


def test_without_a_peer_there_is_no_ratio() -> None:
    (ratio,) = peers.ratios({"reprise": {"c1": 30.0, "prefill": 1.0}}, TWO_CELLS).values()
    assert ratio == {"cells": {}, "geometric_mean": None, "complete": False}


def test_floors_follow_the_weights_and_the_layers() -> None:
    rates = peers.floor_rates(FLOORS, "smollm2-135m", 250_000_000)
    assert rates["c1"] == 40.0
    # 30 layers of 576 x (576 + 2 x 192) + 576 x 576 + 3 x 576 x 1536 parameters, two operations each.
    assert rates["prefill"] == pytest.approx(2e11 / (2 * 106_168_320))
    # 9 heads of 64 in 30 layers: of 1,024 tokens each looks at half of them on average, at keys and at values.
    with_attention = 2 * 106_168_320 + 2 * 2 * 30 * 9 * 64 * 512
    assert rates["prefill, attention counted"] == pytest.approx(2e11 / with_attention)


def test_the_floor_of_a_cpu_without_bfloat16_is_what_it_does_in_float32() -> None:
    rates = {"bfloat16": {"many_rows": 3e10}, "float32": {"many_rows": 1e11}}
    found = peers.floor_rates({**FLOORS, "operations_per_second": rates}, "smollm2-135m", 250_000_000)
    assert found["prefill"] == pytest.approx(1e11 / (2 * 106_168_320))


def test_the_share_of_the_floor_leaves_prompts_out_and_is_of_each_round() -> None:
    """Of what is 40, 20 and 10 tokens a second without prompts."""
    floors = [{**dict.fromkeys(peers.FLOOR_MEASURES, 10.0), "c1": c1} for c1 in (50.0, 80.0, 10.0)]
    rates = ((20.0, 9.0), (10.0, 8.0), (5.0, None))
    rounds = [{**one_round(*rate), "floors": floor} for rate, floor in zip(rates, floors, strict=True)]
    shares = peers.floor_shares({"reprise": rounds, "vllm": [], "llama.cpp-q8_0": rounds})
    assert shares == {"reprise": {"c1": 0.8}}


def test_floors_are_read_around_each_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The better of both is the one that counts."""
    readings = iter([50.0, 80.0, 40.0, 20.0, 10.0])
    monkeypatch.setattr(peers, "read_floors", lambda *_: dict.fromkeys(peers.FLOOR_MEASURES, next(readings)))
    monkeypatch.setattr(peers, "attempt", lambda *_, **__: one_round(20.0, 8.0))
    servers = [SERVERS[name] for name in ("reprise", "vllm")]
    result = peers.run_shape("tiny", servers, TWO_CELLS, options(tmp_path, "--rounds", "2"))
    found = {name: [one["floors"]["c1"] for one in of_server] for name, of_server in result["rounds"].items()}
    assert found == {"reprise": [80.0, 20.0], "vllm": [80.0, 40.0]}
    of_prompts = (8 / 80 + 8 / 20) / 2
    assert result["floor_shares"]["reprise"] == {
        "c1": (40 / 80 + 40 / 20) / 2,
        "prefill": of_prompts,
        "prefill, attention counted": of_prompts,
    }


def options(tmp_path: Path, *arguments: str) -> Any:
    return peers.parse(["--peers", str(tmp_path), *arguments])


def test_every_other_round_is_in_the_reverse_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def attempt(server: Server, **_: Any) -> dict[str, Any]:
        calls.append(server.name)
        return {"cells": {}, "error": "broken"} if server.name == "vllm" else one_round(2.0, 3.0, ready_seconds=4.0)

    monkeypatch.setattr(peers, "attempt", attempt)
    monkeypatch.setattr(peers, "measure_floors", lambda _: FLOORS)
    servers = [SERVERS[name] for name in ("reprise", "vllm", "llama.cpp")]
    result = peers.run_shape("tiny", servers, TWO_CELLS, options(tmp_path, "--rounds", "3"))
    assert calls == ["reprise", "vllm", "llama.cpp", "llama.cpp", "reprise", "reprise", "llama.cpp"]
    assert result["ratios"]["reprise"]["geometric_mean"] == pytest.approx(1.0)
    assert result["overheads"]["reprise"]["ready_seconds"] == 4.0
    assert result["overheads"]["vllm"]["ready_seconds"] is None
    assert result["client_cpu_share"] == {"reprise": 0.01, "vllm": None, "llama.cpp": 0.01}


def test_rows_show_a_dash_for_what_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "attempt", lambda server, **_: one_round(20.0 if server.ours else None, 3.0))
    monkeypatch.setattr(peers, "measure_floors", lambda _: FLOORS)
    servers = [SERVERS[name] for name in ("reprise", "vllm")]
    result = peers.run_shape("tiny", servers, TWO_CELLS, options(tmp_path))
    result["floor_shares"] = {"reprise": {"c1": 0.5}, "vllm": {"prefill": 0.5, "prefill, attention counted": 0.6}}
    _, ours, peer, ratio, floor, peers_floor, counted = peers.rows_of_shape("tiny", result, TWO_CELLS)
    assert ours[:3] == ["reprise", "20.0", "3.0"]
    assert peer[:3] == ["vllm", "–", "3.0"]
    assert ratio[:4] == ["reprise ÷ best peer", "–", "1.00", "(1.00)"]
    assert floor[:3] == ["reprise of the floor", "50%", ""]
    assert peers_floor[:3] == ["vllm of the floor", "", "50%"]
    assert counted[:3] == ["vllm of it, attention counted", "", "60%"]
    _, (c1, prefill) = peers.panels("tiny", result, TWO_CELLS)
    assert c1.values == {"reprise": 20.0, "vllm": None}
    assert prefill.values == {"reprise": 3.0, "vllm": 3.0}


def test_a_server_that_cannot_be_had_or_started_is_an_error_of_its_own(tmp_path: Path) -> None:
    def not_available(_: Path, shape: str, __: int) -> Command:
        raise NotAvailableError(f"no compiler for {shape}")

    def ends(_: Path, __: str, ___: int) -> Command:
        return Command([sys.executable, "-c", "print('what went wrong'); exit(3)"], "/ready", {})

    settings = {"peers": tmp_path, "shape": "tiny", "cells": TWO_CELLS, "seconds": 0.1, "settle": 0.0}
    assert peers.attempt(Server("a", "bf16", ours=False, command=not_available), **settings) == {
        "cells": {},
        "error": "no compiler for tiny",
    }
    error = peers.attempt(Server("b", "bf16", ours=False, command=ends), **settings)["error"]
    assert error == "ended with 3: what went wrong\n"


def test_quick_and_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = options(tmp_path, "--quick")
    assert (quick.rounds, quick.seconds, quick.shapes) == (1, 2.0, ("smollm2-135m",))
    assert quick.cells == ("c1", "c4", "prefill")
    assert options(tmp_path, "--quick", "--cells", "c64").cells == ["c64"]
    full = options(tmp_path)
    assert (full.rounds, full.seconds, full.cells) == (2, 10.0, tuple(CELLS))
    with pytest.raises(SystemExit):
        options(tmp_path, "--rounds", "0")
    assert "--rounds: at least 1" in capsys.readouterr().err


def test_two_real_servers_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This server stands for its peer too: both figures are there, verified and of the same order."""

    def command(directory: Path, shape: str, port: int) -> Command:
        model = model_directory(directory, shape)
        flags = ["--port", str(port), "--served-model-name", "benchmark", "--num-threads", "1"]
        arguments = [sys.executable, "-m", "reprise.cli", "serve", str(model), *flags, "--kv-cache-memory", "8MiB"]
        return Command(arguments, "/ready", {"ignore_eos": True, "stream_options": {"include_usage": True}})

    monkeypatch.setitem(SERVERS, "reprise", Server("reprise", "bf16", ours=True, command=command))
    monkeypatch.setitem(SERVERS, "vllm", Server("vllm", "bf16", ours=False, command=command))
    monkeypatch.setattr(peers, "measure_floors", lambda _: FLOORS)
    plot = tmp_path / "peers.svg"
    arguments = ["--peers", str(tmp_path), "--shapes", "tiny", "--servers", "reprise", "vllm", "--plot", str(plot)]
    assert peers.main([*arguments, "--rounds", "1", "--seconds", "0", "--cells", "c4", "prefill", "shared"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)["shapes"]["tiny"]
    assert [line.split()[0] for line in lines] == ["tiny", "reprise", "vllm", *["reprise"] * 3, *["vllm"] * 2]
    for name in ("reprise", "vllm"):
        (measured,) = result["rounds"][name]
        assert measured["cells"]["c4"]["num_requests"] == 4
        assert measured["cells"]["shared"]["num_requests"] == 16
        assert all(entry["error"] is None for entry in measured["cells"].values())
        assert 0 < measured["ready_seconds"] < measured["first_token_seconds"] < 120
        assert 50e6 < measured["pss_bytes"] < 4e9
        assert measured["peak_rss_bytes"] >= measured["pss_bytes"] / 2
    assert 0.01 < result["ratios"]["reprise"]["geometric_mean"] < 100
    assert "16 × (512 + 64), c=4" in plot.read_text(encoding="utf-8")
